"""Slow, stalled, vanished and numerous clients, each within the limits of the server."""

import json
import socket
import sqlite3
import time
import urllib.error
import urllib.request

from conftest import wait_for

UPLOAD_HEAD = (
    "POST /v1/files HTTP/1.1\r\nhost: localhost\r\n"
    "content-type: multipart/form-data; boundary=b\r\ncontent-length: 100000\r\n\r\n"
)
UPLOAD_PART = (
    '--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + "x" * 5000
)


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def received(connection):
    """Returns all bytes until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def alive(server):
    with urllib.request.urlopen(server.url + "/health/ready", timeout=10) as answer:
        return json.load(answer)["status"] == "ok"


def test_silent_and_stalled_clients_are_disconnected(serve):
    server = serve("--request-head-timeout", "300ms", "--client-timeout", "300ms")
    with connect(server) as mute, connect(server) as slow, connect(server) as stuck:
        slow.sendall(b"GET /v1/models HTTP/1.1\r\nhost:")
        stuck.sendall((UPLOAD_HEAD + UPLOAD_PART).encode())
        assert received(slow) == b"" and received(mute) == b""
        answer = received(stuck)
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
        assert error["type"] == "invalid_request_error" and "client_timeout" in error["message"]
    assert [path.name for path in (server.data / "objects").rglob("*") if path.is_file()] == []


def test_upload_cut_off_leaves_no_object(serve):
    server = serve()
    objects = server.data / "objects"
    files = lambda: [path for path in objects.rglob("*") if path.is_file()]  # noqa: E731
    with connect(server) as connection:
        # More than the buffer in memory, so that a part is on the disk.
        connection.sendall(
            UPLOAD_HEAD.replace("100000", "100000000").encode()
            + UPLOAD_PART.encode()
            + b"y" * 20_000_000
        )
        wait_for(files, what="the partial object")
    wait_for(lambda: not files(), what="removal of the partial object")
    assert list(server.client.files.list()) == []
    database = sqlite3.connect(server.data / "batchwright.db")

    def pending():
        return database.execute("SELECT count(*) FROM pending_objects").fetchone()[0]

    wait_for(lambda: pending() == 0, what="removal of the pending record")


def test_client_not_reading_its_response_is_disconnected(serve):
    server = serve("--client-timeout", "300ms", "--max-connections", "1")
    file = server.client.files.create(file=("large", b"x" * 100_000_000), purpose="user_data")
    server.client.close()
    with connect(server) as connection:
        connection.sendall(
            f"GET /v1/files/{file.id}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        # The only connection is free again, because the server closed it.
        assert alive(server)


def test_connections_over_the_limit_get_503_and_health_is_answered(serve):
    server = serve("--max-connections", "2")
    file = server.client.files.create(file=("large", b"x" * 100_000_000), purpose="user_data")
    server.client.close()
    busy = [connect(server) for _ in range(2)]
    for connection in busy:
        connection.sendall(
            f"GET /v1/files/{file.id}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    with connect(server) as third:
        third.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = received(third)
        assert (
            b" 503 " in answer
            and b"retry-after: 1\r\n" in answer
            and b"server_overloaded" in answer
        )
    assert alive(server)
    busy[0].close()
    wait_for(lambda: models(server), what="a free connection")
    busy[1].close()


def models(server):
    try:
        with urllib.request.urlopen(server.url + "/v1/models", timeout=10) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        assert error.code == 503
        return False


def test_idle_connections_are_closed_for_new_ones(serve):
    server = serve("--max-connections", "100")
    idle = [connect(server) for _ in range(400)]
    assert models(server) and alive(server)
    for connection in idle:
        connection.close()


def test_nine_hundred_idle_connections_block_no_request(serve):
    server = serve()
    connections = [connect(server) for _ in range(900)]
    begun = time.monotonic()
    assert alive(server)
    print(f"answered beside 900 idle connections in {time.monotonic() - begun:.3f} s")
    for connection in connections:
        connection.close()
