"""`serve`: its settings, its startup errors, its first log messages, its shutdown.

Attacks: misspelled and wrong settings, data folders that cannot be used, signals during requests.
"""

import json
import signal
import socket
import sqlite3
import subprocess

import pytest
from conftest import HOST, PLUGINS, chat, handles, run_host, wait_for


def start(tmp_path, *arguments, env=None):
    base = ["serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "data", "--plugins", PLUGINS]
    return run_host(*base, *arguments, env=env, timeout=20)


def test_startup_errors_name_the_cause_in_one_message(tmp_path, serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_host(
            "serve", "--listen", f"127.0.0.1:{port}", "--data", tmp_path / "d", "--plugins", PLUGINS
        )
        assert done.returncode == 1 and f"failed to listen on 127.0.0.1:{port}" in done.stderr
        assert "--listen" in done.stderr

    (tmp_path / "c.toml").write_text('[batch]\nmax_file_size = "1GiB"\nmax_fil_size = "1GiB"\n')
    done = start(tmp_path, "--config", tmp_path / "c.toml")
    assert done.returncode == 3 and "line 3" in done.stderr and "max_fil_size" in done.stderr
    done = start(tmp_path, "--config", tmp_path / "nothing.toml")
    assert done.returncode == 3 and "nothing.toml" in done.stderr
    done = start(tmp_path, env={"BATCHWRIGHT_MAX_ATTEMPTS": "many"})
    assert done.returncode == 3 and "BATCHWRIGHT_MAX_ATTEMPTS: `many`" in done.stderr
    done = start(tmp_path, "--log-filter", "=loud=")
    assert done.returncode == 3 and "--log-filter" in done.stderr

    (tmp_path / "file").write_text("")
    done = run_host(
        "serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "file", "--plugins", PLUGINS
    )
    assert done.returncode == 5 and "--data" in done.stderr

    server = serve()
    done = run_host("serve", "--listen", "127.0.0.1:0", "--data", server.data, "--plugins", PLUGINS)
    assert done.returncode == 5 and "in use by another batchwright" in done.stderr
    server.stop()
    database = sqlite3.connect(server.data / "batchwright.db")
    database.execute("PRAGMA user_version = 999")
    database.close()
    done = run_host("serve", "--listen", "127.0.0.1:0", "--data", server.data, "--plugins", PLUGINS)
    assert done.returncode == 5 and "newer version" in done.stderr
    for file in server.data.glob("batchwright.db*"):
        file.unlink()
    (server.data / "batchwright.db").write_bytes(b"this is no database" * 1000)
    done = run_host("serve", "--listen", "127.0.0.1:0", "--data", server.data, "--plugins", PLUGINS)
    assert done.returncode == 5 and "not a database" in done.stderr
    assert "panicked" not in done.stderr


def test_config_errors_are_all_reported_at_once(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        "[execution]\nmax_atempts = 3\n"
        '[server]\nclient_timeout = 5\nmax_connections = 0\nidle_timeout = "0s"\n'
        '[batch]\nmax_file_size = "big"\n'
    )
    done = run_host("serve", "--config", config, "--data", tmp_path / "data")
    assert done.returncode == 3
    for words in [
        "line 2: there is no setting `max_atempts`; did you mean `max_attempts`?",
        "line 4: client_timeout",
        "line 5: max_connections: `0` is not a whole number of at least 1",
        "line 6: idle_timeout: `0s` must be more than 0",
        "line 8: max_file_size",
    ]:
        assert words in done.stderr, done.stderr
    assert "usize" not in done.stderr and "nonzero" not in done.stderr.lower()
    for arguments, words in [
        (["--log-filter", "warning"], "did you mean `warn`?"),
        (["--client-timeout", "0s"], "--client-timeout: `0s` must be more than 0"),
        (["--max-atempts", "3"], "--max-attempts"),
        (["--max-attempts", "0", "--client-timeout", "5"], "at least 1\n"),
        (["--max-attempts", "0", "--client-timeout", "5"], "--client-timeout: `5` is not a dura"),
        (["--log-level", "info"], "--log-level is called --log-filter"),
    ]:
        done = run_host("serve", *arguments, "--data", tmp_path / "data")
        assert done.returncode in (2, 3) and words in done.stderr, done.stderr
    assert not (tmp_path / "data").exists()


def test_settings_are_read_from_environment_and_config_file(tmp_path, serve):
    (tmp_path / "c.toml").write_text(
        '[batch]\nmax_requests_per_file = 1\ncompletion_windows = ["24h", "1h"]\n'
    )
    server = serve("--config", tmp_path / "c.toml", env={"BATCHWRIGHT_MAX_REPORTED_ERRORS": "1"})
    batch = server.client.batches.create(
        input_file_id=server.upload([chat("a"), chat("b"), "x", "y"]).id,
        endpoint="/v1/chat/completions",
        completion_window="1h",
    )
    assert batch.expires_at == batch.created_at + 3600
    batch = server.ended(batch.id)
    assert [error.code for error in batch.errors.data] == [
        "too_many_requests",
        "invalid_json_line",
        "too_many_errors",
    ]


def test_startup_log_names_version_plugins_and_unknown_variables(serve):
    env = {
        "BATCHWRIGHT_LISTENN": "x",
        "BATCHWRIGHT_PORT": "tcp://10.0.0.1:80",
        "BATCHWRIGHT_SERVICE_HOST": "10.0.0.1",
    }
    server = serve("--log-format", "json", env=env)
    wait_for(lambda: "server started" in server.logged(), what="the log message")
    lines = [json.loads(line) for line in server.logged().splitlines()]
    (started,) = [line["fields"] for line in lines if line["fields"]["message"] == "server started"]
    version = run_host("--version").stdout.split(maxsplit=1)[1].strip()
    assert started["version"] == version and "(" in version and started["loaded"] == "echo,standard"
    assert str(server.data) == started["data"] and started["address"] in server.url
    (warned,) = [line["fields"] for line in lines if line["level"] == "WARN"]
    assert warned["message"] == "unknown environment variable ignored"
    assert warned["variable"] == "BATCHWRIGHT_LISTENN"
    assert warned["did_you_mean"] == "BATCHWRIGHT_LISTEN"


def test_shutdown_drains_on_first_signal_and_exits_on_second(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    server.create([chat(str(number), "!delay 300", model="m") for number in range(20)])
    wait_for(lambda: sum(stub.counts().values()) > 0, what="a request in flight")
    assert server.stop() == 0 and "stopped" in server.logged()
    sent = sum(stub.counts().values())
    server.start()
    wait_for(
        lambda: all(batch.status == "completed" for batch in server.client.batches.list()),
        what="the end of all batches",
    )
    assert sum(stub.counts().values()) == 20 >= sent

    server.create([chat(str(number), "!delay 60000", model="m") for number in range(20)])
    wait_for(lambda: sum(stub.counts().values()) > 20, what="a request in flight")
    server.child.send_signal(signal.SIGTERM)
    # The log contains the first shutdown already.
    wait_for(lambda: server.logged().count("shutting down") == 2, what="the shutdown")
    server.child.send_signal(signal.SIGTERM)
    assert server.child.wait(timeout=10) == 0


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (signal.SIGTERM, "server stopped before it had started"),
        (signal.SIGHUP, "settings reloaded"),
    ],
)
def test_signal_while_the_server_starts_is_not_lost(tmp_path, sent, expected):
    command = [HOST, "serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "data"]
    # Nothing is compiled yet, which takes a while.
    command += ["--plugins", PLUGINS, "--cache", tmp_path / "cache"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output)

    database = tmp_path / "data/batchwright.db"
    try:
        wait_for(lambda: database.exists(), what="a server that opens its database")
        assert handles(child.pid, sent)
        child.send_signal(sent)
        assert "listening" not in log.read_text()
        wait_for(lambda: expected in log.read_text(), what=lambda: log.read_text())
        if sent == signal.SIGTERM:
            assert child.wait(timeout=20) == 0
            assert "listening" not in log.read_text()
        else:
            child.terminate()
            assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.wait()
