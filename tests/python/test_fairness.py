"""Fairness: no batch, plugin or provider delays another one.

One test per shared resource: batch slots, concurrency, instances, memory, connections, DNS threads.
"""

import json
import socket
import subprocess
import time

import pytest
from conftest import CHAT, ROOT, Stub, chat, wait_for

pytestmark = pytest.mark.quiet


def counts(server, batch):
    return server.client.batches.retrieve(batch.id).request_counts


def test_small_batch_is_not_delayed_by_sixteen_slow_batches(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    file = server.upload(
        [chat(str(line), f"!delay 1000 {line}", model="m") for line in range(2000)]
    )
    create = lambda: server.client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )  # noqa: E731
    large = [create() for _ in range(16)]
    wait_for(lambda: counts(server, large[0]).completed > 0, what="progress of the large batches")
    small = server.run([chat("a", "hello", model="m")])
    assert small.request_counts.completed == 1
    assert all(counts(server, batch).completed < 2000 for batch in large)


def test_batches_over_the_limit_delay_no_other_provider(serve, stub, tmp_path):
    other = Stub(tmp_path, "other")
    server = serve(plugins={"p": stub.plugin(["m"]), "q": other.plugin(["n"])})
    try:
        file = server.upload(
            [chat(str(line), f"!delay 500 {line}", model="m") for line in range(3000)]
        )
        create = lambda: server.client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )  # noqa: E731
        large = [create() for _ in range(40)]
        both = server.create(
            [chat("a", "!delay 500 both", model="m"), chat("b", "both", model="n")]
        )
        wait_for(lambda: sum(stub.counts().values()) > 200, what="progress of the large batches")
        # Batches of the other provider, of the busy one and of both make progress.
        for number in range(3):
            assert (
                server.run(
                    [chat(str(line), f"{number} {line}", model="n") for line in range(50)]
                ).request_counts.completed
                == 50
            )
        small = server.create([chat("a", "hello", model="m")])
        for batch in (small, both):
            assert server.ended(batch.id, 90).request_counts.failed == 0
        assert all(counts(server, batch).completed < 3000 for batch in large)
    finally:
        other.kill()


def test_batches_over_the_limit_take_turns(serve, stub):
    plugins = {"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 8\n")}
    server = serve("--max-concurrent-batches", "2", plugins=plugins)
    large = [
        server.create(
            [chat(str(line), f"!delay 20 {number}-{line}", model="m") for line in range(3000)]
        )
        for number in range(5)
    ]
    wait_for(lambda: counts(server, large[0]).completed > 0, what="progress of the first batch")
    small = server.run([chat(str(line), f"small {line}", model="m") for line in range(3)])
    assert small.request_counts.completed == 3
    # Two run at a time, and all five make progress long before one of them is complete.
    wait_for(
        lambda: all(counts(server, batch).completed > 0 for batch in large), 60, "a result of each"
    )
    assert all(counts(server, batch).completed < 3000 for batch in large)


def test_batches_share_a_providers_concurrency(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 8\n")})
    first = server.create(
        [chat(str(line), f"!delay 20 first {line}", model="m") for line in range(2000)]
    )
    wait_for(lambda: counts(server, first).completed > 50, what="progress of the first batch")
    before = counts(server, first).completed
    second = server.run(
        [chat(str(line), f"!delay 20 second {line}", model="m") for line in range(400)]
    )
    assert second.request_counts.completed == 400
    # The first batch made progress at about the same rate.
    done = counts(server, first).completed - before
    assert 200 < done < 800, done


def test_batch_with_many_plugins_is_not_starved(serve, stub):
    plugins = {name: stub.plugin([name], "[limits]\nmax_in_flight = 4\n") for name in ("a", "b")}
    server = serve("--max-concurrent-batches", "1", plugins=plugins)
    alone = [
        server.create(
            [
                chat(str(line), f"!delay 20 {model} {number} {line}", model=model)
                for line in range(1500)
            ]
        )
        for number in range(3)
        for model in ("a", "b")
    ]
    wait_for(lambda: counts(server, alone[0]).completed > 0, what="progress of the first batch")
    both = server.run([chat(str(line), f"{line}", model="ab"[line % 2]) for line in range(20)])
    assert both.request_counts.completed == 20
    assert any(counts(server, batch).completed < 1500 for batch in alone)


def test_plugins_share_instances_without_failed_requests(serve):
    # Memory for about twenty instances, and two hundred plugins.
    number = 200
    plugins = {
        f"e{name}": f'component = "inference-echo.wasm"\nmodels = ["m{name}"]\n'
        for name in range(number)
    }
    server = serve("--instance-memory", "32MiB", plugins=plugins)
    lines = [chat(str(line), model=f"m{line % number}") for line in range(number * 5)]
    for _ in range(2):
        batch = server.run(lines)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (number * 5, 0)


def test_stuck_provider_holds_no_memory_connections_or_permits_of_others(serve, stub, tmp_path):
    other = Stub(tmp_path, "other")
    try:
        server = serve(plugins={"stuck": stub.plugin(["stuck"]), "q": other.plugin(["m"])})
        # Lines exceed the memory budget, batches exceed the batch slots.
        text = "y" * 500_000
        large = server.upload(
            [chat(str(line), f"!delay 600000 {text}", model="stuck") for line in range(100)]
        )
        small = server.upload(
            [chat(str(line), f"!delay 600000 {line}", model="stuck") for line in range(500)]
        )
        create = lambda file: server.client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h"
        )  # noqa: E731
        batches = [create(file) for _ in range(20) for file in (large, small)]
        wait_for(lambda: sum(stub.counts().values()) >= 60, what="the provider to be stuck")
        for _ in range(3):
            batch = server.run(
                [chat(str(line), f"{line} {'z' * 50_000}", model="m") for line in range(200)]
            )
            assert batch.request_counts.completed == 200
        assert all(counts(server, batch).completed == 0 for batch in batches)
    finally:
        other.kill()


def test_large_responses_of_one_provider_delay_no_other(serve, stub, tmp_path):
    other = Stub(tmp_path, "other")
    try:
        server = serve(plugins={"large": stub.plugin(["large"]), "q": other.plugin(["m"])})
        large = server.create(
            [chat(str(line), "!big 8000000", model="large") for line in range(60)]
        )
        wait_for(lambda: counts(server, large).completed > 0, what="a large response")
        for _ in range(3):
            assert (
                server.run(
                    [chat(str(line), model="m") for line in range(100)]
                ).request_counts.completed
                == 100
            )
        assert counts(server, large).completed < 60, "the large batch ended too soon for this test"
        assert server.ended(large.id, 120).request_counts.completed == 60
    finally:
        other.kill()


def test_slow_dns_occupies_no_threads_of_other_providers(serve, stub, tmp_path):
    library = tmp_path / "resolve.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, ROOT / "tests/resolver/resolve.c", "-ldl"],
        check=True,
    )
    number = 12
    plugins = {
        f"slow{name}": f'component = "inference-openai.wasm"\nmodels = ["slow{name}"]\n'
        f'[settings]\nbase_url = "http://slow-{name}.example.com:9/v1"\n'
        for name in range(number)
    }
    env = {"LD_PRELOAD": str(library), "TEST_SLOW_HOSTS": "20"}
    server = serve("--retry-backoff", "1h", plugins={**plugins, "p": stub.plugin(["m"])}, env=env)
    # One thread per request would need more threads than the pool has.
    slow = [
        server.create([chat(str(line), model=f"slow{name}") for line in range(64)])
        for name in range(number)
    ]
    wait_for(
        lambda: all(
            server.client.batches.retrieve(batch.id).status == "in_progress" for batch in slow
        ),
        what="the slow batches in progress",
    )
    for _ in range(3):
        assert (
            server.run([chat(str(line), model="m") for line in range(200)]).request_counts.completed
            == 200
        )
    assert all(server.client.batches.retrieve(batch.id).status == "in_progress" for batch in slow)


def test_line_larger_than_the_memory_budget_passes(serve, stub):
    server = serve("--memory-budget", "4MiB", plugins={"p": stub.plugin(["m"])})
    lines = [
        chat(str(line), f"{line}" + "y" * (5_000_000 if line == 5 else 10), model="m")
        for line in range(10)
    ]
    output, errors = server.results(server.run(lines))
    assert [line["custom_id"] for line in output] == [
        str(line) for line in range(10)
    ] and errors == []


def test_slow_readers_delay_no_upload(server):
    file = server.upload(
        [json.dumps({"custom_id": "x" * 900, "n": number}) for number in range(1000)]
    )
    batch = server.client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )
    assert server.ended(batch.id).status == "failed"
    host, port = server.url.removeprefix("http://").split(":")
    readers = []
    for _ in range(12):
        reader = socket.socket()
        # Small enough that the response stays in the buffers of the server.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect((host, int(port)))
        reader.sendall(f"GET /v1/batches/{batch.id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        readers.append(reader)
    time.sleep(1)
    client = server.client.with_options(timeout=20)
    for number in range(5):
        assert (
            client.files.create(file=("in.jsonl", b"x" * 200_000), purpose="batch").bytes == 200_000
        ), number
    for reader in readers:
        reader.close()
