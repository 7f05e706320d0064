"""Reload of a running server: what changes at once, what needs a restart, and errors."""

import json
import signal
import time
import urllib.error
import urllib.request

import pytest
from conftest import chat, run_host, wait_for
from tenants import Tenants, admin_key

ADMIN_LISTENER = ("--admin-listen", "127.0.0.1:0")


def call(url, method="POST", body=None):
    """Returns the status and the body of a call of the admin listener."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def reloadable(serve, tmp_path):
    """Returns a server with a config file, the file, and the URL of the admin listener."""
    config = tmp_path / "batchwright.toml"
    config.write_text('[server]\nlog_filter = "info"\n[execution]\nmax_attempts = 4\n')
    server = serve(*ADMIN_LISTENER, "--config", config)
    return server, config, server.read_line().split()[-1]


def test_log_filter_changes_and_other_settings_are_named(reloadable):
    server, config, admin = reloadable
    server.run([chat("a")])
    assert "DEBUG" not in server.logged()
    config.write_text('[server]\nlog_filter = "debug"\n[execution]\nmax_attempts = 9\n')
    assert call(f"{admin}/reload") == (
        200,
        {"applied": ["log_filter"], "needs_restart": ["max_attempts"]},
    )
    server.run([chat("b")])
    wait_for(lambda: "DEBUG" in server.logged(), what="messages of the new level")
    # What was applied is in use; what needs a restart is named until then.
    assert call(f"{admin}/reload")[1] == {"applied": [], "needs_restart": ["max_attempts"]}
    config.write_text('[server]\nlog_filter = "info"\n[execution]\nmax_attempts = 4\n')
    server.child.send_signal(signal.SIGHUP)
    wait_for(
        lambda: call(f"{admin}/log_filter", "GET")[1]["filter"] == "info", what="the old filter"
    )
    assert 'applied="log_filter" needs_restart=""' in server.logged()


def test_changed_prices_are_named(reloadable):
    _, config, admin = reloadable
    with config.open("a") as file:
        file.write('[[prices]]\nmodel = "stub"\ninput = 9\n')
    assert call(f"{admin}/reload")[1] == {"applied": [], "needs_restart": ["prices"]}


def test_config_file_with_an_error_changes_nothing_and_is_tried_again(reloadable):
    server, config, admin = reloadable
    config.write_text('[server]\nlog_filter = "debug"\nunknown = 1\n')
    status, body = call(f"{admin}/reload")
    assert status == 400 and "line 3" in body["error"]["message"]
    assert call(f"{admin}/log_filter", "GET")[1] == {"filter": "info"}
    server.child.send_signal(signal.SIGHUP)
    wait_for(lambda: "settings not reloaded" in server.logged(), what="the error in the log")
    config.write_text('[server]\nlog_filter = "debug"\n[execution]\nmax_attempts = 4\n')
    assert call(f"{admin}/reload")[1]["applied"] == ["log_filter"]


def test_log_filter_is_set_by_the_admin_listener_alone(reloadable):
    server, _, admin = reloadable
    assert call(f"{admin}/log_filter", body={"filter": "warn,batchwright_egress=debug"}) == (
        200,
        {"filter": "warn,batchwright_egress=debug"},
    )
    status, body = call(f"{admin}/log_filter", body={"filter": "loud"})
    assert status == 400 and "loud" in body["error"]["message"]
    assert call(f"{admin}/log_filter", "GET")[1] == {"filter": "warn,batchwright_egress=debug"}
    for path in ("/reload", "/log_filter"):
        assert call(server.url + path, body={})[0] == 404


def test_reload_reads_plugins_again(reloadable):
    server, _, admin = reloadable
    (server.plugins / "more.toml").write_text(
        'component = "inference-echo.wasm"\nmodels = ["echo-2"]\n'
    )
    assert call(f"{admin}/reload")[0] == 200
    wait_for(lambda: "echo-2" in server.models(), 5, "the new plugin")


def test_audit_log_is_exported_and_removed_after_its_lifetime(serve, tmp_path):
    tenants = Tenants(serve, tmp_path)
    for number in range(120):
        tenants.admin.projects.create(name=f"p{number}")
    env = {"BATCHWRIGHT_URL": tenants.server.url, "BATCHWRIGHT_ADMIN_KEY": tenants.key}
    done = run_host("audit", env=env)
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(entries) == 121 and len({entry["id"] for entry in entries}) == 121
    assert entries[0]["type"] == "project.created"
    assert tenants.key not in done.stdout
    later = run_host("audit", "--since", str(entries[0]["effective_at"] + 5), env=env)
    assert (later.returncode, later.stdout) == (0, "")
    data = tenants.server.data
    tenants.server.stop()
    # The server looks for old entries when it starts, and then once an hour.
    time.sleep(1.2)
    server = serve("--audit-lifetime", "1s", name="server")
    wait_for(
        lambda: run_host("audit", env={**env, "BATCHWRIGHT_URL": server.url}).stdout == "",
        what="the removal",
    )
    server.stop()
    assert run_host("audit", "--data", data).stdout == ""
    assert admin_key(data, "--name", "other")
