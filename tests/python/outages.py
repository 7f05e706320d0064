"""Input lines, settings and waits of the tests with a provider that is unavailable or faulty."""

import json
import urllib.request

from conftest import chat

# Settings that shorten an outage of minutes to seconds.
SHORT_BACKOFFS = [
    "--outage-backoff",
    "50ms",
    "--max-outage-backoff",
    "400ms",
    "--retry-backoff",
    "20ms",
    "--stop-grace",
    "50ms",
]


def lines(number, model="m", begin="q"):
    return [chat(str(line), f"{begin} {line}", model=model) for line in range(number)]


def wait_state(server, batch):
    with urllib.request.urlopen(f"{server.url}/v1/batches/{batch.id}/plugins") as answer:
        return json.load(answer)["waiting"]


def assert_all_answered(server, batch, number):
    ended = server.ended(batch.id, 120)
    counts = ended.request_counts
    assert (ended.status, counts.completed, counts.failed) == ("completed", number, 0), counts
    output, _ = server.results(ended)
    assert [line["custom_id"] for line in output] == [str(line) for line in range(number)]
