"""Metrics: what `/metrics` shows, who may read it, and what clients cannot do to it."""

import socket
import urllib.error
import urllib.request
from pathlib import Path

from conftest import chat, wait_for
from prometheus_client.parser import text_string_to_metric_families

ADMIN_LISTENER = ("--admin-listen", "127.0.0.1:0")


def scrape(url, key=None):
    """Returns the status, the content type and the text of `/metrics`."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(f"{url}/metrics", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["content-type"], error.read().decode()


def samples(url, key=None):
    """Returns the value of each series by name and labels."""
    status, kind, text = scrape(url, key)
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def labels(found, name, label):
    """Returns the values of a label of a metric."""
    return {dict(pairs)[label] for metric, pairs in found if metric == name}


def documented():
    """Returns the names and the types of the metrics in the reference."""
    page = Path(__file__).parents[2].joinpath("docs/reference/metrics.md").read_text()
    rows = [row.split(" | ") for row in page.splitlines() if row.startswith("| `")]
    return {row[0].strip("| `"): row[1] for row in rows}


def test_metrics_are_those_of_the_reference_and_follow_what_happens(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    before = samples(server.url)
    assert before["batchwright_plugins", (("state", "loaded"),)] >= 1
    assert before["batchwright_provider_exchanges_in_flight", (("plugin", "p"),)] == 0
    batch = server.create([chat("slow", "!delay 3000 slow", model="m")])
    in_flight = ("batchwright_provider_exchanges_in_flight", (("plugin", "p"),))
    wait_for(lambda: samples(server.url)[in_flight] == 1, what="the exchange in flight")
    server.ended(batch.id)
    wait_for(lambda: samples(server.url)[in_flight] == 0, what="the end of the exchange")
    after = samples(server.url)
    created = (("method", "POST"), ("route", "/v1/batches"), ("status", "200"))
    assert after["batchwright_http_requests_total", created] == 1
    route = (("method", "POST"), ("route", "/v1/batches"))
    assert after["batchwright_http_request_duration_seconds_count", route] == 1
    _, _, text = scrape(server.url)
    found = {family.name: family.type for family in text_string_to_metric_families(text)}
    for name, kind in documented().items():
        assert found.get(name.removesuffix("_total") if kind == "counter" else name) == kind, name
    ours = {name for name in found if name.startswith("batchwright_")}
    assert ours == {name.removesuffix("_total") for name in documented()}


def test_series_of_a_removed_plugin_are_gone(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"]), "q": stub.plugin(["n"])})
    metric = "batchwright_provider_exchanges_limit"
    assert {"p", "q"} <= labels(samples(server.url), metric, "plugin")
    server.plugins.joinpath("q.toml").unlink()
    wait_for(lambda: "q" not in labels(samples(server.url), metric, "plugin"), what="removal")
    assert "p" in labels(samples(server.url), metric, "plugin")


def test_clients_make_no_series(serve):
    server = serve()
    for number in range(50):
        for path in (f"/{number}", f"/v1/{number}", f"/v1/files/file-{number}", f"/%ff{number}"):
            try:
                urllib.request.urlopen(server.url + path, timeout=30)
            except urllib.error.HTTPError as error:
                error.read()
        request = urllib.request.Request(f"{server.url}/v1/files", method=f"SCAN{number}")
        try:
            urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            error.read()
    # The same route below another prefix.
    urllib.request.urlopen(f"{server.url}/v1/openai/v1/files", timeout=30).read()
    found = samples(server.url)
    metric = "batchwright_http_requests_total"
    routes = labels(found, metric, "route")
    print(f"\nroutes after a scan: {sorted(routes)}")
    assert "unknown" in routes and "/v1/files" in routes
    assert not any(letter.isdigit() for route in routes for letter in route.removeprefix("/v1"))
    assert labels(found, metric, "method") <= {"GET", "POST", "HEAD", "DELETE", "OPTIONS", "other"}


def test_metrics_need_an_admin_key_where_there_are_keys(tenants):
    url = tenants.server.url
    status, _, body = scrape(url)
    assert status == 401 and "batchwright_" not in body
    status, _, body = scrape(url, tenants.project("p")[1].api_key.value)
    assert status == 403 and "batchwright_" not in body
    assert ("batchwright_plugins", (("state", "failed"),)) in samples(url, tenants.key)


def test_admin_listener_serves_metrics_when_the_api_has_no_connection_left(serve):
    server = serve(*ADMIN_LISTENER, "--max-connections", "1")
    admin = server.child.stdout.readline().split()[-1]
    host, port = server.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(40)]
    try:
        assert labels(samples(admin), "batchwright_memory_pool_size_bytes", "pool") == {
            "lines",
            "exchanges",
            "validation",
            "custom_ids",
            "finalizing",
            "clients",
            "instances",
        }
    finally:
        for connection in held:
            connection.close()
