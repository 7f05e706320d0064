"""OpenAI adapter against an HTTP provider: retries, credentials, rate limits, kills, cancels."""

import sqlite3

from conftest import Stub, chat, wait_for

FAST = [
    "--retry-backoff",
    "10ms",
    "--max-attempts",
    "4",
    "--outage-backoff",
    "50ms",
    "--max-outage",
    "2s",
]


def run_prompts(server, *prompts, **body):
    """Returns the result line of each prompt, from the output or error file."""
    batch = server.run(
        [chat(str(number), prompt, model="m", **body) for number, prompt in enumerate(prompts)]
    )
    assert batch.status == "completed"
    output, errors = server.results(batch)
    lines = {int(line["custom_id"]): line for line in output + errors}
    assert sorted(lines) == list(range(len(prompts)))
    return [lines[number] for number in sorted(lines)]


def content_of(line):
    return line["response"]["body"]["choices"][0]["message"]["content"]


def test_responses_are_recorded_with_usage(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    batch = server.run(
        [chat(str(number), f"question {number}", model="m") for number in range(300)]
    )
    output, _ = server.results(batch)
    assert [content_of(line) for line in output] == [
        f"stub: question {number}" for number in range(300)
    ]
    assert (
        batch.usage.input_tokens == 2100 and batch.usage.input_tokens_details.cached_tokens == 600
    )
    assert (
        batch.usage.output_tokens == 900
        and batch.usage.output_tokens_details.reasoning_tokens == 300
    )
    assert set(stub.counts().values()) == {1}


def test_retries_cover_transient_errors_only(serve, stub):
    server = serve(*FAST, plugins={"p": stub.plugin(["m"])})
    busy, limited, broken, refused, poor, page = run_prompts(
        server, "!fail 503 2", "!fail 429 1 0", "!status 500", "!status 404", "!quota", "!html"
    )
    assert content_of(busy) == "stub: !fail 503 2" and content_of(limited) == "stub: !fail 429 1 0"
    assert broken["response"]["status_code"] == 500
    assert (
        refused["response"]["status_code"] == 404
        and refused["response"]["body"]["error"]["code"] == "ordered"
    )
    assert poor["response"]["status_code"] == 429
    assert page["response"] is None and page["error"]["code"] == "invalid_provider_response"
    counts = stub.counts()
    assert counts == {
        "!fail 503 2": 3,
        "!fail 429 1 0": 2,
        "!status 500": 4,
        "!status 404": 1,
        "!quota": 2,
        "!html": 4,
    }


def test_multiline_response_becomes_one_line(serve, stub):
    (line,) = run_prompts(serve(plugins={"p": stub.plugin(["m"])}), "!pretty")
    assert content_of(line) == "stub: !pretty"


def test_unknown_fields_and_aliases_reach_the_provider(serve, stub):
    text = stub.plugin([]).replace("models = []", 'models = []\n[aliases]\nm = "llama"')
    (line,) = run_prompts(serve(plugins={"p": text}), "hello", brand_new={"a": [1, None]})
    assert line["response"]["body"]["model"] == "llama"


def test_credential_is_added_by_the_host_and_redacted(serve, stub):
    secret = "sk-very-secret-0123456789"
    server = serve(
        env={"PROVIDER_KEY": secret, "BATCHWRIGHT_LOG_FILTER": "debug"},
        plugins={"p": stub.plugin(["m"], '[credentials]\napi_key = "env:PROVIDER_KEY"\n')},
    )
    (line,) = run_prompts(server, "!headers")
    assert '"authorization":"Bearer [redacted]"' in content_of(line)
    assert '"user-agent":"batchwright/' in content_of(line)
    server.stop()
    for file in [server.log, *server.data.rglob("*")]:
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


def test_unreachable_provider_is_reported(serve, stub):
    text = stub.plugin(["m"])
    server = serve(*FAST, plugins={"p": text})
    stub.kill()
    (line,) = run_prompts(server, "hello")
    assert line["response"] is None and line["error"]["code"] == "provider_unreachable"


def test_cut_connection_redirect_and_huge_response_are_contained(serve, stub):
    server = serve(
        *FAST, plugins={"p": stub.plugin(["m"], '[limits]\nmax_response_body = "64KiB"\n')}
    )
    cut, elsewhere, huge, fine = run_prompts(
        server, "!close", "!redirect http://169.254.169.254/", "!big 100000", "hello"
    )
    assert cut["error"]["code"] == "provider_unreachable"
    assert elsewhere["response"]["status_code"] == 307
    assert "169.254.169.254" in elsewhere["response"]["body"]["error"]["message"]
    assert (
        huge["error"]["code"] == "provider_answer_too_large"
        and "max_response" in huge["error"]["message"]
    )
    assert content_of(fine) == "stub: hello"


def test_name_resolving_to_a_metadata_address_is_refused(serve, stub):
    # The host checks the resolved address, not the notation in the plugin file.
    server = serve(*FAST, plugins={"p": stub.plugin(["m"]).replace("127.0.0.1", "localhost")})
    (line,) = run_prompts(server, "hello")
    assert content_of(line) == "stub: hello"
    metadata = stub.plugin(["n"]).replace("127.0.0.1", "0xa9fea9fe.nip.invalid")
    server.add_plugin("q", metadata)
    wait_for(lambda: "n" in server.models(), what="the model n")
    batch = server.run([chat("a", model="n")])
    _, (line,) = server.results(batch)
    assert line["error"]["code"] == "provider_unreachable"


def test_stuck_provider_delays_no_batch_of_another(serve, stub, tmp_path):
    other = Stub(tmp_path, "other")
    settings = ["--max-concurrent-batches", "1", "--memory-budget", "8MiB", "--stop-grace", "50ms"]
    server = serve(*settings, plugins={"stuck": stub.plugin(["s"]), "fine": other.plugin(["f"])})
    try:
        large = "x" * 5000
        stuck = [
            server.create(
                [
                    chat(str(number), f"!delay 600000 {number} {large}", model="s")
                    for number in range(300)
                ]
            )
            for _ in range(3)
        ]
        wait_for(lambda: len(stub.counts()) >= 25, what="the provider to be stuck")
        batch = server.run(
            [chat(str(number), f"{number} {large}", model="f") for number in range(300)]
        )
        assert batch.request_counts.completed == 300
        # A batch that waits for a slot can still be cancelled.
        assert server.client.batches.retrieve(stuck[2].id).status == "in_progress"
        assert server.client.batches.cancel(stuck[2].id).status == "cancelling"
        ended = server.ended(stuck[2].id, 10)
        assert ended.status == "cancelled"
        output, errors = server.results(ended)
        assert output == [] and [line["custom_id"] for line in errors] == [
            str(number) for number in range(300)
        ]
    finally:
        other.kill()


def test_concurrency_adapts_to_429_responses(serve, stub):
    server = serve(
        "--retry-backoff",
        "20ms",
        plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 32\n")},
    )
    stub.ask("/load?4")
    batch = server.run(
        [chat(str(number), f"!delay 10 {number}", model="m") for number in range(500)]
    )
    assert batch.request_counts.completed == 500
    load = stub.ask("/load?1000")
    # A fixed concurrency of 32 would cause many more refusals.
    assert load["most"] == 4 and 0 < load["refused"] < 250, load
    batch = server.run(
        [chat(str(number), f"!delay 10 {number} again", model="m") for number in range(1500)]
    )
    assert batch.request_counts.completed == 1500
    load = stub.ask("/load")
    assert load["refused"] == 0 and load["most"] >= 30, load


def test_killed_server_resumes_and_repeats_only_requests_in_flight(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 8\n")})
    prompts = [f"!delay 10 {number}" for number in range(600)]
    batch = server.create(
        [chat(str(number), prompt, model="m") for number, prompt in enumerate(prompts)]
    )

    def some_done():
        return server.client.batches.retrieve(batch.id).request_counts.completed > 100

    wait_for(some_done, what="some progress")
    server.kill()
    seen = sum(stub.counts().values())
    assert seen < 600, "all requests were sent before the kill"
    server.start()
    batch = server.ended(batch.id)
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == [
        str(number) for number in range(600)
    ] and errors == []
    assert [content_of(line) for line in output] == [f"stub: {prompt}" for prompt in prompts]
    counts = stub.counts()
    assert max(counts.values()) <= 2
    # Only requests in flight, or answered and not yet committed, are sent again.
    assert sum(count == 2 for count in counts.values()) < 300
    assert batch.request_counts.completed == 600 and batch.usage.input_tokens == 4200


def test_expired_batch_keeps_results_after_interrupted_finalizing(serve, stub):
    settings = ["--completion-windows", "24h,2s", "--stop-grace", "100ms"]
    server = serve(*settings, plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 4\n")})
    file = server.upload(
        [chat(str(number), f"!delay 20 {number}", model="m") for number in range(1000)]
    )
    create = {
        "input_file_id": file.id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "2s",
    }
    batch = server.client.batches.create(**create)
    wait_for(
        lambda: server.client.batches.retrieve(batch.id).request_counts.completed > 10,
        what="some progress",
    )
    # A plain file replaces the folder of the objects, so finalizing fails until the kill.
    objects = server.data / "objects/default/files"
    before = set(objects.iterdir())
    blocked = objects.rename(objects.with_name("away"))
    objects.write_text("in the way")
    wait_for(
        lambda: server.client.batches.retrieve(batch.id).status == "finalizing", what="finalizing"
    )
    server.kill()
    objects.unlink()
    blocked.rename(objects)
    assert before <= set(objects.iterdir())
    server.start()
    batch = server.ended(batch.id)
    assert batch.status == "expired" and batch.expired_at and batch.completed_at is None
    output, errors = server.results(batch)
    assert sorted(int(line["custom_id"]) for line in output + errors) == list(range(1000))
    assert len(output) == batch.request_counts.completed > 10
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}


def test_cancelled_batch_keeps_results_and_lists_every_id_once(serve, stub):
    server = serve(
        "--stop-grace", "1s", plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 4\n")}
    )
    prompts = [f"!delay 20 {number}" for number in range(300)]
    batch = server.create(
        [chat(str(number), prompt, model="m") for number, prompt in enumerate(prompts)]
    )
    wait_for(
        lambda: server.client.batches.retrieve(batch.id).request_counts.completed > 10,
        what="some progress",
    )
    assert server.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = server.ended(batch.id)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.cancelling_at
    output, errors = server.results(batch)
    assert sorted(int(line["custom_id"]) for line in output + errors) == list(range(300))
    assert len(output) == batch.request_counts.completed > 10
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert batch.request_counts.failed == 0
    # Results in the files are deleted from the database.
    rows = lambda: (
        sqlite3.connect(server.data / "batchwright.db")
        .execute("SELECT count(*) FROM results")
        .fetchone()
    )  # noqa: E731
    wait_for(lambda: rows() == (0,), what="an empty results table")
