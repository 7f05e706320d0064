"""The OpenAI adapter against a provider that speaks HTTP, and what the host does around it."""

import sqlite3

from conftest import Stub, chat, wait_for

FAST = ["--retry-backoff", "10ms", "--max-attempts", "4", "--outage-backoff", "50ms", "--max-outage", "2s"]


def ask(server, *prompts, **body):
    """Each prompt's result line, output or error."""
    batch = server.run([chat(str(number), prompt, model="m", **body) for number, prompt in enumerate(prompts)])
    assert batch.status == "completed"
    output, errors = server.results(batch)
    lines = {int(line["custom_id"]): line for line in output + errors}
    assert sorted(lines) == list(range(len(prompts)))
    return [lines[number] for number in sorted(lines)]


def said(line):
    return line["response"]["body"]["choices"][0]["message"]["content"]


def test_answers_come_back_with_their_usage(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    batch = server.run([chat(str(number), f"question {number}", model="m") for number in range(300)])
    output, _ = server.results(batch)
    assert [said(line) for line in output] == [f"stub: question {number}" for number in range(300)]
    assert batch.usage.input_tokens == 2100 and batch.usage.input_tokens_details.cached_tokens == 600
    assert batch.usage.output_tokens == 900 and batch.usage.output_tokens_details.reasoning_tokens == 300
    assert set(stub.counts().values()) == {1}


def test_what_is_worth_it_is_tried_again_and_the_rest_is_not(serve, stub):
    server = serve(*FAST, plugins={"p": stub.plugin(["m"])})
    busy, limited, broken, refused, poor, page = ask(
        server, "!fail 503 2", "!fail 429 1 0", "!status 500", "!status 404", "!quota", "!html"
    )
    assert said(busy) == "stub: !fail 503 2" and said(limited) == "stub: !fail 429 1 0"
    assert broken["response"]["status_code"] == 500
    assert refused["response"]["status_code"] == 404 and refused["response"]["body"]["error"]["code"] == "ordered"
    assert poor["response"]["status_code"] == 429
    assert page["response"] is None and page["error"]["code"] == "invalid_provider_response"
    counts = stub.counts()
    assert counts == {
        "!fail 503 2": 3, "!fail 429 1 0": 2, "!status 500": 4, "!status 404": 1, "!quota": 2, "!html": 4
    }


def test_an_answer_on_many_lines_becomes_one(serve, stub):
    (line,) = ask(serve(plugins={"p": stub.plugin(["m"])}), "!pretty")
    assert said(line) == "stub: !pretty"


def test_unknown_fields_and_aliases_reach_the_provider(serve, stub):
    text = stub.plugin([]).replace("models = []", 'models = []\n[aliases]\nm = "llama"')
    (line,) = ask(serve(plugins={"p": text}), "hello", brand_new={"a": [1, None]})
    assert line["response"]["body"]["model"] == "llama"


def test_the_host_adds_the_credential_and_it_shows_nowhere(serve, stub):
    secret = "sk-very-secret-0123456789"
    server = serve(
        env={"PROVIDER_KEY": secret, "BATCHWRIGHT_LOG_FILTER": "debug"},
        plugins={"p": stub.plugin(["m"], '[credentials]\napi_key = "env:PROVIDER_KEY"\n')},
    )
    (line,) = ask(server, "!headers")
    assert '"authorization":"Bearer [redacted]"' in said(line)
    assert '"user-agent":"batchwright/' in said(line)
    server.stop()
    for file in [server.log, *server.data.rglob("*")]:
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


def test_a_provider_that_is_not_there_is_told_of(serve, stub):
    text = stub.plugin(["m"])
    server = serve(*FAST, plugins={"p": text})
    stub.kill()
    (line,) = ask(server, "hello")
    assert line["response"] is None and line["error"]["code"] == "provider_unreachable"


def test_a_cut_connection_a_redirect_and_a_huge_answer_are_contained(serve, stub):
    server = serve(*FAST, plugins={"p": stub.plugin(["m"], '[limits]\nmax_response = "64KiB"\n')})
    cut, elsewhere, huge, fine = ask(server, "!close", "!redirect http://169.254.169.254/", "!big 100000", "hello")
    assert cut["error"]["code"] == "provider_unreachable"
    assert elsewhere["response"]["status_code"] == 307
    assert "169.254.169.254" in elsewhere["response"]["body"]["error"]["message"]
    assert huge["error"]["code"] == "provider_answer_too_large" and "max_response" in huge["error"]["message"]
    assert said(fine) == "stub: hello"


def test_a_name_that_leads_to_a_metadata_address_is_refused(serve, stub):
    # What the operator wrote is the address; in any notation it counts as what it is.
    server = serve(*FAST, plugins={"p": stub.plugin(["m"]).replace("127.0.0.1", "localhost")})
    (line,) = ask(server, "hello")
    assert said(line) == "stub: hello"
    metadata = stub.plugin(["n"]).replace("127.0.0.1", "0xa9fea9fe.nip.invalid")
    server.add_plugin("q", metadata)
    wait_for(lambda: "n" in server.models(), what="the model n")
    batch = server.run([chat("a", model="n")])
    _, (line,) = server.results(batch)
    assert line["error"]["code"] == "provider_unreachable"


def test_a_stuck_provider_does_not_hold_up_the_batches_of_another(serve, stub, tmp_path):
    other = Stub(tmp_path, "other")
    settings = ["--max-concurrent-batches", "1", "--memory-budget", "8MiB", "--stop-grace", "50ms"]
    server = serve(*settings, plugins={"stuck": stub.plugin(["s"]), "fine": other.plugin(["f"])})
    try:
        large = "x" * 5000
        stuck = [
            server.create([chat(str(number), f"!delay 600000 {number} {large}", model="s") for number in range(300)])
            for _ in range(3)
        ]
        wait_for(lambda: len(stub.counts()) >= 25, what="the provider to be stuck")
        batch = server.run([chat(str(number), f"{number} {large}", model="f") for number in range(300)])
        assert batch.request_counts.completed == 300
        # What waits for its turn is ended all the same.
        assert server.client.batches.retrieve(stuck[2].id).status == "in_progress"
        assert server.client.batches.cancel(stuck[2].id).status == "cancelling"
        ended = server.ended(stuck[2].id, 10)
        assert ended.status == "cancelled"
        output, errors = server.results(ended)
        assert output == [] and [line["custom_id"] for line in errors] == [str(number) for number in range(300)]
    finally:
        other.kill()


def test_fewer_requests_are_sent_while_a_provider_answers_429_and_more_again_after(serve, stub):
    server = serve("--retry-backoff", "20ms", plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 32\n")})
    stub.ask("/load?4")
    batch = server.run([chat(str(number), f"!delay 10 {number}", model="m") for number in range(500)])
    assert batch.request_counts.completed == 500
    load = stub.ask("/load?1000")
    # Thirty-two at once would have most requests refused, many times each.
    assert load["most"] == 4 and 0 < load["refused"] < 250, load
    batch = server.run([chat(str(number), f"!delay 10 {number} again", model="m") for number in range(1500)])
    assert batch.request_counts.completed == 1500
    load = stub.ask("/load")
    assert load["refused"] == 0 and load["most"] >= 30, load


def test_a_killed_server_goes_on_where_it_stopped_and_asks_nothing_twice(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 8\n")})
    prompts = [f"!delay 10 {number}" for number in range(600)]
    batch = server.create([chat(str(number), prompt, model="m") for number, prompt in enumerate(prompts)])

    def some_done():
        return server.client.batches.retrieve(batch.id).request_counts.completed > 100

    wait_for(some_done, what="some progress")
    server.kill()
    seen = sum(stub.counts().values())
    assert seen < 600, "the test came too late"
    server.start()
    batch = server.ended(batch.id)
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == [str(number) for number in range(600)] and errors == []
    assert [said(line) for line in output] == [f"stub: {prompt}" for prompt in prompts]
    counts = stub.counts()
    assert max(counts.values()) <= 2
    # Sent again are those in flight at the kill, and those answered whose commit the kill came before.
    assert sum(count == 2 for count in counts.values()) < 300
    assert batch.request_counts.completed == 600 and batch.usage.input_tokens == 4200


def test_a_batch_that_expires_keeps_what_is_done_even_if_its_finalizing_is_cut_short(serve, stub):
    settings = ["--completion-windows", "24h,2s", "--stop-grace", "100ms"]
    server = serve(*settings, plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 4\n")})
    file = server.upload([chat(str(number), f"!delay 20 {number}", model="m") for number in range(1000)])
    create = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "2s"}
    batch = server.client.batches.create(**create)
    wait_for(lambda: server.client.batches.retrieve(batch.id).request_counts.completed > 10, what="some progress")
    # The output file cannot be written as long as a folder stands in its place, so finalizing fails until the kill.
    objects = server.data / "objects/default/files"
    before = set(objects.iterdir())
    blocked = objects.rename(objects.with_name("away"))
    objects.write_text("in the way")
    wait_for(lambda: server.client.batches.retrieve(batch.id).status == "finalizing", what="finalizing")
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


def test_cancel_keeps_what_is_done_and_every_id_is_in_one_file(serve, stub):
    server = serve("--stop-grace", "1s", plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 4\n")})
    prompts = [f"!delay 20 {number}" for number in range(300)]
    batch = server.create([chat(str(number), prompt, model="m") for number, prompt in enumerate(prompts)])
    wait_for(lambda: server.client.batches.retrieve(batch.id).request_counts.completed > 10, what="some progress")
    assert server.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = server.ended(batch.id)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.cancelling_at
    output, errors = server.results(batch)
    assert sorted(int(line["custom_id"]) for line in output + errors) == list(range(300))
    assert len(output) == batch.request_counts.completed > 10
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert batch.request_counts.failed == 0
    # What the files hold, the database need not.
    rows = lambda: sqlite3.connect(server.data / "batchwright.db").execute("SELECT count(*) FROM results").fetchone()  # noqa: E731
    wait_for(lambda: rows() == (0,), what="an empty table of results")
