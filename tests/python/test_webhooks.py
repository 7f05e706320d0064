"""Webhooks: the official SDKs manage them and accept what is sent, and nothing is lost."""

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request

import openai
import pytest
from conftest import ROOT, chat, http_server, run_host, wait_for
from test_metrics import samples, series

ALL = ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]


class Receiver:
    """Endpoint that keeps what it gets, and answers as it is told."""

    def __init__(self):
        self.status, self.delay, self.location, self.got = 200, 0, None, []
        self.lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):  # noqa: N805
                body = handler.rfile.read(int(handler.headers["content-length"]))
                with self.lock:
                    self.got.append((dict(handler.headers), body, handler.path))
                time.sleep(self.delay)
                handler.send_response(self.status)
                if self.location:
                    handler.send_header("location", self.location)
                handler.send_header("content-length", "6")
                handler.end_headers()
                handler.wfile.write(b"answer")

            def log_message(handler, *arguments):  # noqa: N805
                pass

        self.handler = Handler

    def events(self):
        return [json.loads(body) for _, body, _ in self.got]


@pytest.fixture
def receiver():
    receiver = Receiver()
    with http_server(receiver.handler) as server:
        receiver.url = f"{server.url}/hook"
        receiver.host = server.url.removeprefix("http://")
        yield receiver


def with_hosts(*receivers):
    return ("--webhook-allow-http", ",".join(receiver.host for receiver in receivers))


def create(server, receiver, events=("batch.completed",), name="hook"):
    return server.client.webhooks.create(name=name, url=receiver.url, event_types=list(events))


def test_sdk_manages_endpoints_and_shows_the_secret_twice_only(serve, receiver):
    server = serve(*with_hosts(receiver))
    webhooks = server.client.webhooks
    assert webhooks.event_types.list().data == ALL
    created = create(server, receiver, ALL)
    assert created.object == "webhook_endpoint" and created.signing_secret.startswith("whsec_")
    assert created.event_types == ALL and created.updated_at == created.created_at
    found = webhooks.retrieve(created.id)
    assert created.signing_secret.endswith(found.signing_secret_hint[-4:])
    assert "signing_secret" not in found.model_dump()
    others = [create(server, receiver, name=f"hook {number}") for number in range(4)]
    listed = list(webhooks.list(limit=2))
    assert [endpoint.id for endpoint in listed] == [created.id, *(one.id for one in others)]
    assert not any("signing_secret" in endpoint.model_dump() for endpoint in listed)
    changed = webhooks.update(created.id, name="new", event_types=["batch.failed"])
    assert (changed.name, changed.event_types) == ("new", ["batch.failed"])
    rotated = webhooks.rotate_secret(created.id)
    assert rotated.signing_secret != created.signing_secret
    assert webhooks.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError):
        webhooks.retrieve(created.id)
    # The secret is in no log, also not in its stored form elsewhere.
    assert created.signing_secret not in server.logged()


def test_sdks_accept_the_event_of_a_batch(serve, receiver):
    server = serve(*with_hosts(receiver))
    secret = create(server, receiver, ALL).signing_secret
    batch = server.run([chat("a")])
    failed = server.run(["not json"])
    assert (batch.status, failed.status) == ("completed", "failed")
    wait_for(lambda: len(receiver.got) == 2, what="two events")
    types = {}
    for headers, body, path in receiver.got:
        headers = {name.lower(): value for name, value in headers.items()}
        event = server.client.webhooks.unwrap(body, headers, secret=secret)
        assert (event.object, event.id, path) == ("event", headers["webhook-id"], "/hook")
        types[event.type] = event
        assert event.id.startswith("evt_")
        with pytest.raises(openai.InvalidWebhookSignatureError):
            server.client.webhooks.unwrap(body + b" ", headers, secret=secret)
    assert types["batch.completed"].data.id == batch.id
    assert types["batch.completed"].created_at == batch.completed_at
    assert types["batch.failed"].data.id == failed.id
    # The Node SDK, too.
    if not (ROOT / "tests/node/node_modules/openai").exists() or shutil.which("node") is None:
        pytest.skip("the Node SDK is not installed")
    headers, body, _ = receiver.got[0]
    script = (
        "import OpenAI from 'openai';"
        "const {headers, body, secret} = JSON.parse(process.argv[1]);"
        "const client = new OpenAI({apiKey: 'none', webhookSecret: secret});"
        "const event = await client.webhooks.unwrap(body, headers);"
        "console.log(event.type);"
    )
    given = json.dumps({"headers": headers, "body": body.decode(), "secret": secret})
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", script, given],
        cwd=ROOT / "tests/node",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == json.loads(body)["type"], done.stderr


def test_old_secret_signs_beside_the_new_one_after_a_rotation_that_keeps_it(serve, receiver):
    server = serve(*with_hosts(receiver))
    webhooks = server.client.webhooks
    created = create(server, receiver)
    kept = webhooks.rotate_secret(created.id, keep_old_secret_active_for_24_hours=True)
    server.run([chat("a")])
    wait_for(lambda: receiver.got, what="an event")
    headers, body, _ = receiver.got[-1]
    headers = {name.lower(): value for name, value in headers.items()}
    assert len(headers["webhook-signature"].split()) == 2
    for secret in (created.signing_secret, kept.signing_secret):
        webhooks.unwrap(body, headers, secret=secret)
    # Without it, the old secret ends at once.
    last = webhooks.rotate_secret(created.id)
    tested = webhooks.test(created.id, event_type="batch.expired")
    assert (tested.status_code, tested.success) == (200, True)
    headers, body, _ = receiver.got[-1]
    headers = {name.lower(): value for name, value in headers.items()}
    assert webhooks.unwrap(body, headers, secret=last.signing_secret).type == "batch.expired"
    for secret in (created.signing_secret, kept.signing_secret):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            webhooks.unwrap(body, headers, secret=secret)


def deliveries(server, endpoint):
    path = f"{server.url}/v1/webhook_endpoints/{endpoint.id}/deliveries"
    with urllib.request.urlopen(path) as answer:
        return json.load(answer)["data"]


def test_failed_attempt_is_repeated_under_the_same_id_and_shown(serve, receiver):
    server = serve(*with_hosts(receiver))
    endpoint = create(server, receiver)
    receiver.status = 500
    server.run([chat("a")])
    first = wait_for(lambda: deliveries(server, endpoint), what="a delivery")[0]
    first = wait_for(
        lambda: [one for one in deliveries(server, endpoint) if one["attempts"] == 1],
        what="an attempt",
    )[0]
    assert (first["status"], first["status_code"], first["detail"]) == ("pending", 500, "answer")
    assert first["next_attempt_at"] > first["last_attempt_at"]
    assert server.client.webhooks.retrieve(endpoint.id).model_extra["failing_since"]
    receiver.status = 204
    wait_for(lambda: len(receiver.got) == 2, what="another attempt")
    ids = {headers["webhook-id"] for headers, _, _ in receiver.got}
    assert ids == {first["id"]} and len({body for _, body, _ in receiver.got}) == 1
    done = wait_for(
        lambda: [one for one in deliveries(server, endpoint) if one["status"] == "delivered"],
        what="a delivered event",
    )[0]
    assert (done["attempts"], done["status_code"], done["next_attempt_at"]) == (2, 204, None)
    assert server.client.webhooks.retrieve(endpoint.id).model_extra["failing_since"] is None
    # By hand, it is sent once more.
    again = run_host(
        "webhook", "redeliver", endpoint.id, first["id"], env={"BATCHWRIGHT_URL": server.url}
    )
    assert again.returncode == 0, again.stderr
    wait_for(lambda: len(receiver.got) == 3, what="the redelivery")
    assert receiver.got[-1][0]["webhook-id"] == first["id"]
    assert receiver.got[-1][1] == receiver.got[0][1]
    found = samples(server.url)
    attempts = "batchwright_webhook_attempts_total"
    assert series(found, attempts, outcome="refused") == 1
    wait_for(lambda: series(samples(server.url), attempts, outcome="delivered") == 2, what="counts")


def test_event_is_sent_after_a_kill_between_the_end_of_the_batch_and_its_delivery(serve, receiver):
    server = serve(*with_hosts(receiver), "--webhook-timeout", "2s")
    endpoint = create(server, receiver)
    receiver.delay = 30
    server.run([chat("a")])
    wait_for(lambda: receiver.got, what="an attempt")
    server.kill()
    receiver.delay = 0
    server.start()
    # The lease of the attempt that was cut off has to end first.
    wait_for(lambda: len(receiver.got) >= 2, 60, "another attempt")
    ids = {headers["webhook-id"] for headers, _, _ in receiver.got}
    assert len(ids) == 1
    wait_for(lambda: deliveries(server, endpoint)[0]["status"] == "delivered", what="the delivery")


def test_slow_endpoint_delays_no_other(serve, receiver):
    slow = Receiver()
    slow.delay = 5
    with http_server(slow.handler) as listening:
        slow.url = listening.url
        slow.host = listening.url.removeprefix("http://")
        server = serve(*with_hosts(receiver, slow))
        for number in range(6):
            create(server, slow, name=f"slow {number}")
        create(server, receiver)
        began = time.monotonic()
        server.run([chat("a")])
        server.run([chat("b")])
        # Of the same project: the endpoint has its place once one of four slow attempts ends.
        wait_for(lambda: len(receiver.got) == 2, 25, "the events of the fast endpoint")
        print(f"fast endpoint got both events within {time.monotonic() - began:.1f} s")


def test_endpoint_that_fails_for_too_long_is_disabled_and_works_again_after_a_change(
    serve, receiver
):
    server = serve(*with_hosts(receiver), "--webhook-retry-time", "3s")
    endpoint = create(server, receiver)
    receiver.status = 503
    server.run([chat("a")])

    def state():
        return server.client.webhooks.retrieve(endpoint.id).model_extra

    wait_for(lambda: state()["disabled_at"], 40, "the end of the endpoint")
    assert "webhook endpoint disabled" in server.logged()
    assert deliveries(server, endpoint)[0]["status"] == "failed"
    wait_for(
        lambda: samples(server.url)["batchwright_webhook_endpoints_disabled", ()] == 1,
        what="the metric",
    )
    sent = len(receiver.got)
    server.run([chat("b")])
    receiver.status = 200
    time.sleep(1.5)
    assert len(receiver.got) == sent, "a disabled endpoint gets nothing"
    listed = run_host("webhook", "list", env={"BATCHWRIGHT_URL": server.url})
    assert "disabled" in listed.stdout
    server.client.webhooks.update(endpoint.id, name="repaired")
    assert state()["disabled_at"] is None
    server.run([chat("c")])
    wait_for(lambda: len(receiver.got) == sent + 1, what="an event")


def test_gone_endpoint_is_disabled_at_once(serve, receiver):
    server = serve(*with_hosts(receiver))
    endpoint = create(server, receiver)
    receiver.status = 410
    server.run([chat("a")])
    wait_for(
        lambda: server.client.webhooks.retrieve(endpoint.id).model_extra["disabled_at"],
        what="the end of the endpoint",
    )


def test_deliveries_end_with_their_endpoint(serve, receiver):
    server = serve(*with_hosts(receiver))
    endpoint = create(server, receiver)
    receiver.status = 500
    server.run([chat("a")])
    wait_for(lambda: receiver.got, what="an attempt")
    server.client.webhooks.delete(endpoint.id)
    wait_for(
        lambda: samples(server.url).get(("batchwright_webhook_pending_deliveries", ())) == 0,
        40,
        "no pending delivery",
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/hook",
        "https://127.0.0.1/hook",
        "https://[::1]/hook",
        "https://[::ffff:10.0.0.1]/",
        "https://169.254.169.254/latest/meta-data",
        "https://user:password@example.com/",
        "ftp://example.com/",
        "hook",
    ],
)
def test_urls_into_the_network_of_the_operator_are_refused(server, url):
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.webhooks.create(name="x", url=url, event_types=["batch.completed"])
    assert refused.value.body["param"] == "url"


def test_redirects_and_names_that_lead_inside_are_not_followed(serve, receiver):
    inside = Receiver()
    with http_server(inside.handler) as listening:
        server = serve(*with_hosts(receiver))
        endpoint = create(server, receiver)
        receiver.status, receiver.location = 307, listening.url
        server.run([chat("a")])
        wait_for(
            lambda: [one for one in deliveries(server, endpoint) if one["status_code"] == 307],
            what="the refused redirect",
        )
        # The name is checked when it is dialed: this one has a loopback address.
        port = listening.server_port
        named = server.client.webhooks.create(
            name="x", url=f"https://localhost:{port}/", event_types=["batch.completed"]
        )
        with pytest.raises(openai.BadRequestError) as refused:
            server.client.webhooks.test(named.id, event_type="batch.completed")
        assert refused.value.body["code"] == "webhook_endpoint_unreachable"
        assert "not allowed" in refused.value.body["message"]
        assert "127.0.0.1" not in json.dumps(refused.value.body)
        assert not inside.got


def test_invalid_parameters_say_what_is_expected(serve, receiver):
    server = serve(*with_hosts(receiver), "--webhook-max-endpoints", "1")

    def refused(**parameters):
        given = {"name": "x", "url": receiver.url, "event_types": ["batch.completed"]}
        with pytest.raises(openai.BadRequestError) as error:
            server.client.webhooks.create(**{**given, **parameters})
        return error.value.body

    assert refused(event_types=["response.completed"])["param"] == "event_types"
    assert "batch.completed" in refused(event_types=["x"])["message"]
    assert refused(event_types=[])["param"] == "event_types"
    assert refused(name="")["param"] == "name"
    create(server, receiver)
    assert "delete some" in refused()["message"]


def test_projects_do_not_see_the_webhooks_of_each_other(tenants):
    _, _, one = tenants.project("one")
    _, _, other = tenants.project("other")
    created = one.webhooks.create(
        name="x", url="https://example.com/", event_types=["batch.completed"]
    )
    assert list(other.webhooks.list()) == []
    for call in (
        lambda: other.webhooks.retrieve(created.id),
        lambda: other.webhooks.update(created.id, name="y"),
        lambda: other.webhooks.delete(created.id),
        lambda: other.webhooks.rotate_secret(created.id),
        lambda: other.webhooks.test(created.id, event_type="batch.completed"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    log = [entry.type for entry in tenants.admin.audit_logs.list()]
    assert "webhook_endpoint.created" in log


def test_command_line_manages_webhooks(serve, receiver):
    server = serve(*with_hosts(receiver))
    env = {"BATCHWRIGHT_URL": server.url}

    def run(*arguments, code=0):
        done = run_host("webhook", *arguments, env=env)
        assert done.returncode == code, done.stderr
        return done

    created = run("create", receiver.url)
    assert created.stdout.startswith("whsec_") and created.stdout.count("\n") == 1
    (endpoint,) = server.client.webhooks.list()
    assert endpoint.id in created.stderr and endpoint.event_types == ALL
    assert "answered 200" in run("test", endpoint.id).stdout
    receiver.status = 500
    assert "answered 500" in run("test", endpoint.id, code=1).stdout
    receiver.status = 200
    server.run([chat("a")])
    wait_for(lambda: "delivered" in run("deliveries", endpoint.id).stdout, what="the delivery")
    assert run("rotate-secret", endpoint.id, "--keep-old").stdout.startswith("whsec_")
    assert "batch.failed" in run("update", endpoint.id, "--events", "batch.failed").stdout
    run("delete", endpoint.id)
    assert list(server.client.webhooks.list()) == []


def test_unreachable_endpoint_is_said_without_addresses(serve):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    server = serve("--webhook-allow-http", host)
    endpoint = server.client.webhooks.create(
        name="x", url=f"http://{host}/", event_types=["batch.completed"]
    )
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.webhooks.test(endpoint.id, event_type="batch.completed")
    assert refused.value.body["message"] == "The endpoint does not accept connections."
