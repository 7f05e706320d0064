"""Shares of tenants: waiting times beside a greedy tenant, of many tenants, and by weight."""

import concurrent.futures
import statistics
import time

import httpx2
import pytest
from conftest import CHAT, Stub, chat, jsonl, wait_for
from tenants import Tenants, request

pytestmark = pytest.mark.quiet

PLUGIN_LIMITS = "[limits]\nmax_in_flight = 8\n"


@pytest.fixture
def shared(serve, stub, tmp_path):
    """Returns tenants whose provider answers eight requests at a time."""

    def start(latency, *arguments):
        stub.ask(f"/mode?latency={latency}")
        return Tenants(
            serve, tmp_path, *arguments, plugins={"p": stub.plugin(["m"], PLUGIN_LIMITS)}
        )

    return start


class Client:
    """Client of one tenant."""

    def __init__(self, tenants, name):
        self.name = name
        path = "/v1/organization/projects"
        _, project = request(tenants.server, path, tenants.key, "POST", body={"name": name})
        self.project = project["id"]
        path = f"{path}/{self.project}/service_accounts"
        _, account = request(tenants.server, path, tenants.key, "POST", body={"name": "tests"})
        headers = {"authorization": f"Bearer {account['api_key']['value']}"}
        self.http = httpx2.Client(base_url=tenants.server.url + "/v1", headers=headers, timeout=120)

    def create(self, count, prefix="", **more):
        """Creates a batch; returns its id."""
        lines = [chat(str(line), f"{self.name} {prefix}{line}", model="m") for line in range(count)]
        return self.send(lines, **more)

    def send(self, lines, **more):
        """Creates a batch of lines; returns its id."""
        form = {"purpose": "batch"}
        file = self.http.post("/files", data=form, files={"file": ("in.jsonl", jsonl(lines))})
        body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        return self.http.post("/batches", json={**body, **more}).json()["id"]

    def get(self, batch):
        return self.http.get(f"/batches/{batch}").json()

    def ended(self, batch, seconds=120):
        def look():
            found = self.get(batch)
            return found if found["status"] == "completed" else None

        return wait_for(look, seconds, f"the end of {batch} of {self.name}")


def arrivals(stub):
    """Returns the name of the tenant of each request, in the order of their arrival."""
    times = [
        (at, prompt.split()[0]) for prompt, found in stub.ask("/arrivals").items() for at in found
    ]
    return [name for _, name in sorted(times)]


def test_greedy_tenant_delays_the_others_by_what_is_in_flight(shared, stub):
    tenants = shared("20")
    greedy = Client(tenants, "greedy")
    large = [greedy.create(1000, f"{number} ") for number in range(20)]
    wait_for(lambda: len(arrivals(stub)) > 100, what="requests of the greedy tenant")
    modest = [Client(tenants, f"modest{number}") for number in range(9)]

    def run(client):
        started = time.monotonic()
        client.ended(client.create(10))
        return time.monotonic() - started

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        waits = list(pool.map(run, modest))
    served = sum(greedy.get(batch)["request_counts"]["completed"] for batch in large)
    print("\ntenant    requests  seconds")
    print(f"greedy       20000  {served} served meanwhile")
    for client, wait in zip(modest, waits, strict=True):
        print(f"{client.name}      10  {wait:.2f}")
    order = arrivals(stub)
    for client in modest:
        first = order.index(client.name)
        last = len(order) - 1 - order[::-1].index(client.name)
        of_greedy = order[first:last].count("greedy")
        # Ten tenants share eight places, so the greedy one gets about as many requests.
        assert of_greedy <= 10 + 2 * 8, f"{of_greedy} requests overtook {client.name}"
    assert served < 20_000
    for batch in large:
        greedy.http.post(f"/batches/{batch}/cancel")


def test_thousand_tenants_with_a_batch_each_all_finish(shared, stub):
    tenants = shared("2")
    began = resident(tenants.server)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = list(pool.map(lambda number: Client(tenants, f"t{number}"), range(1000)))
        started = time.monotonic()
        batches = list(pool.map(lambda client: client.create(1), clients))
        created = time.monotonic() - started
        ended = list(
            pool.map(lambda pair: pair[0].ended(pair[1]), zip(clients, batches, strict=True))
        )
    assert all(batch["request_counts"]["completed"] == 1 for batch in ended)
    waits = [batch["completed_at"] - batch["created_at"] for batch in ended]
    print(
        f"\n1000 tenants: created in {created:.1f} s; seconds from creation to end: median "
        f"{statistics.median(waits)}, maximum {max(waits)}; memory {began} MiB, then "
        f"{resident(tenants.server)} MiB"
    )
    assert sum(stub.counts().values()) == 1000


def resident(server):
    """Returns the resident memory of a server in MiB."""
    with open(f"/proc/{server.child.pid}/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def test_tenants_share_a_provider_by_weight(shared, stub):
    tenants = shared("20")
    clients = [Client(tenants, name) for name in ("light", "heavy")]
    for client, weight in zip(clients, (1, 3), strict=True):
        path = f"/v1/organization/projects/{client.project}/limits"
        status, body = request(tenants.server, path, tenants.key, "POST", body={"weight": weight})
        assert (status, body["weight"]) == (200, weight)
    batches = [client.create(1500) for client in clients]
    wait_for(lambda: arrivals(stub).count("heavy") > 1000, 60, "requests of the heavy tenant")
    order = arrivals(stub)
    # From where both have begun.
    begun = max(order.index("light"), order.index("heavy"))
    ratio = order[begun:].count("heavy") / order[begun:].count("light")
    print(f"\nweights 3 to 1: {ratio:.2f} to 1 requests")
    assert 2.2 < ratio < 4.5
    for client, batch in zip(clients, batches, strict=True):
        client.http.post(f"/batches/{batch}/cancel")


def test_raised_limit_of_requests_in_flight_reaches_the_requests_that_wait(serve, stub, tmp_path):
    tenants = Tenants(serve, tmp_path, plugins={"p": stub.plugin(["m"])})
    client = Client(tenants, "limited")
    path = f"/v1/organization/projects/{client.project}/limits"

    def limit(number):
        body = {"max_requests_in_flight": number}
        assert request(tenants.server, path, tenants.key, "POST", body=body)[0] == 200

    limit(1)
    batch = client.send([chat("slow", "!delay 20000 slow", model="m")])
    wait_for(lambda: stub.counts(), what="the slow request")
    quick = client.send([chat(str(line), f"quick {line}", model="m") for line in range(3)])
    time.sleep(1)
    assert len(stub.counts()) == 1, "a request was sent beyond the limit"
    limit(4)
    assert client.ended(quick)["request_counts"]["completed"] == 3
    assert client.get(batch)["request_counts"]["completed"] == 0, (
        "the place was freed by the slow request"
    )
    client.http.post(f"/batches/{batch}/cancel")


def test_requests_in_flight_of_a_project_are_limited_over_all_plugins(serve, stub, tmp_path):
    other = Stub(tmp_path, "other")
    try:
        plugins = {"p": stub.plugin(["m"]), "q": other.plugin(["n"])}
        tenants = Tenants(serve, tmp_path, plugins=plugins)
        client = Client(tenants, "limited")
        path = f"/v1/organization/projects/{client.project}/limits"
        body = {"max_requests_in_flight": 3}
        assert request(tenants.server, path, tenants.key, "POST", body=body)[0] == 200
        lines = [
            chat(f"{model}{line}", f"!delay 300 {model} {line}", model=model)
            for line in range(6)
            for model in ("m", "n")
        ]
        assert client.ended(client.send(lines))["request_counts"]["completed"] == 12
        times = sorted(
            at
            for provider in (stub, other)
            for found in provider.ask("/arrivals").values()
            for at in found
        )
        scale = 1000 if times[-1] - times[0] > 100 else 1
        for first, fourth in zip(times, times[3:], strict=False):
            assert fourth - first >= 0.25 * scale, "more than three requests at a time"
    finally:
        other.kill()
