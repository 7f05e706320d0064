"""What other users and processes of the machine can see and do: file modes and signals."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess

from conftest import HOST, PLUGINS, chat, jsonl, run_host, wait_for


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_data_folder_is_private_to_its_user(serve, tmp_path):
    server = serve()
    for opened in [False, True]:
        if opened:
            # The modes that an older version created.
            for path in [server.data, server.data / "objects", server.data / "batchwright.db"]:
                path.chmod(mode(path) | (0o055 if path.is_dir() else 0o044))
            server.start()
        server.run([chat("a")])
        assert mode(server.data) == 0o700
        for path in server.data.rglob("*"):
            assert mode(path) & 0o077 == 0, path
        server.stop()
    # A clean stop leaves no write-ahead log behind.
    assert not list(server.data.glob("*-wal"))


def test_existing_data_folder_keeps_its_mode(serve, tmp_path):
    data = tmp_path / "server/data"
    data.mkdir(parents=True)
    (data / "thesis.txt").write_text("mine")
    data.chmod(0o755)
    (data / "thesis.txt").chmod(0o644)
    server = serve()
    server.run([chat("a")])
    assert (mode(data), mode(data / "thesis.txt"), mode(data / "batchwright.db")) == (
        0o755,
        0o644,
        0o600,
    )


def test_run_state_is_private_and_results_follow_the_umask(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a")]))
    seen = []
    state = tmp_path / "out.jsonl.batchwright"
    command = [
        HOST,
        "run",
        tmp_path / "in.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--plugins",
        PLUGINS,
    ]
    child = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, umask=0o022)
    while child.poll() is None:
        with contextlib.suppress(OSError):
            seen.append(mode(state))
    assert child.returncode == 0, child.stderr.read()
    assert set(seen) == {0o700} and mode(tmp_path / "out.jsonl") == 0o644


def test_signals_reload_plugins_or_are_ignored(serve, stub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("sk-0123456789-first-0123")
    server = serve(plugins={"p": stub.plugin(["m"], f'[credentials]\napi_key = "file:{secret}"\n')})
    wait_for(lambda: server.models() == ["m"], what="the plugin")
    for number in [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]:
        server.child.send_signal(number)
    wait_for(
        lambda: "SIGHUP" in server.logged() and server.logged().count("signal ignored") == 2,
        what="the log message",
    )
    assert server.models() == ["m"] and server.child.poll() is None
    # A changed secret file outside the plugin directory is read again.
    loaded = server.logged().count("plugin loaded")
    secret.write_text("sk-0123456789-second-0123")
    wait_for(
        lambda: server.logged().count("plugin loaded") > loaded,
        what="the plugin to be loaded again",
    )
    output, _ = server.results(server.run([chat("a", "!headers", model="m")]))
    assert "authorization" in output[0]["response"]["body"]["choices"][0]["message"]["content"]


def test_sighup_stops_a_run_like_an_interrupt(stub, tmp_path):
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGINS, plugins)
    (plugins / "p.toml").write_text(stub.plugin(["m"]))
    (tmp_path / "in.jsonl").write_bytes(
        jsonl([chat(str(number), f"!delay 200 {number}", "m") for number in range(200)])
    )
    command = [
        HOST,
        "run",
        tmp_path / "in.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--plugins",
        plugins,
    ]
    command = [str(part) for part in [*command, "--max-concurrent-requests-per-batch", "20"]]
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: len(stub.counts()) >= 40, what="requests in flight")
    child.stderr.close()
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=30) == 130
    again = run_host(*command[1:])
    assert again.returncode == 0, again.stderr
    assert set(stub.counts().values()) == {1}, "a request was sent twice"
