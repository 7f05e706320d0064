"""Server-sent events of batches: at most one a second, and no stream that holds anything."""

import contextlib
import http.client
import itertools
import json
import resource
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import chat, wait_for


class Stream(threading.Thread):
    """Listener that keeps the states that it gets."""

    def __init__(self, url, key=None):
        super().__init__(daemon=True)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.answer = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=60
        )
        self.states, self.times, self.comments, self.is_over = [], [], 0, False
        self.start()

    def close(self):
        """Ends the connection, also while the thread reads."""
        self.answer.fp.raw._sock.shutdown(socket.SHUT_RDWR)
        self.join(10)

    def run(self):
        with contextlib.suppress(http.client.IncompleteRead):
            self.read()

    def read(self):
        name = None
        for line in self.answer:
            line = line.decode().rstrip("\n")
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                assert name == "batch"
                self.states.append(json.loads(line.removeprefix("data: ")))
                self.times.append(time.monotonic())
            elif line.startswith(":"):
                self.comments += 1
        self.is_over = True


def slow(number):
    return [chat(f"line-{place}", "!delay 900 slow", model="m") for place in range(number)]


def test_stream_of_a_batch_has_its_states_and_ends_with_the_last(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 1\n")})
    batch = server.create(slow(4))
    stream = Stream(f"{server.url}/v1/batches/{batch.id}/events")
    assert stream.answer.headers["content-type"].startswith("text/event-stream")
    assert stream.answer.headers["x-accel-buffering"] == "no"
    assert stream.answer.headers["cache-control"] == "no-cache"
    done = server.ended(batch.id)
    stream.join(20)
    assert stream.is_over, "the stream ends with the final state"
    assert {state["id"] for state in stream.states} == {batch.id}
    last = stream.states[-1]
    assert (last["object"], last["status"]) == ("batch", done.status)
    assert last["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    # An older state never follows a later one.
    finished = [state["request_counts"]["completed"] for state in stream.states]
    assert finished == sorted(finished) and len(set(finished)) >= 3
    gaps = [later - earlier for earlier, later in itertools.pairwise(stream.times[1:])]
    assert all(gap > 0.5 for gap in gaps), gaps
    # The stream of a batch that has ended has one state.
    again = Stream(f"{server.url}/v1/batches/{batch.id}/events")
    again.join(10)
    assert again.is_over and [state["status"] for state in again.states] == ["completed"]


def test_stream_of_a_project_shows_its_batches_only(tenants):
    _, one, client = tenants.project("one")
    _, other, _ = tenants.project("other")
    url = f"{tenants.server.url}/v1/batches/events"
    ours = Stream(url, one.api_key.value)
    theirs = Stream(url, other.api_key.value)
    file = client.files.create(file=("in.jsonl", json.dumps(chat("a")).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    wait_for(lambda: any(state["status"] == "completed" for state in ours.states), what="the end")
    assert {state["id"] for state in ours.states} == {batch.id}
    time.sleep(1.5)
    assert theirs.states == [] and not theirs.is_over
    with pytest.raises(urllib.error.HTTPError) as unknown:
        path = f"{tenants.server.url}/v1/batches/{batch.id}/events"
        headers = {"authorization": f"Bearer {other.api_key.value}"}
        urllib.request.urlopen(urllib.request.Request(path, headers=headers))
    assert unknown.value.code == 404


def test_idle_streams_and_readers_that_never_read_hold_no_shutdown(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    idle = [Stream(f"{server.url}/v1/batches/events") for _ in range(20)]
    deaf = [connect(server) for _ in range(20)]
    server.run([chat("a", model="m")])
    wait_for(lambda: all(stream.states for stream in idle), what="states for everyone")
    began = time.monotonic()
    assert server.stop() == 0
    took = time.monotonic() - began
    print(f"stopped in {took:.1f} s with 40 listeners")
    assert took < 10
    for stream in idle:
        stream.join(10)
        assert stream.is_over
    for connection in deaf:
        connection.close()


def test_idle_stream_is_kept_alive_by_comments(serve, long):
    server = serve()
    stream = Stream(f"{server.url}/v1/batches/events")
    if not long:
        pytest.skip("takes 20 seconds: --long")
    wait_for(lambda: stream.comments >= 1, 25, "a comment")


def connect(server):
    """Opens a stream of all batches that nothing reads yet."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(f"GET /v1/batches/events HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
    return connection


@pytest.mark.quiet
def test_two_thousand_listeners_cost_about_as_much_as_one(serve, stub):
    # Clients of this process, each with an open file.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs 4,096 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    limits = ["--max-connections", "10000", "--max-event-streams", "5000"]
    server = serve(*limits, plugins={"p": stub.plugin(["m"])})
    for _ in range(20):
        server.create([chat("a", "!delay 60000 slow", model="m")])
    wait_for(
        lambda: all(batch.status == "in_progress" for batch in server.client.batches.list()),
        what="open batches",
    )

    def cost(listeners):
        """Returns the CPU time in four seconds and the memory with so many listeners."""
        connections = [connect(server) for _ in range(listeners)]
        for connection in connections:
            received = b""
            while received.count(b"data: ") < 20:
                chunk = connection.recv(65536)
                assert chunk, received[:1000]
                received += chunk
        begin = cpu_seconds(server)
        time.sleep(4)
        used, memory = cpu_seconds(server) - begin, resident_bytes(server)
        for connection in connections:
            connection.close()
        return used, memory

    one, before = cost(1)
    many, after = cost(2000)
    each = (after - before) / 1999 / 1024
    print(f"CPU time in 4 s with 1 listener {one:.2f} s, with 2,000 {many:.2f} s")
    print(f"memory of a listener: {each:.1f} KiB")
    assert many < one + 0.2
    assert each < 64


def test_project_leaves_streams_for_others(tenants):
    # Of 512 streams, seven eighths are shared, of which one project gets half.
    _, one, _ = tenants.project("one")
    _, other, _ = tenants.project("other")
    url = f"{tenants.server.url}/v1/batches/events"
    streams = [Stream(url, one.api_key.value) for _ in range(224)]
    with pytest.raises(urllib.error.HTTPError) as refused:
        Stream(url, one.api_key.value)
    assert refused.value.code == 429
    assert "close some" in json.load(refused.value)["error"]["message"]
    streams.append(Stream(url, other.api_key.value))
    for stream in streams:
        stream.close()


def cpu_seconds(server):
    with open(f"/proc/{server.child.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def resident_bytes(server):
    with open(f"/proc/{server.child.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
