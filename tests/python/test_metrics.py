"""Metrics: what `/metrics` shows, who may read it, and what clients cannot do to it."""

import socket
import urllib.error
import urllib.request
from pathlib import Path

from conftest import chat, wait_for
from prometheus_client.parser import text_string_to_metric_families
from tenants import Tenants, admin_key, request

ADMIN_LISTENER = ("--admin-listen", "127.0.0.1:0")


# Metrics that have no series until something happens: other tests make it happen.
RARE = {
    "batchwright_webhook_attempts",
    "batchwright_trace_spans_dropped",
    "batchwright_plugin_contract_violations",
    "batchwright_request_retries",
    "batchwright_batch_deadline_margin_seconds",
    "batchwright_tls_certificate_expiry_timestamp_seconds",
    "batchwright_last_backup_timestamp_seconds",
}


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


def answered(url):
    """Returns the answer of a request, or nothing if it is refused."""
    try:
        return urllib.request.urlopen(url, timeout=60)
    except urllib.error.HTTPError:
        return None


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
        name = name.removesuffix("_total") if kind == "counter" else name
        assert found.get(name) == kind or name in RARE, name
    ours = {name for name in found if name.startswith("batchwright_")}
    assert ours <= {name.removesuffix("_total") for name in documented()}


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


def series(found, name, **labels):
    """Returns the sum of the series of a metric that have these values of labels."""
    wanted = labels.items()
    return sum(
        value
        for (metric, pairs), value in found.items()
        if metric == name and wanted <= dict(pairs).items()
    )


def test_each_request_counts_once_by_what_the_operator_named(serve, stub):
    plugin = stub.plugin(["m", "any-*"], "[limits]\nmax_response_body = '1MiB'\n")
    server = serve("--retry-backoff", "10ms", "--max-attempts", "2", plugins={"p": plugin})
    prompts = ["hi", "!status 400 no", "!status 500 no", "!close", "!big 3000000"]
    lines = [chat(f"m-{place}", prompt, model="m") for place, prompt in enumerate(prompts)]
    # Names that clients invent are not values of labels.
    lines += [chat(f"any-{number}", "hi", model=f"any-{number}") for number in range(20)]
    batch = server.run(lines)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (21, 4)
    client = server.client.chat.completions
    client.create(model="any-x", messages=[{"role": "user", "content": "hi"}])
    stream = client.create(model="any-x", stream=True, messages=[{"role": "user", "content": "hi"}])
    assert len(list(stream)) > 1
    found = samples(server.url)

    def requests(**wanted):
        return series(found, "batchwright_requests_total", plugin="p", **wanted)

    assert requests(source="batch", model="m", outcome="succeeded") == 1
    assert requests(source="batch", model="m", outcome="failed") == 4
    assert requests(source="batch", model="any-*", outcome="succeeded") == 20
    assert requests(source="online", model="any-*", outcome="succeeded") == 2
    assert requests() == 27
    assert labels(found, "batchwright_requests_total", "model") == {"m", "any-*"}
    assert labels(found, "batchwright_requests_total", "tenant") == {""}
    usage = batch.usage
    tokens = {
        kind: series(found, "batchwright_tokens_total", source="batch", type=kind)
        for kind in ("input", "output")
    }
    assert tokens == {"input": usage.input_tokens, "output": usage.output_tokens}
    # The failed requests were tried twice, but for the response that is too large.
    attempts = "batchwright_request_attempts_total"
    assert series(found, attempts, verdict="failed") == 2
    assert series(found, attempts, verdict="no_response") == 3
    assert series(found, attempts, verdict="answered") == 22
    retries = "batchwright_request_retries_total"
    assert series(found, retries, cause="failed") == 1
    assert series(found, retries, cause="no_response") == 1
    exchanges = "batchwright_provider_exchanges_total"
    assert series(found, exchanges, status="500") == 2
    assert series(found, exchanges, status="400") == 1
    assert series(found, exchanges, status="too_large") == 1
    assert series(found, exchanges) == series(
        found, "batchwright_provider_exchange_duration_seconds_count"
    )
    duration = "batchwright_request_duration_seconds_count"
    assert series(found, duration, source="batch") == 25
    assert series(found, duration, source="online") == 2
    assert series(found, "batchwright_batches_finished_total", status="completed") == 1
    states = labels(found, "batchwright_batch_state_duration_seconds_count", "state")
    assert states == {"validating", "in_progress", "finalizing"}
    waits = labels(found, "batchwright_batch_queue_duration_seconds_count", "next")
    assert waits == {"validation", "execution"}


def test_expired_requests_count_as_overtaken_by_their_deadline(serve, stub):
    server = serve("--completion-windows=24h,2s", plugins={"p": stub.plugin(["m"])})
    lines = [chat("slow", "!delay 30000 slow", model="m"), chat("fast", "hi", model="m")]
    batch = server.client.batches.create(
        input_file_id=server.upload(lines).id,
        endpoint="/v1/chat/completions",
        completion_window="2s",
    )
    seen = wait_for(
        lambda: [
            found
            for found in [samples(server.url)]
            if ("batchwright_batch_deadline_margin_seconds", ()) in found
        ],
        what="a prediction",
    )
    assert series(seen[0], "batchwright_batches", status="in_progress") == 1
    assert server.ended(batch.id).status == "expired"
    found = samples(server.url)
    late = "batchwright_requests_after_deadline_total"
    assert series(found, late, outcome="expired") == 1
    assert series(found, "batchwright_requests_total", outcome="expired") == 1
    assert series(found, "batchwright_provider_exchanges_total", status="abandoned") == 1
    wait_for(
        lambda: series(samples(server.url), "batchwright_batches", status="in_progress") == 0,
        what="no open batch",
    )


def test_label_of_projects_has_the_number_of_values_that_the_operator_allows(serve, tmp_path):
    tenants = Tenants(serve, tmp_path, "--metrics-max-tenants", "2")
    slugs = []
    for name in ("one", "two", "three", "four"):
        project, _, client = tenants.project(name)
        client.chat.completions.create(model="echo", messages=[{"role": "user", "content": "hi"}])
        slugs.append(project.model_extra["slug"])
    found = samples(tenants.server.url, tenants.key)
    by_tenant = {
        dict(pairs)["tenant"]: value
        for (name, pairs), value in found.items()
        if name == "batchwright_requests_total"
    }
    assert by_tenant == {slugs[0]: 1, slugs[1]: 1, "other": 2}


def test_metrics_that_are_off_are_not_served(serve):
    server = serve("--metrics", "false")
    assert server.run([chat("a", model="echo")]).status == "completed"
    status, _, body = scrape(server.url)
    assert status == 404 and "metrics = true" in body


def test_key_with_the_scope_of_metrics_reads_nothing_else(serve, tmp_path):
    data = tmp_path / "server/data"
    admin = admin_key(data)
    monitor = admin_key(data, "--scopes", "metrics.read", "--name", "prometheus")
    server = serve()
    assert ("batchwright_plugins", (("state", "failed"),)) in samples(server.url, monitor)
    for path in ("/v1/organization/projects", "/v1/organization/usage/completions?start_time=1"):
        status, body = request(server, path, monitor)
        assert (status, body["error"]["code"]) == (403, "missing_scope"), body
        assert "metrics.read" in body["error"]["message"]
    for path in ("/v1/batches", "/v1/models", "/v1/plugins"):
        assert request(server, path, monitor)[0] == 403
    _, listed = request(server, "/v1/organization/admin_api_keys", admin)
    scopes = {key["name"]: key.get("scopes") for key in listed["data"]}
    assert scopes == {"default": None, "prometheus": ["metrics.read"]}
    # It does not count as an admin key: the last one stays.
    (last,) = [key["id"] for key in listed["data"] if key["name"] == "default"]
    status, body = request(server, f"/v1/organization/admin_api_keys/{last}", admin, "DELETE")
    assert (status, body["error"]["code"]) == (400, "last_admin_key")
    body = {"name": "x", "scopes": ["api.batch.read"]}
    status, body = request(server, "/v1/organization/admin_api_keys", admin, "POST", body=body)
    assert (status, body["error"]["param"]) == (400, "scopes")


def test_refused_requests_of_a_full_listener_count(serve, stub):
    server = serve("--max-connections", "1", plugins={"p": stub.plugin(["m"])})
    # A stream of events holds the connection for as long as its client listens.
    url = f"{server.url}/v1/batches/events"
    with wait_for(lambda: answered(url), what="the only connection"):

        def refused():
            try:
                urllib.request.urlopen(f"{server.url}/v1/models", timeout=30).read()
            except urllib.error.HTTPError as error:
                return error.code == 503

        wait_for(refused, what="a refused request")
    found = wait_for(
        lambda: scrape(server.url)[0] == 200 and samples(server.url), what="a free connection"
    )
    assert series(found, "batchwright_http_requests_total", route="overloaded", status="503") >= 1
    assert found["batchwright_http_connections_limit", ()] == 1
