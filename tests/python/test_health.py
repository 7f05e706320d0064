"""Health endpoints report real faults, and a shutdown loses no request behind a load balancer.

Attacks: missing validators and models, deleted objects, a damaged database, lost input files.
"""

import json
import os
import shutil
import signal
import socket
import sqlite3
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import CHAT, PLUGINS, chat, run_host, wait_for


def get_json(url):
    """Returns status and JSON body."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def health(server, kind):
    return get_json(f"{server.url}/health/{kind}")


def ready(server):
    return health(server, "ready")[0] == 200


def unready_reasons(server):
    """Returns the reasons of a failed readiness check; checks that serving and live still pass."""
    status, body = health(server, "ready")
    assert health(server, "serving") == (200, {"status": "ok"}) and health(server, "live") == (
        200,
        {"status": "ok"},
    )
    assert (
        status == 503 and body["error"]["code"] == "server_not_ready" and body["error"]["message"]
    )
    assert str(server.folder) not in json.dumps(body)
    return " ".join(body["reasons"])


def test_readiness_fails_without_validator_and_batches_are_refused(serve):
    server = serve()
    file = server.upload([chat("a")])
    server.stop()
    (server.plugins / "standard.toml").write_text(
        'component = "validator-standard.wasm"\nodrer = 1\n'
    )
    server.start()
    assert "Required plugins are not loaded." in wait_for(
        lambda: not ready(server) and unready_reasons(server)
    )
    assert (
        server.client.files.content(file.id).content and len(list(server.client.files.list())) == 1
    )
    with pytest.raises(openai.InternalServerError) as error:
        server.create([{**chat("a"), "body": {"model": "echo", "messages": "notalist"}}])
    assert (error.value.status_code, error.value.code) == (503, "server_not_ready")
    assert (
        "no validator is loaded for /v1/chat/completions" in server.logged()
        and "odrer" in server.logged()
    )
    shutil.copy(PLUGINS / "standard.toml", server.plugins)
    wait_for(lambda: ready(server), what="readiness")
    assert server.run([chat("a")]).request_counts.completed == 1
    # The validator is removed at run time.
    (server.plugins / "standard.toml").unlink()
    wait_for(lambda: not ready(server), what="readiness to fail")
    with pytest.raises(openai.InternalServerError):
        server.create([chat("a")])


def test_readiness_depends_on_required_plugins(serve):
    server = serve("--required-plugins", "standard,extra")
    assert "Required plugins are not loaded." in wait_for(
        lambda: not ready(server) and unready_reasons(server)
    )
    server.add_plugin("extra", 'component = "one-model.wasm"\n')
    wait_for(lambda: ready(server), what="readiness")
    server.stop()
    (server.plugins / "standard.toml").unlink()
    server.arguments = ["--required-plugins", "none"]
    server.start()
    wait_for(lambda: ready(server), what="readiness")
    assert server.run([chat("a")]).request_counts.completed == 1


def test_readiness_fails_without_a_model(serve):
    server = serve(plugins={})
    assert "No plugin is loaded that serves a model." in wait_for(
        lambda: not ready(server) and unready_reasons(server)
    )


def test_readiness_fails_if_stored_objects_are_missing(serve):
    server = serve()
    assert ready(server)
    server.upload([chat("a")])
    shutil.rmtree(server.data / "objects/default")
    assert "is missing stored data" in wait_for(
        lambda: not ready(server) and unready_reasons(server)
    )
    # A new upload is stored again.
    server.upload([chat("b")])
    wait_for(lambda: ready(server), what="readiness")
    # A folder created again is not the folder that was opened.
    shutil.rmtree(server.data / "objects")
    assert "is missing stored data" in wait_for(
        lambda: not ready(server) and unready_reasons(server)
    )
    server.stop()
    server.start()
    wait_for(lambda: not ready(server), what="readiness to fail")
    server.upload([chat("c")])
    wait_for(lambda: ready(server), what="readiness")


def test_readiness_fails_if_the_database_is_damaged(serve):
    server = serve()
    for number in range(30):
        server.run([chat("a", "x" * 1000, metadata={"n": str(number)})])
    server.stop()
    database = server.data / "batchwright.db"
    connection = sqlite3.connect(database)
    roots = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name IN ('results', 'batch_plugins')"
    ).fetchall()
    connection.close()
    content = bytearray(database.read_bytes())
    for (page,) in roots:
        content[(page - 1) * 16384 : page * 16384] = b"\xa5" * 16384
    database.write_bytes(content)
    server.start()
    wait_for(lambda: not ready(server), what="readiness to fail")
    assert "The database does not work." in health(server, "ready")[1]["reasons"]
    assert "malformed" in server.logged()
    assert health(server, "live")[0] == 200


def test_admin_listener_serves_operators_only(serve):
    server = serve("--admin-listen", "127.0.0.1:0", "--max-connections", "1")
    line = server.child.stdout.readline()
    assert line.startswith("health and metrics on http://")
    admin = line.split()[-1]
    for kind in ("live", "serving", "ready"):
        assert get_json(f"{admin}/health/{kind}")[0] == 200
    assert get_json(f"{admin}/v1/files")[0] == 404


def test_readiness_probe_writes_little(serve):
    server = serve()
    assert ready(server)
    written = lambda: int(
        (open(f"/proc/{server.child.pid}/io").read().split("write_bytes: ")[1]).split()[0]
    )  # noqa: E731
    before = written()
    begun = time.monotonic()
    for _ in range(200):
        assert ready(server)
    # About 64 KiB and one commit every two seconds, for any number of probes.
    assert written() - before < (time.monotonic() - begun + 4) * 500_000


def test_shutdown_answers_requests_until_exit(serve, stub):
    server = serve(
        "--shutdown-delay", "1500ms", "--shutdown-grace", "2s", plugins={"p": stub.plugin(["m"])}
    )
    batch = server.create(
        [chat("hung", "!delay 600000", model="m"), chat("quick", "hi", model="m")]
    )
    wait_for(lambda: len(stub.counts()) == 2, what="both requests in flight")
    assert ready(server)
    begun = time.monotonic()
    server.child.send_signal(signal.SIGTERM)
    wait_for(lambda: not ready(server), 5, "readiness to fail")
    assert health(server, "ready")[1]["reasons"] == ["The server is shutting down."]
    # New connections are answered during the shutdown delay and while requests are in flight.
    answered = 0
    while server.child.poll() is None:
        try:
            # Load balancers see it too, while clients are still answered.
            status, answer = health(server, "serving")
            assert (status, answer["reasons"]) == (503, ["The server is shutting down."])
            assert server.client.batches.retrieve(batch.id).status == "in_progress"
            answered = time.monotonic() - begun
        except (urllib.error.URLError, ConnectionError, openai.APIConnectionError):
            break
    assert server.child.wait(timeout=20) == 0
    assert answered > 3, f"new connections were answered for {answered} s only"
    # The unanswered request is released, and only that request is sent again.
    server.start()
    wait_for(lambda: sum(stub.counts().values()) == 3, what="the hung request to be sent again")
    assert stub.counts()["hi"] == 1


def test_connections_per_address_are_limited(serve):
    server = serve("--max-connections-per-address", "3")
    host, port = server.url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port)), timeout=10) for _ in range(3)]
    time.sleep(0.1)
    with socket.create_connection((host, int(port)), timeout=10) as fourth:
        fourth.settimeout(10)
        try:
            fourth.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert fourth.recv(10) == b""
        except ConnectionError:
            pass
    for connection in connections:
        connection.close()
    wait_for(lambda: ready_or_refused(server), what="a free connection")


def ready_or_refused(server):
    try:
        return ready(server)
    except OSError:
        return False


@pytest.mark.parametrize("how", ["running", "cancelled", "new", "damaged"])
def test_batch_with_lost_input_ends(serve, stub, how):
    server = serve(
        "--stop-grace", "10ms", plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 2\n")}
    )
    lines = [chat(str(line), f"!delay 20 {line} {'y' * 2000}", model="m") for line in range(500)]
    file = server.upload(lines)
    create = lambda: server.client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h"
    )  # noqa: E731
    (path,) = (server.data / "objects/default/files").iterdir()
    if how == "new":
        path.unlink()
        batch = server.ended(create().id)
        assert batch.status == "failed" and batch.request_counts.total == 0
    else:
        batch = create()
        wait_for(
            lambda: server.client.batches.retrieve(batch.id).request_counts.completed > 20,
            what="some results",
        )
        server.kill()
        if how == "damaged":
            os.truncate(path, 30_000)
        else:
            path.unlink()
        if how == "cancelled":
            # The state that a cancel just before the kill leaves behind.
            database = sqlite3.connect(server.data / "batchwright.db")
            database.execute(
                "UPDATE batches SET status = 'cancelling', lane = 'finish', cancelling_at = 1"
            )
            database.commit()
            database.close()
        server.start()
        batch = server.ended(batch.id)
        assert batch.status == ("cancelled" if how == "cancelled" else "failed")
        output, errors = server.results(batch)
        assert len(output) == batch.request_counts.completed > 20 and errors == []
    (error,) = batch.errors.data
    assert (error.code, error.param) == (
        "input_file_lost",
        "input_file_id",
    ) and file.id in error.message
    assert str(server.data) not in error.message


def test_health_command_asks_the_server_of_its_settings(serve, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "settings.toml"
    config.write_text(f'[server]\nadmin_listen = "127.0.0.1:{port}"\n')
    server = serve("--config", config)
    for check, answer in {"live": "ok", "serving": "ok", "ready": "ok"}.items():
        asked = run_host("health", "--config", config, "--check", check)
        assert (asked.returncode, asked.stdout.strip()) == (0, answer), asked.stderr
    # Without an admin listener in the settings, the API's own address is asked.
    asked = run_host("health", env={"BATCHWRIGHT_LISTEN": server.url.removeprefix("http://")})
    assert asked.returncode == 0
    # A validator that is gone makes the server unready, and it serves.
    for name in ["standard.toml", "echo.toml"]:
        (server.plugins / name).unlink()
    wait_for(lambda: not ready(server), what="an unready server")
    asked = run_host("health", "--config", config, "--check", "ready")
    assert asked.returncode == 1 and "No plugin" in asked.stderr, asked.stderr
    assert run_host("health", "--config", config).returncode == 0
    server.kill()
    asked = run_host("health", "--config", config)
    assert asked.returncode == 1 and f"127.0.0.1:{port}" in asked.stderr, asked.stderr
