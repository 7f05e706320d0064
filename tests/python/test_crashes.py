"""A server that is killed at any moment, again and again, loses nothing, doubles nothing and asks nothing twice without need.

`cargo xtask test killed -- --seed 7 --kills 300` repeats a run, or makes it longer.
"""

import random
import time

import openai
from conftest import CHAT, Stub, chat, jsonl, leftovers, wait_for

# How late the provider may note a request that was on its way when the server died.
SLACK = 0.25


class Plan:
    """One batch: what was asked, and what was done to it."""

    def __init__(self, chance, number):
        self.number = number
        self.key = f"batch-{number}"
        self.prompts = [f"!delay {chance.choice([0, 0, 2, 5, 20])} {number}-{line}" for line in range(chance.randint(1, 500))]
        self.window = chance.choice(["24h", "24h", "24h", "1s"])
        self.cancel_after = chance.choice([None, None, None, chance.uniform(0, 1)])
        self.id = None
        self.created = None
        self.cancelled = False

    def lines(self):
        return jsonl(chat(str(line), prompt, model="m") for line, prompt in enumerate(self.prompts))


def attempt(call):
    """What the call gives, or None if the server is not there."""
    try:
        return call()
    except openai.APIConnectionError:
        return None


def advance(server, plan):
    """Does the next thing for a batch, as a client with patience would."""
    client = server.client.with_options(timeout=5)
    if plan.id is None:
        file = attempt(lambda: client.files.create(file=("in.jsonl", plan.lines()), purpose="batch"))
        made = file and attempt(
            lambda: client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window=plan.window,
                extra_headers={"idempotency-key": plan.key},
            )
        )
        if made:
            plan.id, plan.created = made.id, time.monotonic()
    elif plan.cancel_after is not None and not plan.cancelled and time.monotonic() - plan.created > plan.cancel_after:
        try:
            plan.cancelled = attempt(lambda: client.batches.cancel(plan.id)) is not None
        except openai.ConflictError:
            plan.cancel_after = None


def alive(server, plan):
    batch = plan.id and attempt(lambda: server.client.with_options(timeout=5).batches.retrieve(plan.id))
    return batch is None or batch.status not in ("completed", "cancelled", "expired", "failed")


def test_a_server_that_is_killed_at_any_moment_loses_nothing(serve, tmp_path, request):
    seed = request.config.getoption("--seed") or random.randrange(1 << 32)
    most = request.config.getoption("--kills")
    print(f"repeat with --seed {seed} --kills {most}")
    chance = random.Random(seed)
    stub = Stub(tmp_path)
    settings = ["--completion-windows", "24h,1s", "--stop-grace", "20ms", "--max-concurrent-batches", "3"]
    server = serve(*settings, plugins={"p": stub.plugin(["m"], "[limits]\nconcurrency = 16\n")})
    plans, kills = [], []
    try:
        while len(kills) < most:
            end = time.monotonic() + chance.uniform(0, 0.4)
            while time.monotonic() < end:
                running = [plan for plan in plans if alive(server, plan)]
                if len(running) < 4:
                    plans.append(Plan(chance, len(plans)))
                    running.append(plans[-1])
                advance(server, chance.choice(running))
            server.kill()
            kills.append(time.time())
            server.start()
        for plan in plans:
            wait_for(lambda plan=plan: advance(server, plan) or plan.id, what="the creation")
            check(server, plan, server.ended(plan.id))
        # Uploads that were cut off, and files that were being made, leave nothing behind.
        wait_for(lambda: not leftovers(server), what="what was left half done to be gone")
        arrivals = {prompt: [at / 1000 for at in times] for prompt, times in stub.ask("/arrivals").items()}
    finally:
        stub.kill()
    for prompt, times in arrivals.items():
        for sent, again in zip(times, times[1:]):
            assert any(sent - SLACK <= killed <= again for killed in kills), f"{prompt} was sent twice with no crash between"
    twice = sum(len(times) > 1 for times in arrivals.values())
    print(f"{len(kills)} kills, {len(plans)} batches, {len(arrivals)} prompts, {twice} of them sent more than once")
    # Only what was in flight, or answered and not yet written, may be sent again.
    assert sum(len(times) - 1 for times in arrivals.values()) <= len(kills) * 3 * (16 + 256)
    assert len({plan.id for plan in plans}) == len(plans) == len(list(server.client.batches.list()))


def check(server, plan, batch):
    output, errors = server.results(batch)
    counts = batch.request_counts
    assert batch.status in (("cancelled",) if plan.cancelled else ("completed", "expired")), batch
    for lines in (output, errors):
        numbers = [int(line["custom_id"]) for line in lines]
        assert numbers == sorted(numbers)
    assert sorted(int(line["custom_id"]) for line in output + errors) == list(range(len(plan.prompts))), batch
    for line in output:
        said = line["response"]["body"]["choices"][0]["message"]["content"]
        assert said == "stub: " + plan.prompts[int(line["custom_id"])]
    assert {line["error"]["code"] for line in errors} <= {f"batch_{batch.status}"}
    assert (counts.total, counts.completed, counts.failed) == (len(plan.prompts), len(output), 0)
    assert batch.usage.input_tokens == 7 * len(output)
