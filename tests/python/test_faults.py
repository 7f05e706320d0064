"""Every write of the server fails once, in turn, with ENOSPC or EIO.

The client gets an error, or the batch continues. No line is lost or duplicated, no count is wrong.
"""

import errno
import mmap
import sqlite3
import struct
import subprocess

import openai
import pytest
from conftest import CHAT, ROOT, chat, jsonl, leftovers, wait_for

pytestmark = pytest.mark.quiet

LINES = 5


class FaultControl:
    """Shared memory with `fault.c`: writes so far, write that fails, its errno, failures so far."""

    def __init__(self, path):
        path.write_bytes(bytes(32))
        with open(path, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 32)

    def __getitem__(self, index):
        return struct.unpack_from("q", self.shared, index * 8)[0]

    def fail(self, ahead, error_number):
        struct.pack_into("qq", self.shared, 8, self[0] + ahead, error_number)

    def disarm(self):
        struct.pack_into("q", self.shared, 8, 0)

    @property
    def count(self):
        return self[0]

    @property
    def failed(self):
        return self[3]


@pytest.fixture
def broken(serve, stub, tmp_path):
    library = tmp_path / "fault.so"
    source = ROOT / "tests/faults/fault.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    control = FaultControl(tmp_path / "fault-control")
    env = {
        "LD_PRELOAD": str(library),
        "FAULT_FOLDER": str(tmp_path / "server/data"),
        "FAULT_CONTROL": str(tmp_path / "fault-control"),
    }
    server = serve(
        "--stop-grace",
        "10ms",
        env=env,
        plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 2\n")},
    )
    return server, control


def retry_once(call):
    """Calls again after a server error, as a client does; each fault occurs once."""
    try:
        return call()
    except openai.InternalServerError as error:
        assert error.type == "server_error" and error.status_code in (500, 507)
        return call()


def test_write_errors_lose_no_line_and_leak_no_object(broken, stub):
    server, control = broken

    def run_batch(number, cancel):
        name = f"{'cancelled' if cancel else 'whole'}-{number}"
        prompts = [f"!delay {50 if cancel else 0} {name}-{line}" for line in range(LINES)]
        bytes_ = jsonl(chat(str(line), prompt, model="m") for line, prompt in enumerate(prompts))
        file = retry_once(
            lambda: server.client.files.create(file=("in.jsonl", bytes_), purpose="batch")
        )
        assert server.client.files.content(file.id).content == bytes_
        create = lambda: server.client.batches.create(  # noqa: E731
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            extra_headers={"idempotency-key": name},
        )
        batch = retry_once(create)
        if cancel:
            wait_for(
                lambda: server.client.batches.retrieve(batch.id).status != "validating",
                what="the batch to leave validation",
            )
            retry_once(lambda: server.client.batches.cancel(batch.id))
        batch = server.ended(batch.id)
        check(server, batch, prompts, cancel)
        for gone in [file.id, batch.output_file_id, batch.error_file_id]:
            if gone:
                retry_once(lambda gone=gone: server.client.files.delete(gone))

    # One batch without a fault, cleanup included.
    run_batch("first", False)
    for cancel in (False, True):
        number, missed = 0, 0
        while missed < 3:
            number += 1
            before = control.failed
            control.fail(number, errno.ENOSPC if number % 2 else errno.EIO)
            run_batch(number, cancel)
            missed = missed + 1 if control.failed == before else 0
            control.disarm()
        print(f"{number} writes {'with a cancel' if cancel else 'of a whole batch'}")
        assert number > 50
    counts = stub.counts()
    assert set(counts.values()) == {1}, {
        prompt: count for prompt, count in counts.items() if count > 1
    }
    wait_for(lambda: not leftovers(server), what="removal of leftover objects")
    server.kill()
    database = sqlite3.connect(server.data / "batchwright.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def check(server, batch, prompts, cancel):
    output, errors = server.results(batch)
    counts = batch.request_counts
    assert batch.status == ("cancelled" if cancel else "completed"), batch
    assert [int(line["custom_id"]) for line in output] == sorted(
        int(line["custom_id"]) for line in output
    )
    assert sorted(int(line["custom_id"]) for line in output + errors) == list(range(len(prompts)))
    assert (counts.total, counts.completed, counts.failed) == (len(prompts), len(output), 0)
    assert {line["error"]["code"] for line in errors} <= ({"batch_cancelled"} if cancel else set())
    for line in output:
        assert (
            line["response"]["body"]["choices"][0]["message"]["content"]
            == "stub: " + prompts[int(line["custom_id"])]
        )
