"""Unavailable and refusing providers: no line is lost, no answer is paid for twice.

Attacks: outages, revoked keys, rate limits, plugins and models removed while a batch runs.
"""

import json
import re
import subprocess
import time
import urllib.request

import pytest
from conftest import CHAT, HOST, Stub, chat, jsonl, run_host, wait_for
from outages import SHORT_BACKOFFS, assert_all_answered, lines, wait_state

pytestmark = pytest.mark.quiet


def done(server, batch):
    counts = server.client.batches.retrieve(batch.id).request_counts
    return counts.completed + counts.failed


def health(server):
    with urllib.request.urlopen(f"{server.url}/health/ready") as answer:
        return json.load(answer)


def metric(admin, name):
    """Returns the value of a metric of the plugin `p`."""
    with urllib.request.urlopen(f"{admin}/metrics") as answer:
        text = answer.read().decode()
    return float(re.search(rf'^{name}{{plugin="p"}} (\S+)$', text, re.M).group(1))


def warnings(server):
    return [
        line
        for line in server.logged().splitlines()
        if re.search(r" WARN .*breaker (opened|closed)", line)
    ]


def restarted(stub, tmp_path):
    """Restarts the provider at its old address."""
    return Stub(tmp_path, "again", port=int(stub.url.rsplit(":", 1)[1]))


def test_outage_loses_no_line_and_is_reported_everywhere(serve, stub, tmp_path):
    server = serve(
        *SHORT_BACKOFFS,
        "--admin-listen",
        "127.0.0.1:0",
        plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 8\n")},
    )
    stub.ask("/mode?latency=20")
    batch = server.create(lines(400))
    wait_for(lambda: done(server, batch) > 40, what="some results")
    stub.kill()
    # The outage outlasts all attempts of a line.

    def refused():
        return "refused" in ((wait_state(server, batch) or {}).get("message") or "")

    wait_for(refused, what="the batch to report an outage")
    waits = wait_state(server, batch)
    assert "127.0.0.1" not in waits["message"], waits
    assert health(server)["status"] == "degraded"
    client_view = json.load(urllib.request.urlopen(f"{server.url}/v1/plugins"))["data"]
    assert (
        next(plugin for plugin in client_view if plugin["name"] == "p")["waiting"]["message"]
        == waits["message"]
    )
    watching = subprocess.Popen(
        [HOST, "batch", "--url", server.url, "watch", batch.id],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(4)
    stuck_at = done(server, batch)
    time.sleep(1)
    assert done(server, batch) == stuck_at
    admin = re.search(r"health and metrics on (\S+)", server.read_line()).group(1)
    assert metric(admin, "batchwright_provider_outages") == 1
    waiting = metric(admin, "batchwright_provider_outage_waiting_requests")
    assert waiting == 400 - stuck_at
    listed = run_host("plugin", "list", "--server", admin).stdout
    assert re.search(r"^p +adapter .* waiting ", listed, re.M) and "127.0.0.1" in listed, listed
    assert re.search(rf"{400 - stuck_at} requests wait", listed), listed
    again = restarted(stub, tmp_path)
    try:
        assert_all_answered(server, batch, 400)
        assert health(server)["status"] == "ok" and wait_state(server, batch) is None
        assert metric(admin, "batchwright_provider_outages") == 0
        assert metric(admin, "batchwright_provider_outage_waiting_requests") == 0
        _, watched = watching.communicate(timeout=30)
        assert re.search(
            r"^waiting: .*refused.*, (next attempt in \d+ s|retrying now)", watched, re.M
        ), watched
        # Requests in flight at the kill are sent again, but only once to the restarted provider.
        assert set(again.counts().values()) == {1}
        logged = warnings(server)
        assert len(logged) <= 4 and batch.id in logged[0] and 'plugin="p"' in logged[0], logged
        assert "breaker closed" in logged[-1] and "Connecting to 127.0.0.1" in logged[-1], logged
    finally:
        again.kill()


def test_revoked_key_loses_no_line_after_replacement(serve, stub, tmp_path):
    (tmp_path / "key").write_text("old\n")
    stub.ask("/mode?key=old&latency=10")
    text = stub.plugin(
        ["m"], f'[credentials]\napi_key = "file:{tmp_path}/key"\n[limits]\nmax_in_flight = 8\n'
    )
    server = serve(*SHORT_BACKOFFS, plugins={"p": text})
    batch = server.create(lines(300))
    wait_for(lambda: done(server, batch) > 30, what="some results")
    stub.ask("/mode?key=new&latency=10")
    waits = wait_for(lambda: wait_state(server, batch), what="the batch to report an outage")
    assert "credential" in waits["message"] and "401" in waits["message"]
    time.sleep(2)
    refused = sum(stub.counts().values())
    time.sleep(1)
    # Only half-open probes are sent, one at a time.
    assert sum(stub.counts().values()) - refused < 12
    (tmp_path / "key").write_text("new\n")
    server.add_plugin("p", text + "# changed\n")
    assert_all_answered(server, batch, 300)


@pytest.mark.parametrize("status", [402, 403, 503])
def test_provider_refusing_everything_loses_no_line(serve, stub, status):
    server = serve(*SHORT_BACKOFFS, "--max-attempts", "3", plugins={"p": stub.plugin(["m"])})
    stub.ask(f"/mode?status={status}")
    batch = server.create(lines(100))
    wait_for(lambda: wait_state(server, batch), what="the batch to report an outage")
    time.sleep(2)
    stub.ask("/mode?")
    assert_all_answered(server, batch, 100)


def test_refused_line_fails_alone_while_others_pass(serve, stub):
    server = serve(
        *SHORT_BACKOFFS, plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 4\n")}
    )
    stub.ask("/mode?latency=5")
    flagged = [
        chat(f"flagged {number}", f"!status {status}", model="m")
        for number, status in enumerate([403, 401])
    ]
    many = lines(200)
    batch = server.run(
        flagged[:1]
        + many[:100]
        + flagged[1:]
        + many[100:]
        + [chat("last", "the last one", model="m")]
    )
    assert (batch.request_counts.completed, batch.request_counts.failed) == (201, 2)
    _, errors = server.results(batch)
    assert [line["response"]["status_code"] for line in errors] == [403, 401]
    assert not [line for line in warnings(server) if "breaker opened" in line]
    # A single request, without others to compare it with.
    batch = server.run([chat("alone", "!status 403 again", model="m")])
    assert batch.request_counts.failed == 1
    # An error of one model is no outage of the other models.
    batch = server.run([chat("gone", "!status 404", model="m"), *lines(20)])
    assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 1)


def test_disabled_paused_or_removed_plugin_is_waited_for(serve, stub):
    text = stub.plugin(["m"], "[limits]\nmax_in_flight = 4\n")
    server = serve(*SHORT_BACKOFFS, plugins={"p": text})
    stub.ask("/mode?latency=10")
    ways = {
        "any more": (
            lambda: server.add_plugin("p", "enabled = false\n" + text),
            lambda: server.add_plugin("p", text),
        ),
        "paused": (
            lambda: run_host("plugin", "pause", "p", "--plugins", server.plugins),
            lambda: run_host("plugin", "resume", "p", "--plugins", server.plugins),
        ),
        "any more ": (
            lambda: (server.plugins / "p.toml").unlink(),
            lambda: server.add_plugin("p", text),
        ),
    }
    for number, (message, (stop, go_on)) in enumerate(ways.items()):
        batch = server.create(lines(600, begin=f"way {number}"))
        wait_for(lambda: done(server, batch) > 10, what="some results")  # noqa: B023
        stop()
        waits = wait_for(
            lambda: wait_state(server, batch),  # noqa: B023
            what="the batch to report an outage",
        )
        assert message.strip() in waits["message"], waits
        before = sum(stub.counts().values())
        time.sleep(1)
        # Only requests in flight arrive; waiting requests are not sent.
        assert sum(stub.counts().values()) - before <= 8
        go_on()
        assert_all_answered(server, batch, 600)
    assert set(stub.counts().values()) == {1}
    # The rest of the file keeps its author's text. The folder may come from the config file.
    config = server.folder / "config.toml"
    config.write_text(f'[plugins]\nplugins = "{server.plugins}"\n')
    run_host("plugin", "pause", "p", "--config", config)
    assert (server.plugins / "p.toml").read_text().replace("paused = true\n", "") == text
    assert " paused " in run_host("plugin", "list", "--plugins", server.plugins).stdout
    wrong = run_host("plugin", "pause", "nobody", "--plugins", server.plugins)
    assert wrong.returncode == 2 and "no plugin `nobody`" in wrong.stderr


def test_removed_model_delays_only_its_own_batch(serve, stub):
    limits = "[limits]\nmax_in_flight = 4\n"
    server = serve(*SHORT_BACKOFFS, plugins={"p": stub.plugin(["m", "x"], limits)})
    stub.ask("/mode?latency=20")
    gone = server.create(lines(600, model="x", begin="x"))
    wait_for(lambda: done(server, gone) > 10, what="some results")
    server.add_plugin("p", stub.plugin(["m"], limits))
    waits = wait_for(lambda: wait_state(server, gone), what="the batch to report an outage")
    assert "No plugin serves the model 'x'" in waits["message"]
    other = server.create(lines(300))
    wait_for(lambda: done(server, other) > 10, what="some results")
    assert wait_state(server, other) is None
    assert_all_answered(server, other, 300)
    server.add_plugin("p", stub.plugin(["m", "x"], limits))
    assert_all_answered(server, gone, 600)
    assert set(stub.counts().values()) == {1}


@pytest.mark.parametrize(
    "mode",
    [
        "random=1",
        "random=5",
        "random=10",
        "random=20",
        "rate=300",
        "window=150/2",
        "rate=300&retry-after=1",
    ],
)
def test_rate_limits_lose_no_line_and_use_no_attempt(serve, stub, mode):
    server = serve(
        "--max-attempts", "1", "--max-retry-time", "1ms", plugins={"p": stub.plugin(["m"])}
    )
    stub.ask(f"/mode?latency=20-40&{mode}")
    batch = server.create(lines(600))
    assert_all_answered(server, batch, 600)
    sent = stub.counts()
    print(f"{mode}: {sum(sent.values()) - 600} refusals of 600 requests")


def test_batch_expired_during_an_outage_names_the_cause(serve, stub):
    server = serve(
        *SHORT_BACKOFFS, "--completion-windows", "24h,4s", plugins={"p": stub.plugin(["m"])}
    )
    stub.ask("/mode?status=401")
    file = server.upload(lines(30))
    batch = server.client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="4s"
    )
    ended = server.ended(batch.id, 30)
    assert ended.status == "expired" and (
        ended.request_counts.completed,
        ended.request_counts.failed,
    ) == (0, 0)
    _, errors = server.results(ended)
    assert len(errors) == 30
    assert all(
        line["error"]["code"] == "batch_expired" and "credential" in line["error"]["message"]
        for line in errors
    ), errors[0]


def test_max_outage_limits_how_long_lines_wait(serve, stub):
    server = serve(*SHORT_BACKOFFS, "--max-outage", "1s", plugins={"p": stub.plugin(["m"])})
    stub.ask("/mode?status=401")
    ended = server.run(lines(200))
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == (
        "completed",
        0,
        200,
    )
    _, errors = server.results(ended)
    assert {line["response"]["status_code"] for line in errors} == {401}
    assert sum(stub.counts().values()) < 100


def test_run_stops_during_an_outage_and_resumes_later(serve, stub, tmp_path):
    plugins = serve(plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 4\n")}).plugins
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines(200)))
    command = [
        "run",
        tmp_path / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        "--plugins",
        plugins,
        "--outage-backoff",
        "50ms",
    ]
    stub.ask("/mode?status=401")
    stopped = run_host(*command, "--max-outage", "2s")
    assert stopped.returncode == 6, stopped.stderr
    assert (
        "has not answered for 2s" in stopped.stderr
        and "credential" in stopped.stderr
        and "the same command continues" in stopped.stderr
    )
    assert re.search(
        r"^waiting: The provider does not accept the operator's credential"
        r".*(next attempt in|retrying now)",
        stopped.stderr,
        re.M,
    )
    stub.ask("/mode?")
    finished = run_host(*command)
    assert finished.returncode == 0 and "continuing an unfinished run" in finished.stderr, (
        finished.stderr
    )
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 200
