"""A data folder on a disk without space: errors, readiness, shutdown, and the way back."""

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import chat, wait_for

# Number of requests whose answers exceed the small disk many times.
FILLING_REQUESTS = 2000


@pytest.fixture
def full_disk(tmp_path, serve, stub):
    """Starts a server with its data folder on a small disk, and a batch that fills the disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    data = tmp_path / "server/data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", data], check=True)
    try:
        server = serve(plugins={"p": stub.plugin(["m"])})
        (data / "filler").write_bytes(b"x" * (8 << 20))
        with pytest.raises(openai.InternalServerError) as refused:
            server.upload(b"y" * (20 << 20))
        assert refused.value.status_code == 507 and refused.value.code == "storage_full"
        batch = server.create(
            [chat(str(number), "!big 20000", model="m") for number in range(FILLING_REQUESTS)]
        )
        # The refused upload above is in the log, too.
        retried = re.compile("will be retried.*disk is full")
        wait_for(lambda: retried.search(server.logged()), what="the error in the log")
        yield server, batch
        assert "panicked" not in server.logged()
    finally:
        server.kill()
        subprocess.run(["umount", "-l", data], check=True)


def test_full_disk_is_reported_and_batch_continues_after_space_is_freed(full_disk):
    server, batch = full_disk
    assert server.client.batches.retrieve(batch.id).status in ("in_progress", "finalizing")
    (server.data / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=400m", server.data], check=True)
    batch = server.ended(batch.id)
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == [
        str(number) for number in range(FILLING_REQUESTS)
    ] and errors == []


def test_full_disk_does_not_block_shutdown(full_disk):
    server, _ = full_disk
    assert server.stop() == 0


def ready(server):
    try:
        with urllib.request.urlopen(server.url + "/health/ready") as answer:
            return json.load(answer)["status"]
    except urllib.error.HTTPError as error:
        assert error.code == 503
        return " ".join(json.load(error)["reasons"])


def unchanged(number):
    """Returns the number if it stays the same for a second."""
    before = number()
    time.sleep(1)
    return before if number() == before else None


def test_full_disk_stops_requests_and_few_are_sent_twice(full_disk, stub):
    server, batch = full_disk
    retrieve = server.client.batches.retrieve
    # Without disk space no result can be committed, so no further request is sent.
    sent = wait_for(lambda: unchanged(lambda: sum(stub.counts().values())), what="requests to stop")
    committed = retrieve(batch.id).request_counts.completed
    print(f"{sent} sent, {committed} committed")
    # At most the requests that the memory budget holds were sent.
    assert sent < FILLING_REQUESTS and sent - committed <= 800
    # Readiness fails; files can still be read and deleted.
    wait_for(lambda: "is full" in ready(server), what="readiness to fail")
    with urllib.request.urlopen(server.url + "/health/serving") as answer:
        assert answer.status == 200
    files = list(server.client.files.list())
    assert files and server.client.files.content(files[0].id).content
    # After a kill and with free space, committed requests are not sent again.
    server.kill()
    (server.data / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=400m", server.data], check=True)
    server.start()
    ended = server.ended(batch.id)
    assert ended.request_counts.completed == FILLING_REQUESTS
    counts = stub.ask("/arrivals")
    arrivals = sum(len(times) for times in counts.values())
    print(f"{arrivals - FILLING_REQUESTS} of {FILLING_REQUESTS} sent twice")
    assert arrivals - FILLING_REQUESTS <= sent - committed
    wait_for(lambda: ready(server) == "ok", what="readiness")
