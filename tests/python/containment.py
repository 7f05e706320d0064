"""Fixtures of the tests with a hostile plugin: its server, its provider, a batch beside it.

`run_cases` runs one attack per request, and `assert_contained` compares how each ended.
"""

import base64
import contextlib
import http.server
import json
import pathlib
import shutil
import time
import urllib.parse

import pytest
from conftest import CONTAINED, built, chat, http_server, wait_for


@pytest.fixture
def provider():
    """Starts a hostile provider over real HTTP; the path names the attack."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            kind, _, argument = urllib.parse.unquote(self.path[1:]).partition("?")
            with contextlib.suppress(OSError):
                getattr(self, kind.replace("-", "_"))(argument)

        do_GET = do_POST

        def answer(self, body, status=200, **headers):
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def stream(self, _):
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            while True:
                self.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")

        def drip(self, _):
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            while True:
                self.wfile.write(b"x")
                time.sleep(0.02)

        def headers_without_end(self, _):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"x-a: " + b"x" * 1000 + b"\r\n")

        def silence(self, _):
            time.sleep(60)

        def nonsense(self, _):
            self.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")
            self.close_connection = True

        def encoded(self, _):
            self.answer(b"\x1f\x8b...", content_encoding="gzip")

        def redirect(self, to):
            self.answer(b"", 302, location=to)

        def echo(self, _):
            key = self.headers["authorization"] or "none"
            secret = key.removeprefix("Bearer ")
            body = {
                "headers": dict(self.headers),
                "url": urllib.parse.quote(key),
                "base64": base64.b64encode(f"u:{secret}".encode()).decode(),
                "slashes": "SLASHES",
            }
            text = json.dumps(body).replace("SLASHES", secret.replace("/", "\\/"))
            self.answer(
                text.encode(),
                x_echo=key,
                x_again=base64.urlsafe_b64encode(secret.encode()).decode(),
            )

        def log_message(self, *_):
            pass

    with http_server(Handler) as server:
        yield server


@pytest.fixture
def bystander(stub):
    """Runs another batch at the same time: each line must be answered, each prompt sent once."""

    @contextlib.contextmanager
    def beside(server):
        prompts = [f"!delay 20 {number}" for number in range(5000)]
        batch = server.create(
            [chat(str(number), prompt, model="m") for number, prompt in enumerate(prompts)]
        )
        yield
        ended = server.ended(batch.id)
        output, errors = server.results(ended)
        assert errors == [] and [line["custom_id"] for line in output] == [
            str(number) for number in range(5000)
        ]
        assert all(line["response"]["status_code"] == 200 for line in output)
        counts = stub.counts()
        assert set(counts.values()) == {1} and len(counts) == 5000

    return beside


@pytest.fixture
def hostile(serve, stub, provider):
    def start(more="", env=None, arguments=(), allow=()):
        hosts = [stub.url[7:], provider.url[7:], "*.example.com", "*.example.com:80", *allow]
        text = (
            f'component = "hostile.wasm"\nmodels = ["hostile"]\nallow = {json.dumps(hosts)}\n{more}'
        )
        server = serve(
            "--retry-backoff",
            "10ms",
            "--max-attempts",
            "2",
            *arguments,
            plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 32\n")},
            env=env,
        )
        shutil.copy(built("hostile") / "hostile.wasm", server.plugins / "hostile.wasm")
        server.add_plugin("hostile", text)
        wait_for(lambda: "hostile" in server.models(), what="the plugin")
        return server

    return start


def run_cases(server, cases, model="hostile"):
    """Runs one request per case; returns the batch and each error or response body as text."""
    batch = server.run([chat(order, model=model) for order in cases])
    assert batch.status == "completed", batch.errors
    output, errors = server.results(batch)
    ends = {line["custom_id"]: json.dumps(line["response"]["body"]) for line in output}
    for line in errors:
        ends[line["custom_id"]] = f"{line['error']['code']}: {line['error']['message']}"
    assert list(ends.keys()) and len(ends) == len(cases)
    return batch, ends


def assert_contained(ends, cases):
    for order, parts in cases.items():
        for part in parts:
            assert part in ends[order], f"{order}: {ends[order]}"
        CONTAINED.append((order, ends[order]))


def compilers_of(server):
    """Returns the running compiler processes of a server."""
    compilers = [
        path
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
        if b"compile-component" in read(path)
    ]
    return [
        path
        for path in compilers
        if f"\nPPid:\t{server.child.pid}\n".encode() in read(path.with_name("status"))
    ]


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""
