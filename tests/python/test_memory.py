"""Peak memory of the server stays below its settings plus a constant: 320 MiB by default.

Attacks: endless part headers, large fields, unread responses, stalled uploads and HTTP/2 streams,
idle connections, a locked database. Each alone, then all at once.
"""

import contextlib
import itertools
import json
import random
import resource
import socket
import sqlite3
import struct
import threading
import time
import urllib.error
import urllib.request

import hpack
import openai
import pytest
from conftest import CHAT, chat, jsonl, leftovers, wait_for

pytestmark = pytest.mark.quiet

# memory_budget (64 MiB), instance_memory (128 MiB), and 128 MiB for uncounted memory.
MAX_PEAK_MIB = 320


@pytest.fixture(autouse=True)
def many_files():
    """Raises the limit of open files: the tests open thousands of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def peak(server):
    """Returns the peak memory of the server in MiB."""
    with open(f"/proc/{server.child.pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request(server, method, path, body=None, headers=None):
    asked = urllib.request.Request(
        server.url + path, method=method, data=body, headers=headers or {}
    )
    for left in reversed(range(60)):
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            # Other clients may hold all connections; retries as the SDKs do.
            if error.code != 503 or path.startswith("/health/") or left == 0:
                return error.code, error.read()
            time.sleep(0.5)


@contextlib.contextmanager
def closing(sockets):
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


UPLOAD = (
    b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n\r\n"
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="'
)


def endless_part_header(server):
    with connect(server) as connection:
        connection.sendall(UPLOAD % (1 << 32))
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"a" * (1 << 20))
        answer = connection.recv(4096)
        assert b" 400 " in answer and b"headers of a part are longer than" in answer, answer


def fields_of_megabytes(server):
    json_type = {"content-type": "application/json"}
    good = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
    for field in ["input_file_id", "endpoint", "completion_window", "idempotency_key"]:
        for size in [100, 1000, 100_000, 1_000_000]:
            body = json.dumps({**good, field: "f" * (size * 3)}).encode()
            status, answer = request(server, "POST", "/v1/batches", body, json_type)
            assert status in (400, 413) and len(answer) < 2000, (field, size, status)
    # Metadata of the maximum size, in as many batches as a page holds.
    metadata = {f"key-{number:02}" + "k" * 50: "ü" * 512 for number in range(16)}
    for _ in range(100):
        status, _ = request(
            server,
            "POST",
            "/v1/batches",
            json.dumps({**good, "metadata": metadata}).encode(),
            json_type,
        )
        assert status == 200
    # Batches with a thousand errors each.
    file = server.upload(
        [json.dumps({"custom_id": "x" * 900, "n": number}) for number in range(1000)]
    )
    rejected = [server.create_of(file) for _ in range(20)]
    for batch in rejected:
        assert server.ended(batch.id, 120).status == "failed"
    listed = request(server, "GET", "/v1/batches?limit=100")[1]
    entries = json.loads(listed)["data"]
    assert len(entries) == 100 and all(
        len((entry["errors"] or {"data": []})["data"]) <= 6 for entry in entries
    )
    whole = server.client.batches.retrieve(rejected[0].id)
    assert (
        len(whole.errors.data) > 100
        and sum(len(error.message) for error in whole.errors.data) < 600_000
    )
    # Responses that the client never reads.
    paths = ["/v1/batches?limit=100", f"/v1/batches/{rejected[0].id}", "/v1/files?limit=10000"]
    with closing([connect(server) for _ in range(300)]) as readers:
        for number, reader in enumerate(readers):
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(f"GET {paths[number % 3]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(2)
        assert request(server, "GET", "/health/live")[0] == 200


def locked_database(server):
    lines = jsonl(chat(str(number), "y" * 20_000) for number in range(3000))
    file = server.client.files.create(file=("in.jsonl", lines), purpose="batch")
    batches = [server.create_of(file) for _ in range(3)]
    retrieve = server.client.batches.retrieve
    wait_for(
        lambda: any(retrieve(batch.id).request_counts.completed for batch in batches),
        60,
        "a result",
    )
    database = sqlite3.connect(server.data / "batchwright.db", isolation_level=None, timeout=30)
    database.execute("BEGIN IMMEDIATE")
    time.sleep(6)
    database.execute("ROLLBACK")
    database.close()
    for batch in batches:
        assert server.ended(batch.id, 120).request_counts.completed == 3000


def large_responses(server):
    batch = server.create([chat(str(number), "!big 12000000", model="m0") for number in range(24)])
    assert server.ended(batch.id, 240).request_counts.completed == 24


def heads_of_half_a_megabyte(server):
    head = b"GET /v1/files HTTP/1.1\r\nHost: localhost\r\n" + b"".join(
        b"h%d: " % n + b"v" * 8100 + b"\r\n" for n in range(60)
    )
    with closing([connect(server) for _ in range(1000)]) as clients:
        for client in clients:
            client.setblocking(False)
            # The kernel must not hold the head for a server that has not read it.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)
        sent = [0] * len(clients)
        for _ in range(100):
            for number, client in enumerate(clients):
                with contextlib.suppress(OSError):
                    sent[number] += client.send(head[sent[number] : sent[number] + 65536])
        assert max(sent) < len(head), "a head of half a megabyte was accepted"


def stalled_uploads(server):
    with closing([]) as clients:
        for _ in range(1000):
            client = connect(server)
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            clients.append(client)
            with contextlib.suppress(OSError):
                client.sendall(UPLOAD % (1 << 30) + b'x"\r\n\r\n' + b"z" * 500_000)
        for _ in range(5):
            time.sleep(1)
            for client in clients:
                with contextlib.suppress(OSError):
                    client.send(b"z")


def frame(kind, flags, stream, payload=b""):
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload
    )


def stalled_http2_streams(server):
    """Opens the maximum of HTTP/2 streams: stalled uploads, unread responses, maximal heads."""
    file = server.upload(b"x" * 4_000_000)
    data, headers, settings = 0, 1, 4
    end_stream, end_headers = 1, 4
    form = [
        (":method", "POST"),
        (":path", "/v1/files"),
        ("content-type", "multipart/form-data; boundary=b"),
    ]
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"z" * 1900
    content = [(":method", "GET"), (":path", f"/v1/files/{file.id}/content")]
    large = [
        (":method", "GET"),
        (":path", "/v1/models"),
        *((f"x-{number}", "v" * 1000) for number in range(14)),
    ]
    with closing([]) as clients:
        for number in range(120):
            client = connect(server)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            clients.append(client)
            encoder = hpack.Encoder()
            sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, 0, 0)
            for stream in range(1, 64, 2):
                asked = [form, content, large][number % 3]
                pseudo = [
                    (":method", asked[0][1]),
                    (":path", asked[1][1]),
                    (":scheme", "http"),
                    (":authority", "localhost"),
                ]
                block = encoder.encode(pseudo + asked[2:], huffman=False)
                sent += frame(
                    headers, end_headers | (end_stream if asked is not form else 0), stream, block
                )
                if asked is form:
                    sent += frame(data, 0, stream, part)
            client.settimeout(1)
            # The server stops reading from some connections.
            with contextlib.suppress(OSError):
                client.sendall(sent)
        time.sleep(3)
        assert request(server, "GET", "/health/live")[0] == 200


def idle_connections(server):
    with closing([connect(server) for _ in range(1024)]):
        time.sleep(0.5)
        assert request(server, "GET", "/health/live")[0] == 200


def plugin_combinations(server):
    files = []
    for number in range(1, 7):
        for plugins in itertools.combinations(range(6), number):
            lines = [
                chat(str(line), f"!delay 600000 {'y' * 3000}", model=f"m{plugins[line % number]}")
                for line in range(100)
            ]
            files.append(server.upload(lines))
    batches = [server.create_of(file) for file in files for _ in range(4)]

    def statuses():
        return [server.client.batches.retrieve(batch.id).status for batch in batches[-5:]]

    wait_for(lambda: "validating" not in statuses(), 120, "all batches to be validated")
    time.sleep(3)
    for batch in batches:
        server.client.batches.cancel(batch.id)
    wait_for(lambda: set(statuses()) == {"cancelled"}, 120, "all batches to be cancelled")


CASES = [
    endless_part_header,
    fields_of_megabytes,
    locked_database,
    large_responses,
    heads_of_half_a_megabyte,
    stalled_uploads,
    stalled_http2_streams,
    idle_connections,
    plugin_combinations,
]


@pytest.fixture
def loaded(serve, stub):
    """Starts a server with default settings except timeouts, and six plugins of one provider."""
    plugins = {f"p{number}": stub.plugin([f"m{number}"]) for number in range(6)}
    server = serve(
        "--client-timeout",
        "20s",
        "--stop-grace",
        "10ms",
        "--max-connections",
        "2048",
        plugins=plugins,
    )
    (server.plugins / "echo.toml").write_text(
        'component = "inference-echo.wasm"\nmodels = ["echo"]\n'
    )
    wait_for(lambda: "echo" in server.models(), what="the plugins")
    server.create_of = lambda file: server.client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    return server


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_memory_is_bounded_for_each_kind_of_load(loaded, case):
    before = peak(loaded)
    case(loaded)
    print(f"peak memory: {peak(loaded)} MiB, {before} MiB before")
    assert peak(loaded) < MAX_PEAK_MIB
    assert "panicked" not in loaded.logged()


def test_memory_is_bounded_for_all_kinds_of_load_at_once(loaded):
    failures = []

    def attempt(case):
        # Other cases may hold all connections; the server then asks clients to retry.
        for _ in range(20):
            try:
                return case(loaded)
            except (
                urllib.error.URLError,
                ConnectionError,
                openai.APIConnectionError,
                openai.InternalServerError,
            ) as error:
                last = error
                time.sleep(random.uniform(0.5, 2))
            except Exception as error:
                last = error
                break
        failures.append((case.__name__, last))

    threads = [threading.Thread(target=attempt, args=[case]) for case in CASES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"peak memory: {peak(loaded)} MiB with everything at once")
    assert failures == []
    assert peak(loaded) < MAX_PEAK_MIB
    wait_for(lambda: request(loaded, "GET", "/health/ready")[0] == 200, what="readiness")


def test_uploads_cut_off_at_any_byte_leave_no_object(serve):
    server = serve()
    size = 300_000
    body = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        + b"z" * size
        + b"\r\n--b--\r\n"
    )
    head = (
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    rng = random.Random(7)
    for number in range(400):
        whole = head + body
        # At random bytes, and every second time at the last byte, where the file is committed.
        sent = len(whole) if number % 2 else rng.randrange(len(whole))
        connection = connect(server)
        connection.sendall(whole[:sent])
        time.sleep(rng.random() * 0.012)
        if number % 3:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    wait_for(lambda: not leftovers(server), what="removal of leftover objects")
    recorded = server.client.files.list().data
    assert recorded and all(file.bytes == size for file in recorded)


def test_slow_upload_times_out_and_steady_upload_succeeds(serve):
    server = serve("--client-timeout", "2s")
    body = (
        b'x"\r\n\r\n'
        + b"z" * 20_000
        + b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    )
    length = len(UPLOAD.split(b"\r\n\r\n", 1)[1]) + len(body)
    with connect(server) as slow, connect(server) as steady:
        for client in (slow, steady):
            client.sendall(UPLOAD % length)
        sent, begun = 0, time.monotonic()
        answer = b""
        while sent < len(body):
            steady.sendall(body[sent : sent + 1000])
            sent += 1000
            with contextlib.suppress(OSError):
                slow.sendall(b"z")
            time.sleep(0.15)
        slow.settimeout(10)
        answer = slow.recv(4096)
        assert b" 408 " in answer and b"4 KiB/s" in answer, answer
        assert b" 200 " in steady.recv(4096)
        # The whole upload took longer than client_timeout.
        assert time.monotonic() - begun > 2


def test_write_ahead_log_stays_small_while_clients_poll(serve):
    server = serve()
    file = server.upload([json.dumps({"custom_id": str(number)}) for number in range(400)])
    for _ in range(30):
        server.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    ended = threading.Event()

    def poll():
        while not ended.is_set():
            request(server, "GET", "/v1/batches?limit=100")

    pollers = [threading.Thread(target=poll) for _ in range(4)]
    for poller in pollers:
        poller.start()
    log = server.data / "batchwright.db-wal"
    largest = 0
    try:
        batch = server.create([chat(str(number), "y" * 3500) for number in range(20_000)])

        def look():
            nonlocal largest
            largest = max(largest, log.stat().st_size)
            return server.client.batches.retrieve(batch.id).status == "completed"

        wait_for(look, 120, "the end of the batch")
    finally:
        ended.set()
        for poller in pollers:
            poller.join()
    print(f"write-ahead log: at most {largest >> 20} MiB")
    assert largest < 64 << 20
    # A clean stop leaves no write-ahead log behind.
    assert server.stop() == 0 and (not log.exists() or log.stat().st_size == 0)
