"""Requests as real clients send them: SDKs of six languages, curl, browsers and HTTP/2 clients.

Attacks: cross-site web pages, DNS rebinding, decompression bombs, and clients that never read.
"""

import contextlib
import gzip
import http.client
import json
import pathlib
import re
import socket
import time
import urllib.parse
import zlib

import httpx2 as httpx
import openai
import pytest
from conftest import CHAT, chat, jsonl, wait_for

CLIENTS = pathlib.Path(__file__).parents[1] / "clients"
LINES = jsonl([chat("a"), chat("b")])
JSON = {"content-type": "application/json"}


def ask(server, method, path, body=None, headers=None):
    """Sends a request; returns status, headers and body of the response."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body=body, headers=headers or {})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def send_raw(server, request, expects_continue=False):
    """Sends raw bytes; holds the body back until `100 Continue` if the client expects it."""
    host, port = server.url.removeprefix("http://").split(":")
    head, body = request
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head)
        stream = connection.makefile("rb")
        if expects_continue:
            assert stream.readline().startswith(b"HTTP/1.1 100 "), "no 100 Continue"
            assert stream.readline() == b"\r\n"
        connection.sendall(body)
        status = int(stream.readline().split()[1])
        headers = http.client.parse_headers(stream)
        text = stream.read(int(headers["content-length"])) if "content-length" in headers else b""
    return status, text


def chunks(body, size=1000):
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_upload_of_every_client_keeps_name_and_lifetime(server):
    wrong = []
    for upload in json.loads((CLIENTS / "uploads.json").read_text()):
        body = upload["body"].encode("latin-1").replace(b"@@FILE@@", LINES)
        head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: {upload['content_type']}\r\n"
        head += "Expect: 100-continue\r\n" if upload["expect"] else ""
        head += (
            "Transfer-Encoding: chunked\r\n\r\n"
            if upload["chunked"]
            else f"Content-Length: {len(body)}\r\n\r\n"
        )
        sent = chunks(body) if upload["chunked"] else body
        status, text = send_raw(server, (head.encode("latin-1"), sent), upload["expect"])
        label = f"{upload['client']}, {upload['case']}: "
        if status != 200:
            wrong.append(f"{label}{status} {text}")
            continue
        file = json.loads(text)
        lifetime = file["expires_at"] - file["created_at"]
        expected = (
            upload["filename"] or "upload",
            upload["expires_after"] or 30 * 86_400,
            len(LINES),
        )
        if (file["filename"], lifetime, file["bytes"]) != expected:
            wrong.append(
                f"{label}{file['filename']!r}, {lifetime}, {file['bytes']}; expected {expected}"
            )
        elif server.client.files.content(file["id"]).content != LINES:
            wrong.append(f"{label}other bytes")
    assert not wrong, "\n".join(wrong)


def test_requests_of_every_client_are_accepted(server):
    file = server.upload(LINES)
    other = server.upload(LINES)
    for request in json.loads((CLIENTS / "requests.json").read_text()):
        batch = server.client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )
        body = request["body"].encode("latin-1").replace(b"file-1", file.id.encode())
        head = re.sub(r"/batches/\w+/cancel", f"/batches/{batch.id}/cancel", request["head"])
        head = head.replace("file-1", other.id)
        lines = head.split("\r\n")
        head = "\r\n".join(
            f"Content-Length: {len(body)}" if line.lower().startswith("content-length:") else line
            for line in lines
        )
        status, text = send_raw(server, (head.encode("latin-1"), body))
        # A batch of two lines may be complete before it is cancelled.
        allowed = {200, 409} if request["case"].startswith("cancel") else {200}
        if body and "application/x-www-form-urlencoded" in head.lower():
            allowed = {415}
        assert status in allowed, f"{request['client']}, {request['case']}: {status} {text}"


def test_multipart_ignores_unknown_parts_up_to_a_limit(server):
    def body(extra):
        parts = [("purpose", None, b"batch"), *extra, ("file", "a.jsonl", LINES)]
        for name, filename, content in parts:
            file_name = f'; filename="{filename}"' if filename else ""
            yield (
                f'--b\r\nContent-Disposition: form-data; name="{name}"{file_name}\r\n\r\n'.encode()
                + content
                + b"\r\n"
            )
        yield b"--b--\r\n"

    form = {"content-type": "multipart/form-data; boundary=b"}
    extra = [("model", None, b"x"), ("file2", "b.jsonl", b"y" * 100_000), ("", None, b"")]
    assert ask(server, "POST", "/v1/files", b"".join(body(extra)), form)[0] == 200
    status, _, text = ask(
        server, "POST", "/v1/files", b"".join(body([("more", "c", b"z" * (2 << 20))])), form
    )
    assert status == 413 and "1 MiB" in json.loads(text)["error"]["message"]


def test_urls_accept_extra_slashes_and_empty_parameters(server):
    batch = server.run([chat("a")])
    for path in [
        "/v1/batches/",
        "//v1//batches",
        f"/v1/batches/{batch.id}/",
        "/v1/batches?after=&limit=",
        "/v1/files?after=&limit=&order=&purpose=",
        "/v1/files/?order=asc&after",
        "/v1/openai/v1/models/",
        "/v1/models/echo/",
        "/health/ready/",
    ]:
        status, _, text = ask(server, "GET", path)
        assert status == 200, f"{path}: {status} {text}"


def test_head_answers_wherever_get_does(server):
    batch = server.run([chat("a")])
    for path in [
        "/v1/batches",
        f"/v1/batches/{batch.id}",
        f"/v1/batches/{batch.id}/plugins",
        "/v1/files",
        f"/v1/files/{batch.output_file_id}",
        f"/v1/files/{batch.output_file_id}/content",
        "/v1/models",
        "/v1/models/echo",
        "/v1/plugins",
        "/health/live",
        "/health/serving",
        "/health/ready",
        "/openapi.json",
    ]:
        status, headers, _ = ask(server, "GET", path)
        head_status, head_headers, text = ask(server, "HEAD", path)
        assert (status, head_status, text) == (200, 200, b""), path
        assert headers["content-type"] == head_headers["content-type"], path
        assert headers.get("content-length") == head_headers.get("content-length"), path
    status, headers, text = ask(server, "HEAD", "/v1/batches/batch_unknown")
    assert (status, text) == (404, b"") and "x-request-id" in headers


def test_request_bodies_may_be_compressed_and_are_limited_when_decompressed(server):
    file = server.upload(LINES)
    body = json.dumps(
        {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    ).encode()
    gzip_twice = gzip.compress(body[:10]) + gzip.compress(body[10:])
    for sent, encoding in [
        (b"\xef\xbb\xbf" + body, None),
        (gzip.compress(body), "gzip"),
        (gzip.compress(body), "x-gzip, identity"),
        (gzip_twice, "gzip"),
        (zlib.compress(body), "deflate"),
    ]:
        headers = {**JSON, **({"content-encoding": encoding} if encoding else {})}
        status, _, text = ask(server, "POST", "/v1/batches", sent, headers)
        assert status == 200, f"{encoding}: {status} {text}"
    bomb = gzip.compress(b" " * (1 << 30), 9)
    status, _, text = ask(server, "POST", "/v1/batches", bomb, {**JSON, "content-encoding": "gzip"})
    assert status == 413 and "128 KiB" in json.loads(text)["error"]["message"]
    for sent, encoding, expected in [
        (body, "gzip", 400),
        (gzip.compress(body)[:-9], "gzip", 400),
        (body, "br", 415),
    ]:
        status, _, text = ask(
            server, "POST", "/v1/batches", sent, {**JSON, "content-encoding": encoding}
        )
        assert status == expected and json.loads(text)["error"]["message"], (
            f"{encoding}: {status} {text}"
        )
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    form += (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + LINES
        + b"\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    status, _, text = ask(server, "POST", "/v1/files", gzip.compress(form), headers)
    assert status == 200 and json.loads(text)["bytes"] == len(LINES)


def test_cross_site_pages_cannot_write(server):
    file = server.upload(LINES)
    batch = server.run(LINES)
    body = json.dumps({"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"})
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    cancel = f"/v1/batches/{batch.id}/cancel"
    for kind in [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ]:
        for path in ["/v1/batches", cancel]:
            status, _, text = ask(server, "POST", path, body, kind)
            assert status == 415 and "application/json" in json.loads(text)["error"]["message"], (
                path
            )
    for foreign in [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ]:
        for method, path, sent, kind in [
            ("POST", "/v1/batches", body, JSON),
            ("POST", cancel, None, {}),
            ("POST", "/v1/files", form, multipart),
            ("DELETE", f"/v1/files/{file.id}", None, {}),
        ]:
            status, _, text = ask(server, method, path, sent, {**kind, **foreign})
            assert status == 403 and "cors_origins" in json.loads(text)["error"]["message"], path
    # DNS rebinding: to the browser, the page and this server have the same origin.
    for path in ["/v1/models", "/openapi.json", f"/v1/files/{file.id}/content"]:
        status, _, text = ask(server, "GET", path, headers={"host": "rebound.example"})
        assert status == 421 and "allowed_hosts" in json.loads(text)["error"]["message"], path
    for path in ["/health/live", "/health/ready"]:
        assert ask(server, "GET", path, headers={"host": "balancer.example"})[0] == 200
    here = server.url.removeprefix("http://")
    for headers in [
        {},
        {"origin": server.url},
        {"origin": f"http://localhost:{here.split(':')[1]}", "host": "localhost"},
    ]:
        status = ask(server, "POST", "/v1/batches", body, {**JSON, **headers})[0]
        assert status == (403 if "host" in headers else 200), headers


def test_cors_origins_and_allowed_hosts_are_configurable(serve):
    page = {"origin": "https://tool.example", "host": "batch.example"}
    server = serve(
        "--cors-origins", "https://tool.example", "--allowed-hosts", "batch.example,*.inner.example"
    )
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    status, headers, _ = ask(server, "OPTIONS", "/v1/batches", headers={**page, **asks})
    assert status == 200 and headers["access-control-allow-origin"] == "https://tool.example"
    assert (
        "authorization" in headers["access-control-allow-headers"].lower()
        and "POST" in headers["access-control-allow-methods"]
    )
    file = server.upload(LINES)
    body = json.dumps({"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"})
    status, headers, _ = ask(server, "POST", "/v1/batches", body, {**JSON, **page})
    assert status == 200 and "x-request-id" in headers["access-control-expose-headers"]
    status, headers, _ = ask(server, "GET", "/v1/models/none", headers=page)
    assert status == 404 and headers["access-control-allow-origin"] == "https://tool.example"
    assert (
        ask(
            server, "POST", "/v1/batches", body, {**JSON, **page, "origin": "https://evil.example"}
        )[0]
        == 403
    )
    assert ask(server, "GET", "/v1/models", headers={"host": "other.example"})[0] == 421
    assert ask(server, "GET", "/v1/models", headers={"host": "a.inner.example:8080"})[0] == 200


@pytest.fixture
def http2(server):
    with httpx.Client(http1=False, http2=True, timeout=30) as client:
        yield openai.OpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, http_client=client
        )


def test_http2_prior_knowledge_clients_are_served(server, http2):
    lines = jsonl([chat(str(number), "x" * 1000) for number in range(2000)])
    file = http2.files.create(file=("a.jsonl", lines), purpose="batch")
    batch = http2.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    batch = server.ended(batch.id)
    answer = http2.files.with_raw_response.content(batch.output_file_id)
    assert answer.http_response.http_version == "HTTP/2" and answer.content.count(b"\n") == 2000
    with pytest.raises(openai.NotFoundError):
        http2.batches.retrieve("batch_unknown")


def test_http2_unread_stream_is_closed_and_others_are_served(serve):
    import h2.connection
    import h2.events

    server = serve("--client-timeout", "2s")
    batch = server.run(jsonl([chat(str(number), "x" * 1000) for number in range(2000)]))
    host, port = server.url.removeprefix("http://").split(":")
    peer = h2.connection.H2Connection()
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        peer.initiate_connection()
        authority = f"{host}:{port}"
        for path in [f"/v1/files/{batch.output_file_id}/content", "/v1/models"]:
            stream = peer.get_next_available_stream_id()
            named = [
                (":method", "GET"),
                (":path", path),
                (":scheme", "http"),
                (":authority", authority),
            ]
            peer.send_headers(stream, named, end_stream=True)
        connection.sendall(peer.data_to_send())
        ended, closed, leaving, limit = set(), False, False, None
        end = time.monotonic() + 20
        while not closed and time.monotonic() < end:
            data = connection.recv(65536)
            closed = not data
            try:
                events = peer.receive_data(data) if data and not leaving else []
            except h2.exceptions.ProtocolError:
                # The server follows its GOAWAY with a PING, which this library rejects.
                events, leaving = [], True
            for event in events:
                if isinstance(event, h2.events.RemoteSettingsChanged):
                    setting = event.changed_settings.get(
                        h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
                    )
                    limit = setting.new_value if setting else limit
                if isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id)
            connection.sendall(peer.data_to_send() if not closed and not leaving else b"")
    # The file is larger than the flow-control window, which the client never opens again.
    assert limit == 32 and ended == {3} and closed
    assert server.client.models.list().data


def test_http2_unread_buffered_response_is_closed(serve):
    """Opens a window of one byte: the HTTP/2 library buffers a response that is never read."""
    import h2.config
    import h2.connection
    import h2.events
    import h2.settings

    server = serve("--client-timeout", "1s")
    host, port = server.url.removeprefix("http://").split(":")
    peer = h2.connection.H2Connection(h2.config.H2Configuration())
    peer.local_settings = h2.settings.Settings(
        initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1}
    )
    with socket.create_connection((host, int(port)), timeout=1) as connection:
        peer.initiate_connection()
        closed, leaving, end, next_request = False, False, time.monotonic() + 20, 0.0
        while not closed and time.monotonic() < end:
            # Requests in sequence keep the connection from being idle.
            if time.monotonic() > next_request and not leaving:
                next_request = time.monotonic() + 0.5
                stream = peer.get_next_available_stream_id()
                path = "/v1/models"
                peer.send_headers(
                    stream,
                    [
                        (":method", "GET"),
                        (":path", path),
                        (":scheme", "http"),
                        (":authority", "localhost"),
                    ],
                    end_stream=True,
                )
            with contextlib.suppress(OSError):
                connection.sendall(peer.data_to_send())
            try:
                data = connection.recv(65536)
                closed = not data
                leaving |= any(
                    isinstance(event, h2.events.ConnectionTerminated)
                    for event in peer.receive_data(data)
                )
            except TimeoutError:
                pass
            except h2.exceptions.ProtocolError:
                leaving = True
            except ConnectionError:
                closed = True
    assert closed, "the connection is never closed"


def test_keep_alive_connections_have_their_own_timeout(serve):
    server = serve("--request-head-timeout", "300ms", "--idle-timeout", "3s")
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    for pause in [0, 1, 1]:
        time.sleep(pause)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().read()
    begun = time.monotonic()
    assert connection.sock.recv(1) == b"", "the idle connection is not closed"
    assert time.monotonic() - begun > 2
    connection.sock.close()


def test_model_names_may_contain_brackets_and_wildcards(serve, stub):
    models = ["claude[1m]", "what\\?", "a{b}", "llama-*"]
    server = serve(
        plugins={
            "p": stub.plugin(models, '[aliases]\n"star*" = "m"\n').replace(
                "[settings]", "[settings]"
            )
        }
    )
    wait_for(lambda: "star*" in server.models(), what="the plugin")
    assert server.models() == ["a{b}", "claude[1m]", "star*", "what?"]
    for model in ["claude[1m]", "what?", "a{b}", "star*", "llama-3[x]"]:
        assert ask(server, "GET", "/v1/models/" + urllib.parse.quote(model))[0] == 200, model
    output, _ = server.results(
        server.run(
            [chat(model, "hi", model) for model in ["claude[1m]", "what?", "star*", "llama-7"]]
        )
    )
    assert [line["custom_id"] for line in output] == ["claude[1m]", "what?", "star*", "llama-7"]
    assert ask(server, "GET", "/v1/models/claude1")[0] == 404
