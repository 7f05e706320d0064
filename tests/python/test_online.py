"""Online requests: answers, streams, limits, outages, and clients that leave."""

import concurrent.futures
import json
import time

import httpx2
import openai
import pytest
from conftest import chat, jsonl, wait_for
from tenants import Tenants, error_of, request

SECRET = "sk-0123456789abcdefghij"

DAY = 86_400


@pytest.fixture
def online(serve, stub, tmp_path):
    """Returns tenants of a server whose provider is the stub."""

    def start(more="", config="", **plugins):
        path = tmp_path / "batchwright.toml"
        path.write_text(config)
        plugins = {"stub": stub.plugin(["m", "n"], more), **plugins}
        return Tenants(serve, tmp_path, "--config", path, plugins=plugins)

    return start


def ask(client, text="hello", **more):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(**{"model": "m", "messages": messages, **more})


def usage(tenants, kind="completions", **more):
    """Returns the sums of requests, input tokens and output tokens since yesterday."""
    start = int(time.time()) - DAY
    buckets = getattr(tenants.admin.usage, kind)(start_time=start, limit=7, **more).data
    found = [result for bucket in buckets for result in bucket.results]
    names = ("num_model_requests", "input_tokens", "output_tokens")
    return tuple(sum(getattr(result, name, 0) or 0 for result in found) for name in names)


def raw(client, text="hello", path="/chat/completions", **more):
    """Sends a request without the retries and the types of the SDK; returns the response."""
    messages = [{"role": "user", "content": text}]
    headers = {"authorization": f"Bearer {client.api_key}", **more.pop("headers", {})}
    body = {"model": "m", "messages": messages, **more}
    return httpx2.post(str(client.base_url).rstrip("/") + path, json=body, headers=headers)


def error(response):
    return response.status_code, response.json()["error"]["code"]


def test_sdk_gets_answers_at_every_endpoint_and_their_usage_is_no_batch(online):
    tenants = online()
    _, account, client = tenants.project("Acme")
    answer = ask(client, "hi", user="someone", metadata={"a": "b"})
    assert answer.choices[0].message.content == "stub: hi"
    assert answer.usage.prompt_tokens == 7
    assert client.responses.create(model="m", input="hi").output_text == "stub: hi"
    assert client.embeddings.create(model="m", input="hi").data[0].embedding == [0.5, -0.5]
    assert client.moderations.create(model="m", input="hi").results[0].flagged is False
    assert client.completions.create(model="m", prompt="hi").usage.completion_tokens == 3
    (group,) = [
        result
        for bucket in tenants.admin.usage.completions(
            start_time=int(time.time()) - DAY, group_by=["batch", "api_key_id"]
        ).data
        for result in bucket.results
    ]
    assert (group.batch, group.api_key_id) == (False, account.api_key.id)
    assert (group.num_model_requests, group.input_tokens, group.output_tokens) == (3, 21, 9)
    assert usage(tenants, "embeddings")[:2] == (1, 7)
    assert usage(tenants, "moderations")[0] == 1
    response = client.chat.completions.with_raw_response.create(
        model="m", messages=[{"role": "user", "content": "hi"}]
    )
    assert len(response.headers["x-request-id"]) == 32


def test_key_of_a_client_never_goes_upstream_and_the_log_knows_who_asked(serve, stub, tmp_path):
    plugins = {"stub": stub.plugin(["m"])}
    tenants = Tenants(serve, tmp_path, "--log-filter", "debug", plugins=plugins)
    _, account, client = tenants.project("Acme")
    answer = ask(
        client,
        "!headers",
        user="someone",
        metadata={"job": "17"},
        extra_headers={"x-client-request-id": "mine-1", "openai-organization": "org-x"},
    )
    seen = answer.choices[0].message.content
    assert "authorization" not in seen and "org-x" not in seen
    assert client.api_key not in seen + tenants.server.logged()
    for known in ("someone", "17", "mine-1", account.api_key.id, answer._request_id):
        assert known in tenants.server.logged(), known


def test_stream_passes_every_field_on_and_has_usage_only_if_asked(online):
    tenants = online()
    _, _, client = tenants.project("Acme")
    chunks = list(ask(client, "one two three", stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "one two three"
    assert chunks[0].choices[0].delta.model_extra == {"x_unknown": {"kept": True}}
    assert all(chunk.choices for chunk in chunks)
    assert usage(tenants) == (1, 7, 3)
    options = {"include_usage": True}
    chunks = list(ask(client, "one", stream=True, stream_options=options))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    texts = client.completions.create(model="m", prompt="a b", stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts) == "a b"
    events = list(client.responses.create(model="m", input="a b", stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.completed",
    ]
    assert events[-1].response.output_text == "a b"
    assert usage(tenants) == (4, 28, 12)


def test_stream_whose_first_event_is_an_error_is_no_success(online, stub):
    tenants = online()
    _, _, client = tenants.project("Acme")
    status, body = error_of(lambda: ask(client, "!stream-error", stream=True))
    assert status >= 500 and "refused in the stream" in body["message"]
    assert usage(tenants) == (0, 0, 0)
    # A stream that breaks ends with an error that the SDK raises, and counts what was seen.
    stream = ask(client, "!stream-cut", stream=True)
    seen = []
    with pytest.raises(openai.APIError, match="broke off"):
        seen.extend(chunk.choices[0].delta.content for chunk in stream)
    assert seen == ["one ", "two"]
    requests, given, output = usage(tenants)
    assert (requests, output) == (1, 2) and given > 0


def test_provider_that_ignores_stream_is_answered_as_it_answers(online):
    tenants = online()
    _, _, client = tenants.project("Acme")
    answer = raw(client, "!stream-none", stream=True)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["message"]["content"] == "stub: !stream-none"
    assert usage(tenants) == (1, 7, 3)


def test_client_that_leaves_ends_the_exchange_and_pays_for_what_it_saw(online, stub):
    tenants = online()
    _, _, client = tenants.project("Acme")
    stream = ask(client, "!stream-slow 2000 10", stream=True)
    seen = [next(stream).choices[0].delta.content for _ in range(3)]
    assert seen == ["0 ", "1 ", "2 "]
    stream.close()
    wait_for(lambda: stub.ask("/streams")["left"] == 1, what="the end of the stream")
    found = wait_for(lambda: usage(tenants)[0] and usage(tenants), what="the usage")
    assert found[0] == 1 and found[1] > 0 and 3 <= found[2] < 1000
    # The same for an answer without a stream, whose input the provider has read.
    with pytest.raises(openai.APITimeoutError):
        ask(client, "!delay 20000", timeout=0.5)
    found = wait_for(lambda: usage(tenants)[0] == 2 and usage(tenants), what="the usage")
    assert found[2] < 1000
    # No place at the provider is lost.
    _, _, other = tenants.project("Globex")
    assert ask(other, "hi").choices


def test_secret_is_redacted_across_the_events_of_a_stream(online, tmp_path):
    path = tmp_path / "key.secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    tenants = online(f'[credentials]\napi_key = "file:{path}"\n')
    _, _, client = tenants.project("Acme")
    text = "".join(
        chunk.choices[0].delta.content for chunk in ask(client, "!stream-key", stream=True)
    )
    assert "[redacted]" in text and text.startswith("Bearer ")
    assert SECRET[4:] not in text and "456789" not in text


def test_request_that_breaks_a_rule_is_refused_before_it_is_sent(online, stub):
    tenants = online()
    project, account, client = tenants.project("Acme")
    assert error(raw(client, model="unknown")) == (404, "model_not_found")
    assert error(raw(client, model=7)) == (400, "invalid_request")
    answer = raw(client, messages="text")
    assert answer.json()["error"]["param"] == "messages"
    assert error(raw(client, stream=1)) == (400, "invalid_type")
    answer = raw(client, messages=[{"role": "robot", "content": "x"}])
    assert answer.status_code == 400 and "Unknown message role" in answer.text
    headers = {"authorization": f"Bearer {client.api_key}"}
    url = f"{tenants.server.url}/v1/chat/completions"
    for body in (b"[]", b"{", b'{"model":"m"},"x":{}', b'{"model":"m","model":"n"}', b"\xff"):
        kind = {"content-type": "application/json"}
        answer = httpx2.post(url, content=body, headers={**headers, **kind})
        assert answer.status_code == 400, body
    assert httpx2.post(url, content=b"{}", headers=headers).status_code == 415
    assert stub.counts() == {}
    # A rule for models holds, whatever the name in the request.
    request(
        tenants.server,
        f"/v1/organization/projects/{project.id}/model_permissions",
        tenants.key,
        "POST",
        body={"mode": "allow_list", "model_ids": ["n"]},
    )
    assert error(raw(client)) == (404, "model_not_found")
    assert raw(client, model="n").status_code == 200


def test_key_needs_the_scope_and_its_project_must_not_be_archived(online):
    tenants = online()
    project, account, client = tenants.project("Acme")
    path = f"/v1/organization/projects/{project.id}/service_accounts/{account.id}/api_keys"
    _, key = request(tenants.server, path, tenants.key, "POST", body={"scopes": ["api.batch.read"]})
    reader = tenants.client(key["value"])
    assert error_of(lambda: ask(reader))[1]["code"] == "missing_scope"
    assert error_of(lambda: ask(tenants.client("wrong")))[0] == 401
    assert error_of(lambda: ask(tenants.client(tenants.key)))[1]["code"] == "project_key_required"
    tenants.admin.projects.archive(project.id)
    assert error_of(lambda: ask(client)) == (
        403,
        {
            "message": error_of(lambda: ask(client))[1]["message"],
            "type": "invalid_request_error",
            "param": None,
            "code": "project_archived",
        },
    )


def test_limits_answer_429_with_a_code_each_and_the_headers_of_the_sdks(online):
    prices = '[[prices]]\nmodel = "m"\ninput = 1000\noutput = 1000\nfrom = 2020-01-01\n'
    tenants = online(config=prices)
    project, _, client = tenants.project("Acme")
    limits = tenants.admin.projects.rate_limits
    limits.update_rate_limit("rl-m", project_id=project.id, max_requests_per_1_minute=2)
    first = raw(client)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert raw(client).status_code == 200
    third = raw(client)
    assert error(third) == (429, "requests_per_minute_limit_exceeded")
    assert 1 <= int(third.headers["retry-after"]) <= 61
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    # A limit of tokens counts streams too, and another model is free.
    limits.update_rate_limit("rl-n", project_id=project.id, max_tokens_per_1_minute=15)
    assert list(ask(client, model="n", stream=True))
    second = raw(client, model="n")
    assert error(second) == (429, "tokens_per_minute_limit_exceeded")
    assert second.json()["error"]["type"] == "tokens"
    # Two requests have cost two cents.
    tenants.admin.projects.spend_limit.update(
        project.id, currency="USD", interval="month", threshold_amount=2
    )
    spent = raw(client)
    assert error(spent) == (429, "billing_hard_limit_reached")
    assert spent.headers["x-should-retry"] == "false"


def test_parallel_requests_never_exceed_a_limit(online):
    tenants = online()
    project, _, client = tenants.project("Acme")
    limits = tenants.admin.projects.rate_limits
    limits.update_rate_limit("rl-m", project_id=project.id, max_requests_per_1_minute=5)
    with concurrent.futures.ThreadPoolExecutor(25) as pool:
        statuses = list(pool.map(lambda _: raw(client).status_code, range(50)))
    assert sorted(statuses) == [200] * 5 + [429] * 45
    assert usage(tenants)[0] == 5


def test_limit_of_requests_in_flight_holds_and_its_places_come_back(online, stub):
    tenants = online(config='[online]\nonline_queue_timeout = "1s"\n')
    project, _, client = tenants.project("Acme")
    path = f"/v1/organization/projects/{project.id}/limits"
    request(tenants.server, path, tenants.key, "POST", body={"max_requests_in_flight": 2})
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: raw(client, "!delay 3000"), range(3)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert [error(answer) for answer in refused] == [(429, "requests_in_flight_limit_exceeded")]
    # Clients that leave give their places back.
    for _ in range(4):
        with pytest.raises(openai.APITimeoutError):
            ask(client, "!delay 20000", timeout=0.3)
    assert wait_for(lambda: raw(client).status_code == 200, what="a free place")


def test_outage_answers_503_at_once_and_ends_by_itself(online, stub):
    config = '[execution]\noutage_backoff = "3s"\nmax_outage_backoff = "3s"\nmax_outage = "1s"\n'
    tenants = online(config=config)
    _, _, client = tenants.project("Acme")
    stub.ask("/mode?status=500")
    answers = [raw(client, f"outage {number}") for number in range(7)]
    assert answers[0].status_code == 500 and error(answers[-1]) == (503, "provider_unavailable")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert sum(stub.counts().values()) < 7, "an open breaker sends nothing"
    stub.ask("/mode?latency=0")
    wait_for(lambda: raw(client, "again").status_code == 200, what="the end of the outage")
    # A credential of the operator that is refused is not the client's fault.
    stub.ask("/mode?status=401")
    assert error(raw(client, "unauthorized")) == (503, "provider_unavailable")


def test_failure_that_may_have_been_charged_is_not_retried(online, stub):
    tenants = online()
    _, _, client = tenants.project("Acme")
    for prompt in ("!html", "!close"):
        answer = raw(client, prompt)
        assert answer.status_code == 502, answer.text
        assert answer.headers["x-should-retry"] == "false"
    answer = raw(client, "!fail 429 1 7")
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert raw(client, "!status 418").status_code == 418
    # The SDK retries with the same key, and the provider receives the same key.
    retrying = openai.OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=2)
    assert ask(retrying, "!fail 503 1 0", extra_headers={"Idempotency-Key": "k1"}).choices
    first, second = stub.ask("/keys")["!fail 503 1 0"]
    assert first == second
    for _ in range(2):
        raw(client, "keyed", headers={"idempotency-key": "k1"})
    _, _, other = tenants.project("Globex")
    raw(other, "keyed", headers={"idempotency-key": "k1"})
    keys = stub.ask("/keys")["keyed"]
    assert keys[0] == keys[1] != keys[2]


def test_model_without_streams_says_so(online):
    echo = 'component = "inference-echo.wasm"\nmodels = ["echo"]\n'
    tenants = online(echo=echo)
    _, _, client = tenants.project("Acme")
    assert ask(client, model="echo").choices
    assert error(raw(client, model="echo", stream=True)) == (400, "streaming_unsupported")
    assert raw(client, model="echo", stream=False).status_code == 200


def test_usage_that_a_client_has_seen_survives_a_kill(online):
    tenants = online()
    _, _, client = tenants.project("Acme")
    for number in range(5):
        ask(client, f"{number}")
    list(ask(client, "streamed", stream=True))
    tenants.server.kill()
    tenants.server.start()
    tenants.admin = openai.OpenAI(
        base_url=tenants.server.url + "/v1", api_key="none", admin_api_key=tenants.key
    ).admin.organization
    assert usage(tenants) == (6, 42, 18)


def test_stream_at_the_end_of_the_server_is_counted(online):
    tenants = online(config='[execution]\nshutdown_grace = "1s"\n')
    _, _, client = tenants.project("Acme")
    stream = ask(client, "!stream-slow 5000 10", stream=True)
    assert next(stream).choices
    with pytest.raises(openai.APIError, match="shutting down"):
        # The server ends while the stream goes on.
        tenants.server.child.terminate()
        list(stream)
    assert tenants.server.child.wait(timeout=30) == 0
    tenants.server.start()
    tenants.admin = openai.OpenAI(
        base_url=tenants.server.url + "/v1", api_key="none", admin_api_key=tenants.key
    ).admin.organization
    requests, given, output = usage(tenants)
    assert requests == 1 and given > 0 and output > 0


def test_rate_of_the_operator_is_waited_for_a_moment_alone(online, stub):
    tenants = online(
        "[limits]\nrequests_per_minute = 2\n", '[online]\nonline_queue_timeout = "1s"\n'
    )
    _, _, client = tenants.project("Acme")
    assert raw(client).status_code == 200
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: raw(client, "late"), range(4)))
    assert {error(answer) for answer in answers} == {(503, "server_overloaded")}
    assert "late" not in stub.counts() and usage(tenants)[0] == 1


def test_plugin_is_tried_without_keys_on_loopback(server):
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    status, answer = request(server, "/v1/chat/completions", method="POST", body=body)
    assert status == 200 and answer["choices"]
    status, answer = request(server, "/v1/openai/v1/chat/completions", method="POST", body=body)
    assert status == 200 and answer["choices"]


@pytest.mark.quiet
def test_online_requests_never_wait_behind_a_batch_and_the_batch_goes_on(online, stub):
    tenants = online("[limits]\nmax_in_flight = 4\n")
    _, _, client = tenants.project("Acme")
    _, _, other = tenants.project("Globex")
    stub.ask("/mode?latency=500")
    lines = [chat(str(number), f"line {number}", model="m") for number in range(2000)]
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_for(lambda: len(stub.counts()) > 20, what="lines of the batch")
    times = []
    for number in range(10):
        begun = time.monotonic()
        ask(client if number % 2 else other, f"online {number}")
        times.append(time.monotonic() - begun)
    # At most the rest of one request is waited for; then a place stays free.
    assert max(times) < 1.6 and sorted(times)[5] < 0.9, times
    before = client.batches.retrieve(batch.id).request_counts.completed
    # Online requests without a pause do not starve the batch.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda number: ask(other, f"flood {number}"), range(100))
        assert all(answer.choices for answer in answers)
    done = client.batches.retrieve(batch.id).request_counts.completed - before
    assert done >= 5, done
    client.batches.cancel(batch.id)
    assert json.dumps(times)
