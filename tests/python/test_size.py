"""Files of any size within fixed memory: a million lines, lines of 100 MB."""

import json
import time

import pytest
from conftest import CHAT, chat, wait_for

pytestmark = pytest.mark.quiet


def peak(server):
    """Returns the peak memory of the server in MiB."""
    with open(f"/proc/{server.child.pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def test_large_batch_fits_in_192_mib(serve, tmp_path, long):
    server = serve("--max-requests-per-file", "1000000", "--max-file-size", "1GiB")
    number = 1_000_000 if long else 150_000
    with open(tmp_path / "in.jsonl", "w") as file:
        for line in range(number):
            file.write(
                json.dumps(chat(f"request-{line}", f"what is the answer to question {line}?"))
                + "\n"
            )
    with open(tmp_path / "in.jsonl", "rb") as file:
        uploaded = server.client.files.create(file=file, purpose="batch")
    batch = server.client.batches.create(
        input_file_id=uploaded.id, endpoint=CHAT, completion_window="24h"
    )
    batch = server.ended(batch.id, 300)
    assert batch.status == "completed" and batch.request_counts.completed == number
    expected = 0
    with server.client.files.with_streaming_response.content(batch.output_file_id) as response:
        for line in response.iter_lines():
            # Checks presence and order only: parsing would take longer than answering.
            assert (
                line.startswith('{"id":"batch_req_')
                and f'"custom_id":"request-{expected}"' in line[:100]
            )
            expected += 1
    assert expected == number
    assert peak(server) < 192
    # The database releases the space of the results.
    database = server.data / "batchwright.db"
    wait_for(lambda: database.stat().st_size < 150e6, 60, "the database to shrink")


def test_line_of_100_mb_is_answered_or_rejected_by_settings(serve):
    lines = [chat("small"), chat("long", "y" * 100_000_000), chat("small too")]
    server = serve()
    batch = server.run(lines)
    (error,) = batch.errors.data
    assert (error.code, error.line) == ("line_too_long", 2) and "max_line_size" in error.message
    assert peak(server) < 192

    server = serve("--max-line-size", "128MiB", name="roomy")
    (error,) = server.run(lines).errors.data
    assert (
        error.code == "plugin_out_of_memory"
        and "`standard`" in error.message
        and "[limits] max_memory" in error.message
    )
    for plugin in ["standard", "echo"]:
        with open(server.plugins / f"{plugin}.toml", "a") as file:
            file.write(
                '[limits]\nmax_memory = "1GiB"\nmax_output = "256MiB"\ncall_timeout = "30s"\n'
            )
    wait_for(
        lambda: server.logged().count("plugin loaded") >= 4, what="the plugins to be loaded again"
    )
    output, _ = server.results(server.run(lines))
    assert [line["custom_id"] for line in output] == ["small", "long", "small too"]
    assert len(output[1]["response"]["body"]["choices"][0]["message"]["content"]) == 100_000_000
    # About ten copies of the line exist: read, parsed, in guests, in the result.
    assert peak(server) < 1536


def test_large_file_in_validation_delays_no_other_batch(serve):
    server = serve()
    large = server.upload([chat(str(line), "z" * 3800) for line in range(50_000)])
    alone = time_small_batch(server)
    batches = [
        server.client.batches.create(
            input_file_id=large.id, endpoint="/v1/embeddings", completion_window="24h"
        )
        for _ in range(4)
    ]
    beside = []
    while any(server.client.batches.retrieve(batch.id).status == "validating" for batch in batches):
        beside.append(time_small_batch(server))
    print(
        f"alone {alone:.3f} s, beside four files of 200 MB at most {max(beside):.3f} s, "
        f"{len(beside)} times"
    )
    # The order is asserted, not the time: small batches ended during the validation.
    assert len(beside) >= 3


def time_small_batch(server):
    begun = time.monotonic()
    assert server.run([chat(str(line)) for line in range(10)]).request_counts.completed == 10
    return time.monotonic() - begun
