"""Usage, costs, budgets and rate limits of projects, and the tokens of batches that are open."""

import sqlite3
import time

import pytest
from conftest import CHAT, chat, jsonl, run_host, wait_for
from tenants import Tenants, error_of, request

DAY = 86_400

# The stub answers with 7 input tokens, 2 of them cached, and 3 output tokens: 12 micro-dollars.
PRICES = """
[[prices]]
model = "stub"
input = 9
from = 2020-01-01
[[prices]]
model = "stub"
input = 1
cached_input = 0.5
output = 2
from = 2025-01-01
"""

STUB_COST = 0.000012


@pytest.fixture
def paid(serve, stub, tmp_path):
    """Returns tenants of a server whose model `stub` has a price and `free` has none."""

    def start(settings=""):
        config = tmp_path / "batchwright.toml"
        config.write_text(PRICES + settings)
        plugin = stub.plugin(["stub", "free"])
        return Tenants(serve, tmp_path, "--config", config, plugins={"stub": plugin})

    return start


def create(client, lines):
    file = client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def lines(count, prefix="", model="stub", text="hello"):
    return [
        chat(f"{prefix}{number}", f"{prefix}{text} {number}", model=model)
        for number in range(count)
    ]


def ended(client, batch, seconds=60):
    def look():
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "cancelled", "expired") else None

    return wait_for(look, seconds, f"the end of {batch.id}")


def completed(client, batch, count):
    """Waits until a number of requests of a batch have a result."""

    def look():
        return client.batches.retrieve(batch.id).request_counts.completed == count

    wait_for(look, 30, f"{count} results of {batch.id}")


def waiting(tenants, key, batch, part):
    """Waits until a batch waits for something whose message has a part; returns the message."""

    def look():
        _, body = request(tenants.server, f"/v1/batches/{batch.id}/plugins", key)
        message = (body["waiting"] or {}).get("message", "")
        return message if part in message else None

    return wait_for(look, 30, f"the wait of {batch.id} for {part}")


def totals(tenants, kind="completions", **more):
    """Returns the results of all buckets since yesterday."""
    start = int(time.time()) - DAY
    report = getattr(tenants.admin.usage, kind)
    return [result for bucket in report(start_time=start, **more).data for result in bucket.results]


def test_sdk_creates_a_tenant_runs_a_batch_and_reads_usage_and_costs(paid):
    tenants = paid()
    projects = tenants.admin.projects
    project, account, client = tenants.project("Acme")
    _, _, other = tenants.project("Globex")
    limits = projects.rate_limits.list_rate_limits(project.id)
    assert {limit.id: limit.max_requests_per_1_minute for limit in limits} == {
        "rl-free": None,
        "rl-stub": None,
    }
    updated = projects.rate_limits.update_rate_limit(
        "rl-stub", project_id=project.id, max_requests_per_1_minute=500
    )
    assert (updated.object, updated.model) == ("project.rate_limit", "stub")
    budget = projects.spend_limit.update(
        project.id, currency="USD", interval="month", threshold_amount=1000
    )
    assert (budget.threshold_amount, budget.enforcement.status) == (1000, "inactive")

    batch = ended(client, create(client, lines(3) + lines(2, "f", "free")))
    assert batch.request_counts.completed == 5
    run_batch_of(other, 1)

    (mine,) = totals(tenants, project_ids=[project.id])
    assert (mine.num_model_requests, mine.input_tokens, mine.output_tokens) == (5, 35, 15)
    assert (mine.input_cached_tokens, mine.project_id, mine.model) == (10, None, None)
    groups = totals(tenants, group_by=["project_id", "api_key_id", "model", "batch"])
    found = {(group.project_id, group.model): group for group in groups}
    assert len(found) == 3
    group = found[project.id, "stub"]
    assert (group.num_model_requests, group.batch) == (3, True)
    assert group.api_key_id == account.api_key.id
    # The key of a project reads the usage of its own project alone.
    answer = request(
        tenants.server,
        f"/v1/organization/usage/completions?start_time={int(time.time()) - DAY}",
        account.api_key.value,
    )[1]
    assert sum(r["num_model_requests"] for b in answer["data"] for r in b["results"]) == 5

    start = int(time.time()) - DAY
    costs = tenants.admin.usage.costs(
        start_time=start, group_by=["project_id", "line_item"], project_ids=[project.id]
    )
    items = {item.line_item: item for bucket in costs.data for item in bucket.results}
    assert items["stub, input_tokens"].amount.value == pytest.approx(15e-6)
    assert items["stub, input_tokens"].quantity == 15
    assert items["stub, cached_input_tokens"].amount.value == pytest.approx(3e-6)
    assert items["stub, output_tokens"].amount.value == pytest.approx(18e-6)
    # A model without a price: its usage counts, and its cost is said to be unknown.
    assert items["free, input_tokens"].amount.value == 0
    assert items["free, input_tokens"].unpriced_requests == 2
    (total,) = [
        result
        for bucket in tenants.admin.usage.costs(
            start_time=start, project_ids=[project.id], limit=2
        ).data
        for result in bucket.results
    ]
    assert total.amount.value == pytest.approx(3 * STUB_COST)
    assert (total.amount.currency, total.unpriced_requests) == ("usd", 2)

    # Usage outlives the key.
    projects.api_keys.delete(account.api_key.id, project_id=project.id)
    (kept,) = totals(tenants, api_key_ids=[account.api_key.id])
    assert kept.num_model_requests == 5
    assert error_of(lambda: client.batches.list())[0] == 401
    assert projects.spend_limit.delete(project.id).deleted
    assert error_of(lambda: projects.spend_limit.retrieve(project.id))[0] == 404


def run_batch_of(client, count, **more):
    return ended(client, create(client, lines(count, **more)))


def test_usage_is_reported_by_time_and_page(paid):
    tenants = paid()
    _, _, client = tenants.project("Acme")
    run_batch_of(client, 2)
    usage = tenants.admin.usage.completions
    now = int(time.time())
    minutes = usage(start_time=now - 600, bucket_width="1m", limit=1440)
    assert sum(len(bucket.results) for bucket in minutes.data) == 1
    assert all(bucket.end_time - bucket.start_time == 60 for bucket in minutes.data)
    assert minutes.data[0].start_time % 60 == 0 and not minutes.has_more
    page = usage(start_time=now - 3 * DAY, end_time=now + 1, limit=2)
    assert len(page.data) == 2 and page.has_more
    rest = usage(start_time=now - 3 * DAY, end_time=now + 1, limit=31, page=page.next_page)
    assert not rest.has_more
    assert rest.data[0].start_time == page.data[1].end_time
    assert sum(r.num_model_requests for b in rest.data for r in b.results) == 2
    assert totals(tenants, "embeddings") == [] and totals(tenants, batch=False) == []
    for more in [
        {"bucket_width": "2h"},
        {"group_by": ["user_id"]},
        {"user_ids": ["user-1"]},
        {"limit": 32},
        {"page": "page_x"},
        {"page": "page_1"},
    ]:
        status, error = error_of(lambda more=more: usage(start_time=now - 3 * DAY, **more))
        assert status == 400 and error["param"] in more, error
    path = "/v1/organization/usage/completions"
    assert request(tenants.server, path, tenants.key)[0] == 400


def test_spent_budget_stops_new_requests_and_those_in_flight_finish(paid):
    tenants = paid()
    project, account, client = tenants.project("Acme")
    _, _, other = tenants.project("Globex")
    spend = tenants.admin.projects.spend_limit
    # The first cent is spent after 834 requests; a budget of nothing lets none begin.
    spend.update(project.id, currency="USD", interval="month", threshold_amount=0)
    batch = create(client, lines(3))
    key = account.api_key.value
    waiting(tenants, key, batch, "billing_hard_limit_reached")
    assert client.batches.retrieve(batch.id).request_counts.completed == 0
    assert spend.retrieve(project.id).enforcement.status == "enforcing"
    assert run_batch_of(other, 1).request_counts.completed == 1
    spend.update(project.id, currency="USD", interval="month", threshold_amount=1)
    assert ended(client, batch).request_counts.completed == 3

    large = create(client, lines(2000, "large "))

    def spent():
        status = spend.retrieve(project.id).enforcement.status
        return status == "enforcing"

    wait_for(spent, 60, "the end of the budget")
    waiting(tenants, key, large, "budget of $0.01")
    done = client.batches.retrieve(large.id).request_counts.completed
    assert 800 <= done <= 1200, "what is in flight counts too"
    # The money stays spent over a crash.
    tenants.server.kill()
    tenants.server.start()
    assert client_of(tenants, account).batches.retrieve(large.id).request_counts.completed == done
    tenants = restarted(tenants)
    spend = tenants.admin.projects.spend_limit
    assert spend.retrieve(project.id).enforcement.status == "enforcing"
    spend.delete(project.id)
    assert ended(client_of(tenants, account), large).request_counts.completed == 2000
    assert sum(r.num_model_requests for r in totals(tenants, project_ids=[project.id])) == 2003


def client_of(tenants, account):
    return tenants.client(account.api_key.value)


def restarted(tenants):
    """Returns tenants whose clients have the address of the restarted server."""
    again = object.__new__(Tenants)
    again.key, again.server = tenants.key, tenants.server
    again.admin = again.client("none", admin_api_key=tenants.key).admin.organization
    return again


def limit(tenants, project, model="stub", **limits):
    return tenants.admin.projects.rate_limits.update_rate_limit(
        f"rl-{model}", project_id=project.id, **limits
    )


def test_requests_per_day_are_exact_over_batches_retries_and_crashes(paid, stub):
    tenants = paid()
    project, account, client = tenants.project("Acme")
    limit(tenants, project, max_requests_per_1_day=5)
    assert run_batch_of(client, 2).request_counts.completed == 2
    # A retried request counts once.
    retried = ended(client, create(client, [chat("r", "!fail 1 once", model="stub")]))
    assert retried.request_counts.completed == 1
    batch = create(client, lines(4, "late "))
    completed(client, batch, 2)
    key = account.api_key.value
    assert "max_requests_per_1_day" in waiting(tenants, key, batch, "5 requests per day")
    other = create(client, lines(1, "free ", "free"))
    assert ended(client, other).request_counts.completed == 1
    tenants.server.kill()
    tenants.server.start()
    tenants = restarted(tenants)
    client = client_of(tenants, account)
    waiting(tenants, key, batch, "5 requests per day")
    assert client.batches.retrieve(batch.id).request_counts.completed == 2
    limit(tenants, project, max_requests_per_1_day=6)
    completed(client, batch, 3)
    waiting(tenants, key, batch, "6 requests per day")
    limit(tenants, project, max_requests_per_1_day=None)
    assert ended(client, batch).request_counts.completed == 4
    late = {prompt: count for prompt, count in stub.counts().items() if prompt.startswith("late")}
    assert late == {f"late hello {number}": 1 for number in range(4)}


def test_jobs_of_a_provider_count_from_their_start_and_are_polled_to_their_end(paid, stub):
    tenants = paid()
    project, account, client = tenants.project("Acme")
    limit(tenants, project, max_requests_per_1_day=3)
    jobs = [
        {
            "custom_id": f"job {number}",
            "method": "POST",
            "url": "/v1/responses",
            "body": {"model": "stub", "input": f"job {number}", "background": True},
        }
        for number in range(8)
    ]
    file = client.files.create(file=("in.jsonl", jsonl(jobs)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/responses", completion_window="24h"
    )
    wait_for(lambda: len(stub.counts()) == 3, what="the first jobs")
    # The money ends while the provider works; its results are fetched all the same.
    spend = tenants.admin.projects.spend_limit
    spend.update(project.id, currency="USD", interval="month", threshold_amount=0)
    tenants.server.kill()
    tenants.server.start()
    tenants = restarted(tenants)
    client = client_of(tenants, account)
    completed(client, batch, 3)
    assert sum(stub.counts().values()) == 3, "a job began beyond the limit"
    waiting(tenants, account.api_key.value, batch, "budget of $0.00")
    spend = tenants.admin.projects.spend_limit
    spend.delete(project.id)
    limit(tenants, project, max_requests_per_1_day=None)
    assert ended(client, batch).request_counts.completed == 8
    assert sum(stub.counts().values()) == 8


def test_requests_and_tokens_per_minute_hold_for_a_project_and_no_other(paid):
    tenants = paid()
    project, account, client = tenants.project("Acme")
    _, _, other = tenants.project("Globex")
    limit(tenants, project, max_requests_per_1_minute=3)
    batch = create(client, lines(8))
    completed(client, batch, 3)
    key = account.api_key.value
    waiting(tenants, key, batch, "3 requests per minute")
    assert run_batch_of(other, 8).request_counts.completed == 8
    assert client.batches.retrieve(batch.id).request_counts.completed == 3
    limit(tenants, project, max_requests_per_1_minute=None, max_tokens_per_1_minute=30)
    waiting(tenants, key, batch, "30 tokens per minute")
    limit(tenants, project, max_tokens_per_1_minute=None)
    assert ended(client, batch).request_counts.completed == 8


def test_alias_shares_the_limit_of_its_model_and_has_none_of_its_own(serve, stub, tmp_path):
    plugin = stub.plugin(["stub"]).replace("[settings]", '[aliases]\nnick = "stub"\n[settings]')
    tenants = Tenants(serve, tmp_path, plugins={"stub": plugin})
    project, account, client = tenants.project("Acme")
    status, error = error_of(lambda: limit(tenants, project, "nick", max_requests_per_1_day=1))
    assert (status, error["param"]) == (400, "rate_limit_id")
    assert "set the limits of 'rl-stub'" in error["message"]
    limit(tenants, project, max_requests_per_1_day=2)
    assert run_batch_of(client, 1).request_counts.completed == 1
    batch = create(client, lines(3, "nick ", "nick"))
    completed(client, batch, 1)
    waiting(tenants, account.api_key.value, batch, "2 requests per day")
    assert [found.model for found in totals(tenants, group_by=["model"])] == ["stub"]


def test_batch_beyond_the_enqueued_tokens_fails_until_others_have_ended(paid):
    tenants = paid()
    project, account, client = tenants.project("Acme")
    limit(tenants, project, batch_1_day_max_input_tokens=400)
    slow = [chat("slow", "!delay 60000 " + "x" * 1000, model="stub")]
    first = create(client, slow)
    wait_for(lambda: client.batches.retrieve(first.id).status == "in_progress")
    large = ended(client, create(client, [chat("1", "y" * 1000, model="stub")]))
    assert large.status == "failed"
    (error,) = large.errors.data
    assert error.code == "token_limit_exceeded"
    assert "Enqueued token limit reached for stub" in error.message
    assert "400" in error.message
    # Another model has no limit, and a small batch fits.
    assert run_batch_of(client, 1, model="free", text="y" * 1000).status == "completed"
    assert run_batch_of(client, 1).status == "completed"
    client.batches.cancel(first.id)
    ended(client, first)
    assert (
        ended(client, create(client, [chat("1", "z" * 1000, model="stub")])).status == "completed"
    )
    assert reserved(tenants) == set()


def test_batch_waits_for_enqueued_tokens_if_the_operator_says_so(paid):
    tenants = paid('[tenant_defaults]\nwhen_over_limit = "wait"\n')
    project, account, client = tenants.project("Acme")
    limit(tenants, project, batch_1_day_max_input_tokens=400)
    first = create(client, [chat("slow", "!delay 60000 " + "x" * 1000, model="stub")])
    wait_for(lambda: client.batches.retrieve(first.id).status == "in_progress")
    second = create(client, [chat("1", "y" * 1000, model="stub")])
    never = ended(client, create(client, [chat("1", "z" * 10_000, model="stub")]))
    assert (never.status, never.errors.data[0].code) == ("failed", "token_limit_exceeded")
    wait_for(lambda: reserved(tenants) == {first.id, second.id}, what="the wait of a batch")
    assert client.batches.retrieve(second.id).status == "validating"
    # What is reserved is what is open, also after a crash.
    tenants.server.kill()
    assert reserved(tenants) == {first.id, second.id}
    tenants.server.start()
    client = tenants.client(account.api_key.value)
    assert client.batches.retrieve(second.id).status == "validating"
    client.batches.cancel(first.id)
    assert ended(client, second).status == "completed"
    ended(client, first)
    assert reserved(tenants) == set()


def reserved(tenants):
    """Returns the batches that have reserved tokens, each of which must be open."""
    with sqlite3.connect(f"file:{tenants.server.data}/batchwright.db?mode=ro", uri=True) as db:
        rows = db.execute(
            "SELECT id, status FROM batch_tokens JOIN batches ON batches.key = batch_tokens.batch"
        ).fetchall()
    assert all(status in ("validating", "in_progress", "cancelling") for _, status in rows), rows
    return {batch for batch, _ in rows}


def test_commands_set_budgets_and_limits_and_report_usage(paid, tmp_path):
    tenants = paid()
    _, _, client = tenants.project("Acme")

    def command(*arguments):
        environment = {"BATCHWRIGHT_ADMIN_KEY": tenants.key, "BATCHWRIGHT_URL": tenants.server.url}
        done = run_host("admin", *arguments, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert command("budget", "set", "acme", "12.50").startswith(
        "budget $12.50 a month, spent $0.00"
    )
    shown = command("limits", "model", "acme", "stub", "--requests-per-minute", "600")
    assert "stub: max_requests_per_1_minute 600" in shown
    assert "weight                     3" in command("limits", "set", "acme", "--weight", "3")
    run_batch_of(client, 2)
    run_batch_of(client, 1, model="free")
    report = command("usage", "--project", "acme")
    assert "acme  stub" in report and "$0.0000" in report
    assert "and requests without a price: 1" in report
    file = tmp_path / "tenants.toml"
    file.write_text(
        '[projects.acme]\nmonthly_budget = "20"\n[projects.acme.limits]\nweight = 4\n'
        "[projects.acme.model_limits.stub]\nmax_tokens_per_1_minute = 9000\n"
    )
    differences = command("apply", str(file))
    assert "acme: monthly_budget $12.50 -> $20.00" in differences
    assert "acme: stub: max_tokens_per_1_minute none -> 9000" in differences
    assert "acme: weight 3 -> 4" in differences
    assert command("apply", str(file)) == "nothing to change\n"
    for text, part in [
        ('[projects.acme]\nmonthly_budget = "20.005"', "monthly_budget"),
        ("[projects.acme.limits]\nweight = 0", "weight: expected 1 to 1000"),
    ]:
        file.write_text(text)
        done = run_host("admin", "apply", str(file), env={"BATCHWRIGHT_ADMIN_KEY": tenants.key})
        assert done.returncode != 0 and part in done.stderr, done.stderr


def test_wrong_prices_limits_and_budgets_are_refused(paid, tmp_path):
    tenants = paid()
    project, _, _ = tenants.project("Acme")
    spend = tenants.admin.projects.spend_limit
    for more, param in [
        ({"currency": "EUR", "interval": "month", "threshold_amount": 1}, "currency"),
        ({"currency": "USD", "interval": "day", "threshold_amount": 1}, "interval"),
        ({"currency": "USD", "interval": "month", "threshold_amount": -1}, "threshold_amount"),
        ({"currency": "USD", "interval": "month", "threshold_amount": 10**12}, "threshold_amount"),
    ]:
        status, error = error_of(lambda more=more: spend.update(project.id, **more))
        assert (status, error["param"]) == (400, param)
    status, error = error_of(lambda: limit(tenants, project, max_images_per_1_minute=1))
    assert (status, error["code"]) == (400, "unknown_parameter")
    assert error_of(lambda: limit(tenants, project, max_requests_per_1_minute=-1))[0] == 400
    rates = tenants.admin.projects.rate_limits
    assert error_of(lambda: rates.update_rate_limit("x", project_id=project.id))[0] == 404
    assert error_of(lambda: rates.update_rate_limit("rl-x", project_id="proj_x"))[0] == 404
    config = tmp_path / "wrong.toml"
    config.write_text(
        '[[prices]]\nmodel = "a"\ninput = -1\n\n[[prices]]\nmodel = "b"\n[[prices]]\n'
        'model = "c"\ninput = 1\nfrom = 12:00:00\n[[prices]]\nmodel = "d"\ninput = 1\n'
        '[[prices]]\nmodel = "d"\ninput = 2\n'
    )
    done = run_host("serve", "--config", config, "--data", tmp_path / "no")
    assert done.returncode != 0
    for line, part in [
        (1, "`input` is -1"),
        (5, "missing field `input`"),
        (7, "`from` is 12:00:00"),
        (14, "`d` has two prices from the same day"),
    ]:
        assert f"line {line}: prices: {part}" in done.stderr, done.stderr
