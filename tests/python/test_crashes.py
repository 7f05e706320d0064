"""Server killed at random moments: no lost line, no duplicate result, no needless second request.

A random schedule creates, cancels and expires batches while the server is killed and restarted.

`cargo xtask e2e killed -- --seed 7 --kills 300` repeats a schedule, or runs a longer one.
"""

import itertools
import random
import time

import openai
import pytest
from conftest import CHAT, Stub, chat, jsonl, leftovers, wait_for

pytestmark = pytest.mark.quiet

# Seconds that a request in flight at the kill may take to reach the provider.
ARRIVAL_SLACK = 0.25


class Plan:
    """One batch: its requests, and the client calls that succeeded so far."""

    def __init__(self, rng, number):
        self.number = number
        self.key = f"batch-{number}"
        self.prompts = [
            f"!delay {rng.choice([0, 0, 2, 5, 20])} {number}-{line}"
            for line in range(rng.randint(1, 500))
        ]
        self.window = rng.choice(["24h", "24h", "24h", "1s"])
        self.cancel_after = rng.choice([None, None, None, rng.uniform(0, 1)])
        self.id = None
        self.created = None
        self.cancelled = False

    def lines(self):
        return jsonl(chat(str(line), prompt, model="m") for line, prompt in enumerate(self.prompts))


def attempt(call):
    """Returns the result of a call, or None if the server is down."""
    try:
        return call()
    except openai.APIConnectionError:
        return None


def advance(server, plan):
    """Makes the next client call of a batch: upload and create, or cancel."""
    client = server.client.with_options(timeout=5)
    if plan.id is None:
        file = attempt(
            lambda: client.files.create(file=("in.jsonl", plan.lines()), purpose="batch")
        )
        made = file and attempt(
            lambda: client.batches.create(
                input_file_id=file.id,
                endpoint=CHAT,
                completion_window=plan.window,
                extra_headers={"idempotency-key": plan.key},
            )
        )
        if made:
            plan.id, plan.created = made.id, time.monotonic()
    elif (
        plan.cancel_after is not None
        and not plan.cancelled
        and time.monotonic() - plan.created > plan.cancel_after
    ):
        try:
            plan.cancelled = attempt(lambda: client.batches.cancel(plan.id)) is not None
        except openai.ConflictError:
            plan.cancel_after = None


def alive(server, plan):
    batch = plan.id and attempt(
        lambda: server.client.with_options(timeout=5).batches.retrieve(plan.id)
    )
    return batch is None or batch.status not in ("completed", "cancelled", "expired", "failed")


def test_server_killed_at_any_moment_loses_nothing(serve, tmp_path, request):
    seed = request.config.getoption("--seed") or random.randrange(1 << 32)
    max_kills = request.config.getoption("--kills")
    print(f"repeat with --seed {seed} --kills {max_kills}")
    rng = random.Random(seed)
    stub = Stub(tmp_path)
    settings = [
        "--completion-windows",
        "24h,1s",
        "--stop-grace",
        "20ms",
        "--max-concurrent-batches",
        "3",
    ]
    server = serve(*settings, plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 16\n")})
    plans, kills = [], []
    try:
        while len(kills) < max_kills:
            end = time.monotonic() + rng.uniform(0, 0.4)
            while time.monotonic() < end:
                running = [plan for plan in plans if alive(server, plan)]
                if len(running) < 4:
                    plans.append(Plan(rng, len(plans)))
                    running.append(plans[-1])
                advance(server, rng.choice(running))
            server.kill()
            kills.append(time.time())
            server.start()
        for plan in plans:
            wait_for(
                lambda plan=plan: advance(server, plan) or plan.id, what="the batch to be created"
            )
            check(server, plan, server.ended(plan.id))
        # Interrupted uploads and interrupted output files leave no object behind.
        wait_for(lambda: not leftovers(server), what="removal of leftover objects")
        arrivals = {
            prompt: [at / 1000 for at in times] for prompt, times in stub.ask("/arrivals").items()
        }
    finally:
        stub.kill()
    for prompt, times in arrivals.items():
        for sent, again in itertools.pairwise(times):
            assert any(sent - ARRIVAL_SLACK <= killed <= again for killed in kills), (
                f"{prompt} was sent twice without a kill in between"
            )
    twice = sum(len(times) > 1 for times in arrivals.values())
    print(
        f"{len(kills)} kills, {len(plans)} batches, {len(arrivals)} prompts, "
        f"{twice} of them sent more than once"
    )
    # Only requests in flight, or answered and not yet committed, may be sent again.
    assert sum(len(times) - 1 for times in arrivals.values()) <= len(kills) * 3 * (16 + 256)
    assert len({plan.id for plan in plans}) == len(plans) == len(list(server.client.batches.list()))


def check(server, plan, batch):
    output, errors = server.results(batch)
    counts = batch.request_counts
    assert batch.status in (("cancelled",) if plan.cancelled else ("completed", "expired")), batch
    for lines in (output, errors):
        numbers = [int(line["custom_id"]) for line in lines]
        assert numbers == sorted(numbers)
    assert sorted(int(line["custom_id"]) for line in output + errors) == list(
        range(len(plan.prompts))
    ), batch
    for line in output:
        content = line["response"]["body"]["choices"][0]["message"]["content"]
        assert content == "stub: " + plan.prompts[int(line["custom_id"])]
    assert {line["error"]["code"] for line in errors} <= {f"batch_{batch.status}"}
    assert (counts.total, counts.completed, counts.failed) == (len(plan.prompts), len(output), 0)
    assert batch.usage.input_tokens == 7 * len(output)
