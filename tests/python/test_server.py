"""Clients that are slow, go away, or come in numbers."""

import json
import socket
import sqlite3
import time
import urllib.error
import urllib.request

from conftest import wait_for

HEAD = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: 100000\r\n\r\n"
PART = '--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + "x" * 5000


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def received(connection):
    """Everything until the server closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def alive(server):
    with urllib.request.urlopen(server.url + "/health/ready", timeout=10) as answer:
        return json.load(answer)["status"] == "ok"


def test_a_client_that_says_nothing_or_stops_in_the_middle_is_let_go(serve):
    server = serve("--request-head-timeout", "300ms", "--client-timeout", "300ms")
    with connect(server) as mute, connect(server) as slow, connect(server) as stuck:
        slow.sendall(b"GET /v1/models HTTP/1.1\r\nhost:")
        stuck.sendall((HEAD + PART).encode())
        assert received(slow) == b"" and received(mute) == b""
        answer = received(stuck)
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
        assert error["type"] == "invalid_request_error" and "client_timeout" in error["message"]
    assert [path.name for path in (server.data / "objects").rglob("*") if path.is_file()] == []


def test_an_upload_that_is_cut_off_leaves_nothing(serve):
    server = serve()
    objects = server.data / "objects"
    files = lambda: [path for path in objects.rglob("*") if path.is_file()]  # noqa: E731
    with connect(server) as connection:
        # More than what is held in memory, so that some of it is on the disk.
        connection.sendall(HEAD.replace("100000", "100000000").encode() + PART.encode() + b"y" * 20_000_000)
        wait_for(files, what="the beginning of the upload")
    wait_for(lambda: not files(), what="the removal of what was written")
    assert list(server.client.files.list()) == []
    database = sqlite3.connect(server.data / "batchwright.db")
    noted = lambda: database.execute("SELECT count(*) FROM pending_objects").fetchone()[0]  # noqa: E731
    wait_for(lambda: noted() == 0, what="the removal of its note")


def test_a_client_that_does_not_take_its_answer_is_let_go(serve):
    server = serve("--client-timeout", "300ms", "--max-connections", "1")
    file = server.client.files.create(file=("large", b"x" * 100_000_000), purpose="user_data")
    server.client.close()
    with connect(server) as connection:
        connection.sendall(f"GET /v1/files/{file.id}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        # There is one place, and it is free again without our doing.
        assert alive(server)


def test_more_clients_than_may_come_at_once_are_told_to_come_back_and_health_is_answered(serve):
    server = serve("--max-connections", "2")
    file = server.client.files.create(file=("large", b"x" * 100_000_000), purpose="user_data")
    server.client.close()
    busy = [connect(server) for _ in range(2)]
    for connection in busy:
        connection.sendall(f"GET /v1/files/{file.id}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    with connect(server) as third:
        third.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = received(third)
        assert b" 503 " in answer and b"retry-after: 1\r\n" in answer and b"server_overloaded" in answer
    assert alive(server)
    busy[0].close()
    wait_for(lambda: models(server), what="a place")
    busy[1].close()


def models(server):
    try:
        with urllib.request.urlopen(server.url + "/v1/models", timeout=10) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        assert error.code == 503
        return False


def test_idle_connections_make_way(serve):
    server = serve("--max-connections", "100")
    idle = [connect(server) for _ in range(400)]
    assert models(server) and alive(server)
    for connection in idle:
        connection.close()


def test_many_connections_at_once_are_served(serve):
    server = serve()
    connections = [connect(server) for _ in range(900)]
    begun = time.monotonic()
    assert alive(server)
    print(f"answered beside 900 idle connections in {time.monotonic() - begun:.3f} s")
    for connection in connections:
        connection.close()
