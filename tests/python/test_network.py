"""Networks that fail between server and provider: no line is lost, no answer is paid for twice.

Attacks: DNS and TLS errors, hung requests, responses cut at every byte.
"""

import json
import re
import socket
import ssl
import subprocess
import threading
import time

from conftest import ROOT, chat, wait_for
from outages import SHORT_BACKOFFS, assert_all_answered, lines, wait_state


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
