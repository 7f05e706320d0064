"""Providers as they are: away, refusing, slow, odd. A batch ends well whenever its provider could have served it, and nothing is paid for
twice."""

import json
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.request

import pytest
from conftest import CHAT, HOST, ROOT, Stub, chat, jsonl, run_host, wait_for

# An outage of minutes in seconds.
QUICK = ["--outage-backoff", "50ms", "--max-outage-backoff", "400ms", "--retry-backoff", "20ms", "--stop-grace", "50ms"]


def lines(number, model="m", begin="q"):
    return [chat(str(line), f"{begin} {line}", model=model) for line in range(number)]


def done(server, batch):
    counts = server.client.batches.retrieve(batch.id).request_counts
    return counts.completed + counts.failed


def waiting(server, batch):
    with urllib.request.urlopen(f"{server.url}/v1/batches/{batch.id}/plugins") as answer:
        return json.load(answer)["waiting"]


def health(server):
    with urllib.request.urlopen(f"{server.url}/health/ready") as answer:
        return json.load(answer)


def warnings(server):
    return [line for line in server.logged().splitlines() if re.search(r" WARN .*breaker (opened|closed)", line)]


def everything_answered(server, batch, number):
    ended = server.ended(batch.id, 120)
    counts = ended.request_counts
    assert (ended.status, counts.completed, counts.failed) == ("completed", number, 0), counts
    output, _ = server.results(ended)
    assert [line["custom_id"] for line in output] == [str(line) for line in range(number)]


def restarted(stub, tmp_path):
    """The provider at its old address."""
    return Stub(tmp_path, "again", port=int(stub.url.rsplit(":", 1)[1]))


def test_an_outage_costs_no_line_and_everybody_sees_it(serve, stub, tmp_path):
    server = serve(*QUICK, "--admin-listen", "127.0.0.1:0", plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 8\n")})
    stub.ask("/mode?latency=20")
    batch = server.create(lines(400))
    wait_for(lambda: done(server, batch) > 40, what="some answers")
    stub.kill()
    # Longer than all attempts of a line would take.
    refused = lambda: "refused" in ((waiting(server, batch) or {}).get("message") or "")  # noqa: E731
    wait_for(refused, what="the batch to wait")
    waits = waiting(server, batch)
    assert "127.0.0.1" not in waits["message"], waits
    assert health(server)["status"] == "degraded"
    client_view = json.load(urllib.request.urlopen(f"{server.url}/v1/plugins"))["data"]
    assert next(plugin for plugin in client_view if plugin["name"] == "p")["waiting"]["message"] == waits["message"]
    watching = subprocess.Popen(
        [HOST, "batch", "--url", server.url, "watch", batch.id], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(4)
    stuck_at = done(server, batch)
    time.sleep(1)
    assert done(server, batch) == stuck_at
    admin = re.search(r"health on (\S+)", server.said()).group(1)
    listed = run_host("plugin", "list", "--server", admin).stdout
    assert re.search(r"^p +adapter .* waiting ", listed, re.M) and "127.0.0.1" in listed, listed
    assert re.search(rf"{400 - stuck_at} requests wait", listed), listed
    again = restarted(stub, tmp_path)
    try:
        everything_answered(server, batch, 400)
        assert health(server)["status"] == "ok" and waiting(server, batch) is None
        _, said = watching.communicate(timeout=30)
        assert re.search(r"^waiting: .*refused.*, (next attempt in \d+ s|retrying now)", said, re.M), said
        # A request may have been on its way when the provider died; none was sent twice to the one that came back.
        assert set(again.counts().values()) == {1}
        told = warnings(server)
        assert len(told) <= 4 and batch.id in told[0] and 'plugin="p"' in told[0], told
        assert "breaker closed" in told[-1] and "Connecting to 127.0.0.1" in told[-1], told
    finally:
        again.kill()


def test_a_key_that_is_revoked_and_replaced_costs_no_line(serve, stub, tmp_path):
    (tmp_path / "key").write_text("old\n")
    stub.ask("/mode?key=old&latency=10")
    text = stub.plugin(["m"], f'[credentials]\napi_key = "file:{tmp_path}/key"\n[limits]\nconcurrency = 8\n')
    server = serve(*QUICK, plugins={"p": text})
    batch = server.create(lines(300))
    wait_for(lambda: done(server, batch) > 30, what="some answers")
    stub.ask("/mode?key=new&latency=10")
    waits = wait_for(lambda: waiting(server, batch), what="the batch to wait")
    assert "credential" in waits["message"] and "401" in waits["message"]
    time.sleep(2)
    refused = sum(stub.counts().values())
    time.sleep(1)
    # Probes, one at a time.
    assert sum(stub.counts().values()) - refused < 12
    (tmp_path / "key").write_text("new\n")
    server.add_plugin("p", text + "# changed\n")
    everything_answered(server, batch, 300)


@pytest.mark.parametrize("status", [402, 403, 503])
def test_a_provider_that_refuses_everything_for_a_while_costs_no_line(serve, stub, status):
    server = serve(*QUICK, "--max-attempts", "3", plugins={"p": stub.plugin(["m"])})
    stub.ask(f"/mode?status={status}")
    batch = server.create(lines(100))
    wait_for(lambda: waiting(server, batch), what="the batch to wait")
    time.sleep(2)
    stub.ask("/mode?")
    everything_answered(server, batch, 100)


def test_a_line_that_is_refused_while_others_pass_fails_alone(serve, stub):
    server = serve(*QUICK, plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 4\n")})
    stub.ask("/mode?latency=5")
    flagged = [chat(f"flagged {number}", f"!status {status}", model="m") for number, status in enumerate([403, 401])]
    many = lines(200)
    batch = server.run(flagged[:1] + many[:100] + flagged[1:] + many[100:] + [chat("last", "the last one", model="m")])
    assert (batch.request_counts.completed, batch.request_counts.failed) == (201, 2)
    _, errors = server.results(batch)
    assert [line["response"]["status_code"] for line in errors] == [403, 401]
    assert not [line for line in warnings(server) if "breaker opened" in line]
    # Alone, with nobody to compare it with.
    batch = server.run([chat("alone", "!status 403 again", model="m")])
    assert batch.request_counts.failed == 1
    # What concerns one model is no outage of the others.
    batch = server.run([chat("gone", "!status 404", model="m"), *lines(20)])
    assert (batch.request_counts.completed, batch.request_counts.failed) == (20, 1)


def test_a_plugin_that_is_turned_off_paused_or_gone_is_waited_for(serve, stub):
    text = stub.plugin(["m"], "[limits]\nconcurrency = 4\n")
    server = serve(*QUICK, plugins={"p": text})
    stub.ask("/mode?latency=10")
    ways = {
        "any more": (lambda: server.add_plugin("p", "enabled = false\n" + text), lambda: server.add_plugin("p", text)),
        "paused": (
            lambda: run_host("plugin", "pause", "p", "--plugins", server.plugins),
            lambda: run_host("plugin", "resume", "p", "--plugins", server.plugins),
        ),
        "any more ": (lambda: (server.plugins / "p.toml").unlink(), lambda: server.add_plugin("p", text)),
    }
    for number, (said, (stop, go_on)) in enumerate(ways.items()):
        batch = server.create(lines(600, begin=f"way {number}"))
        wait_for(lambda: done(server, batch) > 10, what="some answers")  # noqa: B023
        stop()
        waits = wait_for(lambda: waiting(server, batch), what="the batch to wait")  # noqa: B023
        assert said.strip() in waits["message"], waits
        before = sum(stub.counts().values())
        time.sleep(1)
        # No more than were on their way: what waited for its place is not sent.
        assert sum(stub.counts().values()) - before <= 8
        go_on()
        everything_answered(server, batch, 600)
    assert set(stub.counts().values()) == {1}
    # The rest of the file is as its author wrote it.
    run_host("plugin", "pause", "p", "--plugins", server.plugins)
    assert (server.plugins / "p.toml").read_text().replace("paused = true\n", "") == text
    assert " paused " in run_host("plugin", "list", "--plugins", server.plugins).stdout
    wrong = run_host("plugin", "pause", "nobody", "--plugins", server.plugins)
    assert wrong.returncode == 2 and "no plugin `nobody`" in wrong.stderr


def test_a_model_that_is_gone_is_its_own_batchs_affair(serve, stub):
    limits = "[limits]\nconcurrency = 4\n"
    server = serve(*QUICK, plugins={"p": stub.plugin(["m", "x"], limits)})
    stub.ask("/mode?latency=20")
    gone = server.create(lines(600, model="x", begin="x"))
    wait_for(lambda: done(server, gone) > 10, what="some answers")
    server.add_plugin("p", stub.plugin(["m"], limits))
    waits = wait_for(lambda: waiting(server, gone), what="the batch to wait")
    assert "No plugin serves the model 'x'" in waits["message"]
    other = server.create(lines(300))
    wait_for(lambda: done(server, other) > 10, what="some answers")
    assert waiting(server, other) is None
    everything_answered(server, other, 300)
    server.add_plugin("p", stub.plugin(["m", "x"], limits))
    everything_answered(server, gone, 600)
    assert set(stub.counts().values()) == {1}


def test_a_name_that_resolves_later_costs_no_line(serve, stub, tmp_path):
    library = tmp_path / "resolve.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/resolver/resolve.c", "-ldl"], check=True)
    known = tmp_path / "known"
    env = {"LD_PRELOAD": str(library), "TEST_HOSTS": "provider.test=127.0.0.9,provider.test=127.0.0.1", "TEST_HOSTS_FILE": str(known)}
    port = stub.url.rsplit(":", 1)[1]
    text = stub.plugin(["m"]).replace("127.0.0.1", "provider.test")
    text = text.replace("[settings]", f'allow = ["127.0.0.1:{port}"]\n[settings]')
    server = serve(*QUICK, env=env, plugins={"p": text})
    batch = server.create(lines(100))
    waits = wait_for(lambda: waiting(server, batch), what="the batch to wait")
    assert "name cannot be resolved" in waits["message"] and "provider.test" not in waits["message"]
    time.sleep(1)
    known.touch()
    # Nobody listens at the first of its two addresses.
    everything_answered(server, batch, 100)


class Provider(threading.Thread):
    """A provider that answers each connection on a thread of its own, as `serve` says."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()


class Tls(Provider):
    """A provider that speaks TLS, with a certificate that can be changed."""

    def __init__(self, folder):
        self.folder = folder
        for name, config in [("good", "subjectAltName=IP:127.0.0.1"), ("bad", "subjectAltName=DNS:other.test")]:
            subprocess.run(
                ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
                 "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-subj", f"/CN={name}", "-addext", config,
                 "-addext", "basicConstraints=critical,CA:FALSE"],
                check=True, capture_output=True,
            )  # fmt: skip
        (folder / "roots.pem").write_text((folder / "good.pem").read_text() + (folder / "bad.pem").read_text())
        self.certificate = "bad"
        self.answered = 0
        super().__init__()

    def serve(self, connection):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{self.certificate}.pem", self.folder / f"{self.certificate}.key")
        body = b'{"object":"chat.completion","choices":[]}'
        try:
            with context.wrap_socket(connection, server_side=True) as stream:
                while head := stream.recv(65536):
                    if b"\r\n\r\n" in head:
                        self.answered += 1
                        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        except OSError:
            pass


def test_a_certificate_that_is_wrong_and_repaired_costs_no_line(serve, tmp_path):
    provider = Tls(tmp_path)
    text = f'component = "inference-openai.wasm"\nmodels = ["m"]\n[settings]\nbase_url = "https://127.0.0.1:{provider.port}/v1"\n'
    server = serve(*QUICK, env={"SSL_CERT_FILE": str(tmp_path / "roots.pem")}, plugins={"p": text})
    batch = server.create(lines(50))
    waits = wait_for(lambda: waiting(server, batch), what="the batch to wait")
    assert "certificate is for another name" in waits["message"], waits
    time.sleep(1)
    assert provider.answered == 0
    provider.certificate = "good"
    everything_answered(server, batch, 50)
    assert provider.answered == 50


@pytest.mark.parametrize("mode", ["random=1", "random=5", "random=10", "random=20", "rate=300", "window=150/2", "rate=300&retry-after=1"])
def test_refusals_cost_no_line_and_no_attempt(serve, stub, mode):
    server = serve("--max-attempts", "1", "--max-retry-time", "1ms", plugins={"p": stub.plugin(["m"])})
    stub.ask(f"/mode?latency=20-40&{mode}")
    batch = server.create(lines(600))
    everything_answered(server, batch, 600)
    sent = stub.counts()
    print(f"{mode}: {sum(sent.values()) - 600} refusals of 600 requests")


def test_an_exchange_that_hangs_costs_no_line(serve, stub):
    server = serve(*QUICK, plugins={"p": stub.plugin(["m"], '[limits]\nfirst_byte_timeout = "500ms"\n')})
    stub.ask("/mode?latency=5-10&hang=50")
    batch = server.create(lines(500))
    everything_answered(server, batch, 500)
    # One in fifty was sent again, with the same key: the provider may have worked on it.
    again = {prompt: number for prompt, number in stub.counts().items() if number > 1}
    assert 0 < len(again) <= 20 and max(again.values()) <= 3, again
    assert all(len(set(keys)) == 1 for keys in stub.ask("/keys").values())


def test_a_request_without_an_answer_is_sent_a_few_times_and_one_with_an_error_more_often(serve, stub):
    limits = '[limits]\nfirst_byte_timeout = "200ms"\n'
    server = serve(*QUICK, "--max-attempts", "5", plugins={"p": stub.plugin(["m"], limits)})
    batch = server.run([chat("silent", "!delay 5000", model="m"), chat("broken", "!status 500", model="m")])
    assert batch.request_counts.failed == 2
    assert stub.counts() == {"!delay 5000": 3, "!status 500": 5}
    keys = stub.ask("/keys")
    (silent,) = set(keys["!delay 5000"])
    broken = keys["!status 500"]
    assert broken == [broken[0], *[f"{broken[0]}-{attempt}" for attempt in range(2, 6)]]
    assert silent.startswith("batch_req_") and silent != broken[0]


class Cut(Provider):
    """A provider that cuts its first answer to each request after so many bytes as its prompt says."""

    BODY = json.dumps({"object": "chat.completion", "choices": [{"message": {"role": "assistant", "content": "well"}}]}).encode()
    WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)

    def __init__(self):
        self.seen = {}
        super().__init__()

    def serve(self, connection):
        with connection:
            data = b""
            while piece := connection.recv(65536):
                data += piece
                asked = re.search(rb"cut at (\d+)", data)
                if asked and data.endswith(b"}"):
                    place, data = int(asked.group(1)), b""
                    self.seen[place] = self.seen.get(place, 0) + 1
                    if self.seen[place] == 1:
                        connection.sendall(self.WHOLE[:place])
                        return
                    connection.sendall(self.WHOLE)


def test_an_answer_cut_at_any_byte_costs_no_line(serve):
    provider = Cut()
    text = f'component = "inference-openai.wasm"\nmodels = ["m"]\n[settings]\nbase_url = "http://127.0.0.1:{provider.port}/v1"\n'
    # Every request fails at first, so that this is one outage after the other.
    server = serve("--outage-backoff", "5ms", "--max-outage-backoff", "10ms", "--retry-backoff", "20ms", plugins={"p": text})
    places = len(provider.WHOLE)
    batch = server.create([chat(str(place), f"cut at {place}", model="m") for place in range(places)])
    everything_answered(server, batch, places)
    assert set(provider.seen.values()) <= {2, 3}, provider.seen


def test_a_job_at_the_provider_is_asked_about_after_a_kill_and_not_begun_again(serve, stub):
    server = serve("--outage-backoff", "50ms", plugins={"p": stub.plugin(["m"])})
    prompts = [f"job {number}" for number in range(20)]
    jobs = [
        {"custom_id": prompt, "method": "POST", "url": "/v1/responses", "body": {"model": "m", "input": prompt, "background": True}}
        for prompt in prompts
    ]
    batch = server.create(jobs, endpoint="/v1/responses")
    for wait in [1, 4, 6]:
        wait_for(lambda: len(stub.counts()) == 20, what="all jobs to be begun")
        time.sleep(wait)
        server.kill()
        server.start()
    # A refused question is asked again; the job goes on.
    stub.ask("/mode?status=503")
    time.sleep(6)
    stub.ask("/mode?")
    ended = server.ended(batch.id, 90)
    assert ended.request_counts.completed == 20
    assert stub.counts() == dict.fromkeys(prompts, 1)
    output, _ = server.results(ended)
    assert {line["response"]["body"]["status"] for line in output} == {"completed"}


def test_a_batch_whose_window_ends_during_an_outage_says_what_it_waited_for(serve, stub):
    server = serve(*QUICK, "--completion-windows", "24h,4s", plugins={"p": stub.plugin(["m"])})
    stub.ask("/mode?status=401")
    file = server.upload(lines(30))
    batch = server.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="4s")
    ended = server.ended(batch.id, 30)
    assert ended.status == "expired" and (ended.request_counts.completed, ended.request_counts.failed) == (0, 0)
    _, errors = server.results(ended)
    assert len(errors) == 30
    assert all(line["error"]["code"] == "batch_expired" and "credential" in line["error"]["message"] for line in errors), errors[0]


def test_the_operator_bounds_how_long_lines_wait(serve, stub):
    server = serve(*QUICK, "--max-outage", "1s", plugins={"p": stub.plugin(["m"])})
    stub.ask("/mode?status=401")
    ended = server.run(lines(200))
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == ("completed", 0, 200)
    _, errors = server.results(ended)
    assert {line["response"]["status_code"] for line in errors} == {401}
    assert sum(stub.counts().values()) < 100


def test_a_run_stops_when_its_provider_is_away_and_goes_on_later(serve, stub, tmp_path):
    plugins = serve(plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 4\n")}).plugins
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines(200)))
    command = ["run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--plugins", plugins, "--outage-backoff", "50ms"]
    stub.ask("/mode?status=401")
    stopped = run_host(*command, "--max-outage", "2s")
    assert stopped.returncode == 6, stopped.stderr
    assert "has not answered for 2s" in stopped.stderr and "credential" in stopped.stderr and "the same command continues" in stopped.stderr
    assert re.search(r"^waiting: The provider does not accept the operator's credential.*next attempt in|retrying now", stopped.stderr, re.M)
    stub.ask("/mode?")
    finished = run_host(*command)
    assert finished.returncode == 0 and "continuing an unfinished run" in finished.stderr, finished.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 200
