"""Official Python SDK: batches, files, lists, errors, idempotency, cancellation.

Attacks: bad parameters and files, repeated creations, deletion and cancellation at bad moments.
"""

import concurrent.futures
import json
import re
import urllib.error
import urllib.request

import openai
import pytest
from conftest import CHAT, chat, jsonl, wait_for


def test_batch_runs_from_upload_to_results(server):
    client = server.client
    file = client.files.create(
        file=("prompts.jsonl", jsonl([chat("a", "one"), chat("b", "two")])), purpose="batch"
    )
    assert re.fullmatch(r"file-[0-9a-f]{32}", file.id)
    assert (file.object, file.filename, file.purpose, file.status) == (
        "file",
        "prompts.jsonl",
        "batch",
        "processed",
    )
    assert file.expires_at == file.created_at + 30 * 86400

    batch = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"team": "research"}
    )
    assert re.fullmatch(r"batch_[0-9a-f]{32}", batch.id)
    assert batch.status == "validating"
    assert batch.expires_at == batch.created_at + 86400
    assert (
        batch.request_counts.total,
        batch.request_counts.completed,
        batch.request_counts.failed,
    ) == (0, 0, 0)

    batch = server.ended(batch.id)
    assert batch.status == "completed"
    assert (
        batch.request_counts.total,
        batch.request_counts.completed,
        batch.request_counts.failed,
    ) == (2, 2, 0)
    assert batch.metadata == {"team": "research"}
    assert batch.model == "echo"
    assert batch.error_file_id is None and batch.errors is None
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens == 8 + 2

    content = client.files.content(batch.output_file_id)
    assert content.response.headers["content-type"] == "application/octet-stream"
    name = f"{batch.id}_output.jsonl"
    assert content.response.headers["content-disposition"] == f'attachment; filename="{name}"'
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    lines = [json.loads(line) for line in content.text.splitlines()]
    assert [line["custom_id"] for line in lines] == ["a", "b"]
    for line, text in zip(lines, ["one", "two"], strict=True):
        assert list(line) == ["id", "custom_id", "response", "error"] and line["error"] is None
        assert re.fullmatch(r"batch_req_[0-9a-f]{32}", line["id"])
        assert re.fullmatch(r"[0-9a-f]{32}", line["response"]["request_id"])
        answer = openai.types.chat.ChatCompletion.model_validate(line["response"]["body"])
        assert answer.choices[0].message.content == text


@pytest.mark.parametrize(
    "endpoint, body, model",
    [
        ("/v1/completions", {"prompt": "hi"}, openai.types.Completion),
        ("/v1/embeddings", {"input": ["a", "b"]}, openai.types.CreateEmbeddingResponse),
        ("/v1/responses", {"input": "hi"}, openai.types.responses.Response),
        ("/v1/moderations", {"input": "hi"}, openai.types.ModerationCreateResponse),
    ],
)
def test_endpoints_answer_in_the_sdk_types(server, endpoint, body, model):
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "echo", **body}}
    batch = server.run([line], endpoint=endpoint)
    (result,), errors = server.results(batch)
    assert errors == []
    model.model_validate(result["response"]["body"], strict=True)


def test_failed_request_is_an_error_line_and_the_batch_completes(server):
    unknown_role = chat("b")
    unknown_role["body"]["messages"][0]["role"] = "robot"
    batch = server.run([chat("a"), unknown_role, chat("c", n=99)])
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == ["a"]
    refused, status = errors
    assert refused["custom_id"] == "b" and refused["response"] is None
    assert refused["error"]["message"].startswith("Unknown message role: robot")
    assert status["custom_id"] == "c" and status["error"] is None
    assert status["response"]["status_code"] == 400
    assert set(status["response"]["body"]["error"]) == {"message", "type", "param", "code"}

    nothing = server.run([unknown_role])
    assert nothing.status == "completed" and nothing.output_file_id is None


def test_rejected_file_lists_every_error_with_its_line(server):
    wrong_url = {**chat("e"), "url": "/v1/embeddings"}
    lines = [
        chat("a"),
        "",
        "not json",
        "[]",
        chat("a"),
        {
            "custom_id": "d",
            "method": "GET",
            "url": CHAT,
            "body": {"model": "nobody", "messages": "x", "stream": True},
        },
        wrong_url,
        chat("f", model="nobody"),
    ]
    batch = server.run(lines)
    assert batch.status == "failed" and batch.failed_at
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert found == [
        (3, "invalid_json_line", None),
        (4, "invalid_request", None),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "invalid_method", "method"),
        (6, "streaming_unsupported", "body.stream"),
        (6, "invalid_request", "body.messages"),
        (6, "model_not_found", "body.model"),
        (7, "invalid_url", "url"),
        (8, "model_not_found", "body.model"),
    ]
    assert "line 1" in batch.errors.data[2].message
    assert batch.errors.data[8].message == (
        "The provided model 'nobody' is not supported by the Batch API: "
        "it does not exist or is not supported"
    )


def test_unprocessable_input_fails_the_batch_not_the_call(server):
    batch = server.client.batches.create(
        input_file_id="file-missing", endpoint=CHAT, completion_window="24h"
    )
    batch = server.ended(batch.id)
    (error,) = batch.errors.data
    assert (error.code, error.param, error.line) == ("invalid_request", "input_file_id", None)
    assert (
        error.message
        == "Cannot find file file-missing, or the organization does not have access to it."
    )

    (error,) = server.run(b"\n\r\n \n").errors.data
    assert (error.code, error.line) == ("empty_file", None)
    (error,) = server.run(b'\xef\xbb\xbf{"custom_id":"\xff"}\r\n').errors.data
    assert (error.code, error.line) == ("invalid_json_line", 1)


def test_bad_parameters_raise_the_sdk_error_classes(server):
    client = server.client
    file = server.upload([chat("a")])

    def refused(kind, call):
        with pytest.raises(kind) as caught:
            call()
        return caught.value

    def create(**change):
        given = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **change}
        return lambda: client.batches.create(**given)

    error = refused(openai.BadRequestError, create(endpoint="/v1/nothing"))
    assert (error.param, error.code, error.type) == (
        "endpoint",
        "invalid_value",
        "invalid_request_error",
    )
    assert error.body["message"].startswith(
        "Invalid value: '/v1/nothing'. Supported values are: '/v1/chat/completions'"
    )
    assert (
        refused(openai.BadRequestError, create(completion_window="1h")).param == "completion_window"
    )
    error = refused(openai.BadRequestError, create(metadata={"tags": ["a"]}))
    assert (error.param, error.code) == ("metadata.tags", "invalid_type")
    assert (
        error.body["message"]
        == "Invalid type for 'metadata.tags': expected a string, but got an array instead."
    )
    assert (
        refused(openai.BadRequestError, create(extra_body={"colour": 1})).code
        == "unknown_parameter"
    )
    assert refused(openai.NotFoundError, lambda: client.batches.retrieve("batch_x")).body[
        "message"
    ] == ("No batch found with id 'batch_x'.")
    assert refused(openai.NotFoundError, lambda: client.files.retrieve("file-x")).status_code == 404
    assert (
        refused(openai.NotFoundError, lambda: client.models.retrieve("nobody")).code
        == "model_not_found"
    )
    assert (
        refused(openai.BadRequestError, lambda: client.batches.list(after="batch_x")).param
        == "after"
    )
    assert refused(openai.BadRequestError, lambda: client.batches.list(limit=101)).param == "limit"
    for seconds, shown in [(-1, "-1"), (0, "0"), (3599, "3599"), (2592001, "2592001")]:
        error = refused(
            openai.BadRequestError,
            create(output_expires_after={"anchor": "created_at", "seconds": seconds}),
        )
        assert (
            error.param == "output_expires_after.seconds"
            and f"from 3600 to 2592000, but got '{shown}'" in error.message
        )
    error = refused(
        openai.BadRequestError,
        create(output_expires_after={"anchor": "created_at", "seconds": 3600, "z": 1}),
    )
    assert (error.param, error.code) == ("output_expires_after.z", "unknown_parameter")
    assert refused(openai.BadRequestError, lambda: server.upload(b"")).code == "empty_file"
    wrong_purpose = lambda: client.files.create(file=("a", b"x"), purpose="nothing")  # noqa: E731
    assert refused(openai.BadRequestError, wrong_purpose).param == "purpose"
    assert (
        refused(openai.NotFoundError, lambda: client.get("/nothing", cast_to=object)).type
        == "invalid_request_error"
    )
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/batches", 405),
        ("GET", "/v1/batches/%ff", 400),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(server.url + path, method=method))
        assert caught.value.code == status and caught.value.headers["x-request-id"]
        assert set(json.load(caught.value)["error"]) == {"message", "type", "param", "code"}
    done = server.run([chat("a")])
    conflict = refused(openai.ConflictError, lambda: client.batches.cancel(done.id))
    assert conflict.body["message"] == "Cannot cancel a batch with status 'completed'."
    assert conflict.response.headers["x-should-retry"] == "false"
    assert re.fullmatch(r"[0-9a-f]{32}", conflict.request_id)


def test_idempotency_key_creates_one_batch(server):
    file = server.upload([chat("a")])

    def create(key="key-1", window="24h", **more):
        headers = {"idempotency-key": key}
        return server.client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window=window,
            extra_headers=headers,
            **more,
        )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(lambda _: create(metadata={"a": "1", "b": "2"}).id, range(40)))
    assert len(set(at_once)) == 1
    server.ended(at_once[0])
    again = create(metadata={"b": "2", "a": "1"})
    assert again.id == at_once[0] and again.status == "completed"
    in_body = server.client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"a": "1", "b": "2"},
        extra_body={"idempotency_key": "key-1"},
    )
    assert in_body.id == at_once[0]
    for other in [lambda: create(), lambda: create(metadata={"a": "2"})]:
        with pytest.raises(openai.ConflictError) as caught:
            other()
        assert (
            "conflict" in caught.value.message.lower()
            and caught.value.code == "idempotency_conflict"
        )
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert create("key-2").id != at_once[0]
    for wrong in [
        {"key": ""},
        {"key": "k" * 256},
        {"key": "a b"},
        {"extra_body": {"idempotency_key": "another"}},
    ]:
        with pytest.raises(openai.BadRequestError) as caught:
            create(**wrong)
        assert caught.value.param == "idempotency_key"
    # A refused request does not consume its key.
    with pytest.raises(openai.BadRequestError):
        create("key-3", window="1y")
    create("key-3")
    assert len(list(server.client.batches.list())) == 3


def test_lists_of_files_and_batches_are_paged(server):
    ids = [server.create([chat("a")]).id for _ in range(5)]
    page = server.client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == ids[:2:-1] and page.has_more
    assert [batch.id for batch in server.client.batches.list(limit=2)] == ids[::-1]
    for batch_id in ids:
        server.ended(batch_id)
    inputs = list(server.client.files.list(purpose="batch", order="asc", limit=2))
    assert len(inputs) == 5 and all(file.purpose == "batch" for file in inputs)
    assert len(list(server.client.files.list(limit=3))) == 10


def test_list_continues_after_its_cursor_is_deleted(server):
    ids = [server.upload(b"x").id for _ in range(7)]
    listed = []
    for file in server.client.files.list(limit=2):
        listed.append(file.id)
        server.client.files.delete(file.id)
        wait_for(
            lambda file=file: (
                not (server.data / "objects" / server.tenant / "files" / file.id).exists()
            ),
            what="removal of the object",
        )
    assert listed == ids[::-1] and list(server.client.files.list()) == []


def test_batch_cancelled_during_validation_reports_every_line(server):
    batch = server.create([chat(str(number), "x" * 2000) for number in range(20_000)])
    assert server.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = server.ended(batch.id)
    output, errors = server.results(batch)
    assert batch.status == "cancelled" and batch.request_counts.total == 20_000
    assert [
        int(line["custom_id"])
        for line in sorted(output + errors, key=lambda line: int(line["custom_id"]))
    ] == list(range(20_000))
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}


def test_refusal_during_an_upload_is_readable(server):
    large = b"x" * 30_000_000
    for path, headers, status in [
        ("/v1/batches", {"content-type": "application/json"}, 413),
        ("/v1/files", {"content-type": "text/plain"}, 415),
        ("/v1/nowhere", {}, 404),
        ("/v1/models", {}, 405),
    ]:
        request = urllib.request.Request(
            server.url + path, data=large, headers=headers, method="POST"
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert (
            caught.value.code == status
            and json.load(caught.value)["error"]["type"] == "invalid_request_error"
        )


def test_deleted_input_file_stays_available_to_its_batch(server):
    batch = server.create([chat(str(number)) for number in range(2000)])
    deleted = server.client.files.delete(batch.input_file_id)
    assert deleted.deleted and deleted.id == batch.input_file_id
    with pytest.raises(openai.NotFoundError):
        server.client.files.content(batch.input_file_id)
    batch = server.ended(batch.id)
    assert batch.status == "completed" and batch.request_counts.completed == 2000


def test_range_requests_and_the_old_prefix_are_supported(server):
    file = server.upload(b"0123456789")
    part = server.client.files.content(file.id, extra_headers={"range": "bytes=2-4"})
    assert part.content == b"234" and part.response.status_code == 206
    assert part.response.headers["content-range"] == "bytes 2-4/10"
    old = openai.OpenAI(base_url=server.url + "/v1/openai/v1", api_key=server.client.api_key)
    assert old.files.content(file.id).content == b"0123456789"
