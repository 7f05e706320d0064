"""Unavailable, refusing, slow and faulty providers: no line is lost, no answer is paid for twice.

Attacks: outages, revoked keys, rate limits, hung requests, DNS and TLS errors, responses cut at
every byte, plugins and models removed while a batch runs.
"""

import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request

import pytest
from conftest import CHAT, HOST, ROOT, Stub, built, chat, jsonl, run_host, wait_for

# Settings that shorten an outage of minutes to seconds.
SHORT_BACKOFFS = [
    "--outage-backoff",
    "50ms",
    "--max-outage-backoff",
    "400ms",
    "--retry-backoff",
    "20ms",
    "--stop-grace",
    "50ms",
]


def lines(number, model="m", begin="q"):
    return [chat(str(line), f"{begin} {line}", model=model) for line in range(number)]


def done(server, batch):
    counts = server.client.batches.retrieve(batch.id).request_counts
    return counts.completed + counts.failed


def wait_state(server, batch):
    with urllib.request.urlopen(f"{server.url}/v1/batches/{batch.id}/plugins") as answer:
        return json.load(answer)["waiting"]


def health(server):
    with urllib.request.urlopen(f"{server.url}/health/ready") as answer:
        return json.load(answer)


def warnings(server):
    return [
        line
        for line in server.logged().splitlines()
        if re.search(r" WARN .*breaker (opened|closed)", line)
    ]


def assert_all_answered(server, batch, number):
    ended = server.ended(batch.id, 120)
    counts = ended.request_counts
    assert (ended.status, counts.completed, counts.failed) == ("completed", number, 0), counts
    output, _ = server.results(ended)
    assert [line["custom_id"] for line in output] == [str(line) for line in range(number)]


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
    admin = re.search(r"health on (\S+)", server.read_line()).group(1)
    listed = run_host("plugin", "list", "--server", admin).stdout
    assert re.search(r"^p +adapter .* waiting ", listed, re.M) and "127.0.0.1" in listed, listed
    assert re.search(rf"{400 - stuck_at} requests wait", listed), listed
    again = restarted(stub, tmp_path)
    try:
        assert_all_answered(server, batch, 400)
        assert health(server)["status"] == "ok" and wait_state(server, batch) is None
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


def test_dns_failure_loses_no_line(serve, stub, tmp_path):
    library = tmp_path / "resolve.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/resolver/resolve.c", "-ldl"],
        check=True,
    )
    known = tmp_path / "known"
    env = {
        "LD_PRELOAD": str(library),
        "TEST_HOSTS": "provider.test=127.0.0.9,provider.test=127.0.0.1",
        "TEST_HOSTS_FILE": str(known),
    }
    port = stub.url.rsplit(":", 1)[1]
    text = stub.plugin(["m"]).replace("127.0.0.1", "provider.test")
    text = text.replace("[settings]", f'allow = ["127.0.0.1:{port}"]\n[settings]')
    server = serve(*SHORT_BACKOFFS, env=env, plugins={"p": text})
    batch = server.create(lines(100))
    waits = wait_for(lambda: wait_state(server, batch), what="the batch to report an outage")
    assert "name cannot be resolved" in waits["message"] and "provider.test" not in waits["message"]
    time.sleep(1)
    known.touch()
    # The first of its two addresses refuses connections.
    assert_all_answered(server, batch, 100)


class Provider(threading.Thread):
    """Provider that handles each connection with `serve` on a thread."""

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
    """TLS provider with a replaceable certificate."""

    def __init__(self, folder):
        self.folder = folder
        for name, config in [
            ("good", "subjectAltName=IP:127.0.0.1"),
            ("bad", "subjectAltName=DNS:other.test"),
        ]:
            subprocess.run(
                [
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:prime256v1",
                    "-nodes",
                    "-days",
                    "2",
                    "-keyout",
                    folder / f"{name}.key",
                    "-out",
                    folder / f"{name}.pem",
                    "-subj",
                    f"/CN={name}",
                    "-addext",
                    config,
                    "-addext",
                    "basicConstraints=critical,CA:FALSE",
                ],
                check=True,
                capture_output=True,
            )
        (folder / "roots.pem").write_text(
            (folder / "good.pem").read_text() + (folder / "bad.pem").read_text()
        )
        self.certificate = "bad"
        self.answered = 0
        super().__init__()

    def serve(self, connection):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            self.folder / f"{self.certificate}.pem", self.folder / f"{self.certificate}.key"
        )
        body = b'{"object":"chat.completion","choices":[]}'
        try:
            with context.wrap_socket(connection, server_side=True) as stream:
                while head := stream.recv(65536):
                    if b"\r\n\r\n" in head:
                        self.answered += 1
                        stream.sendall(
                            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
                        )
        except OSError:
            pass


def test_tls_certificate_error_loses_no_line(serve, tmp_path):
    provider = Tls(tmp_path)
    text = (
        'component = "inference-openai.wasm"\nmodels = ["m"]\n'
        f'[settings]\nbase_url = "https://127.0.0.1:{provider.port}/v1"\n'
    )
    server = serve(
        *SHORT_BACKOFFS, env={"SSL_CERT_FILE": str(tmp_path / "roots.pem")}, plugins={"p": text}
    )
    batch = server.create(lines(50))
    waits = wait_for(lambda: wait_state(server, batch), what="the batch to report an outage")
    assert "certificate is for another name" in waits["message"], waits
    time.sleep(1)
    assert provider.answered == 0
    provider.certificate = "good"
    assert_all_answered(server, batch, 50)
    assert provider.answered == 50


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


def test_hung_requests_lose_no_line(serve, stub):
    server = serve(
        *SHORT_BACKOFFS,
        plugins={"p": stub.plugin(["m"], '[limits]\nfirst_byte_timeout = "500ms"\n')},
    )
    stub.ask("/mode?latency=5-10&hang=50")
    batch = server.create(lines(500))
    assert_all_answered(server, batch, 500)
    # One request in fifty was retried, with the same key: the provider may have processed it.
    again = {prompt: number for prompt, number in stub.counts().items() if number > 1}
    assert 0 < len(again) <= 20 and max(again.values()) <= 3, again
    assert all(len(set(keys)) == 1 for keys in stub.ask("/keys").values())


def test_timeouts_are_retried_less_often_than_server_errors(serve, stub):
    limits = '[limits]\nfirst_byte_timeout = "200ms"\n'
    server = serve(
        *SHORT_BACKOFFS, "--max-attempts", "5", plugins={"p": stub.plugin(["m"], limits)}
    )
    batch = server.run(
        [chat("silent", "!delay 5000", model="m"), chat("broken", "!status 500", model="m")]
    )
    assert batch.request_counts.failed == 2
    assert stub.counts() == {"!delay 5000": 3, "!status 500": 5}
    keys = stub.ask("/keys")
    (silent,) = set(keys["!delay 5000"])
    broken = keys["!status 500"]
    assert broken == [broken[0], *[f"{broken[0]}-{attempt}" for attempt in range(2, 6)]]
    assert silent.startswith("batch_req_") and silent != broken[0]


class Cut(Provider):
    """Provider that cuts its first response to each prompt at the byte that the prompt names."""

    BODY = json.dumps(
        {
            "object": "chat.completion",
            "choices": [{"message": {"role": "assistant", "content": "well"}}],
        }
    ).encode()
    WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(BODY),
        BODY,
    )

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


def test_response_cut_at_any_byte_loses_no_line(serve):
    provider = Cut()
    text = (
        'component = "inference-openai.wasm"\nmodels = ["m"]\n'
        f'[settings]\nbase_url = "http://127.0.0.1:{provider.port}/v1"\n'
    )
    # Every request fails at first, which causes one outage after the other.
    server = serve(
        "--outage-backoff",
        "5ms",
        "--max-outage-backoff",
        "10ms",
        "--retry-backoff",
        "20ms",
        plugins={"p": text},
    )
    places = len(provider.WHOLE)
    batch = server.create(
        [chat(str(place), f"cut at {place}", model="m") for place in range(places)]
    )
    assert_all_answered(server, batch, places)
    assert set(provider.seen.values()) <= {2, 3}, provider.seen


def test_provider_job_is_polled_after_a_kill_and_not_created_again(serve, stub):
    server = serve("--outage-backoff", "50ms", plugins={"p": stub.plugin(["m"])})
    prompts = [f"job {number}" for number in range(20)]
    jobs = [
        {
            "custom_id": prompt,
            "method": "POST",
            "url": "/v1/responses",
            "body": {"model": "m", "input": prompt, "background": True},
        }
        for prompt in prompts
    ]
    batch = server.create(jobs, endpoint="/v1/responses")
    for wait in [1, 4, 6]:
        wait_for(lambda: len(stub.counts()) == 20, what="all jobs to be created")
        time.sleep(wait)
        server.kill()
        server.start()
    # A refused poll is repeated; the job continues.
    stub.ask("/mode?status=503")
    time.sleep(6)
    stub.ask("/mode?")
    ended = server.ended(batch.id, 90)
    assert ended.request_counts.completed == 20
    assert stub.counts() == dict.fromkeys(prompts, 1)
    output, _ = server.results(ended)
    assert {line["response"]["body"]["status"] for line in output} == {"completed"}


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


def test_job_is_not_submitted_again_after_a_refused_poll(serve):
    submitted, polled = [], []

    class Provider(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            submitted.append(self.path)
            self.answer(200, b"{}")

        def do_GET(self):
            polled.append(self.path)
            # The key is refused until both jobs were polled and the breaker is open.
            status = 401 if len(polled) <= 4 else 200
            self.answer(status, b"{}")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider) as provider:
        threading.Thread(target=provider.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{provider.server_port}"
        server = serve(*SHORT_BACKOFFS, plugins={})
        shutil.copy(built("hostile") / "hostile.wasm", server.plugins)
        server.add_plugin(
            "jobs", f'component = "hostile.wasm"\nmodels = ["jobs"]\nallow = ["{url[7:]}"]\n'
        )
        wait_for(lambda: "jobs" in server.models(), what="the plugin")
        batch = server.run([chat(f"job {url}/{job}", model="jobs") for job in range(2)])
        provider.shutdown()
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 0)
    assert sorted(submitted) == ["/0", "/1"] and len(polled) > 4
