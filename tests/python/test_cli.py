"""The command line: one batch without a server, batches of a server, and mistakes that are told of."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess

import openai
import pytest
from conftest import HOST, PLUGINS, chat, jsonl, run_host, wait_for


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_answers_a_file_and_says_how_it_went(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b")]))
    done = run_host("run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "completed: 2 of 2 answered, 0 failed" in done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_run_fails_if_a_line_fails_and_says_where_it_is(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b", n=99)]))
    command = ["run", "in.jsonl", "-o", "out.jsonl", "-e", "bad.jsonl", "--plugins", PLUGINS]
    done = run_host(*command, cwd=tmp_path)
    assert done.returncode == 1 and "errors: bad.jsonl" in done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "bad.jsonl")] == ["b"]

    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), "oops"]))
    done = run_host(*command, cwd=tmp_path)
    assert done.returncode == 1 and "line 2: invalid_json_line" in done.stderr and "rejected" in done.stderr


def test_run_finds_its_endpoint_in_the_file(tmp_path):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "echo", "input": "x"}}
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf\n" + jsonl([line]))
    done = run_host("run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run_host("run", "nothing.jsonl", "-o", "o", "--plugins", PLUGINS, cwd=tmp_path).returncode == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_continues(tmp_path, stub, how):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for file in ["validator-standard.wasm", "inference-openai.wasm", "standard.toml"]:
        (plugins / file).write_bytes((PLUGINS / file).read_bytes())
    (plugins / "p.toml").write_text(stub.plugin(["m"], "[limits]\nconcurrency = 4\n"))
    prompts = [f"!delay 20 {number}" for number in range(400)]
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat(str(i), text, model="m") for i, text in enumerate(prompts)]))
    command = [HOST, "run", "in.jsonl", "-o", "out.jsonl", "--plugins", plugins]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: sum(stub.counts().values()) > 40, what="some progress")
    first.send_signal(how)
    _, said = first.communicate(timeout=60)
    assert not (tmp_path / "out.jsonl").exists()
    if how == signal.SIGINT:
        assert first.returncode == 130 and re.search(r"stopped: \d+ of 400 done and kept", said), said
    sent = sum(stub.counts().values())
    assert sent < 400
    # Another input is not taken for this one.
    (tmp_path / "other.jsonl").write_bytes(jsonl([chat("a")]))
    other = run_host("run", "other.jsonl", *command[3:], cwd=tmp_path)
    assert other.returncode == 1 and "/in.jsonl" in other.stderr and "delete the folder" in other.stderr
    done = run_host(*command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing an unfinished run" in done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == [str(i) for i in range(400)]
    counts = stub.counts()
    assert len(counts) == 400
    # Nothing that was finished in order is asked twice.
    assert max(counts.values()) == 1 if how == signal.SIGINT else max(counts.values()) <= 2


def test_a_run_that_could_not_begin_leaves_nothing_behind(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a")]))
    command = ["run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS]
    done = run_host(*command, "--max-file-size", "10B", cwd=tmp_path)
    assert done.returncode == 1 and "larger than 10 bytes" in done.stderr
    done = run_host("run", "in.jsonl", "-o", "out.jsonl", "--plugins", tmp_path / "nothing", cwd=tmp_path)
    assert done.returncode == 4 and "--plugins" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_batches_of_a_server_from_the_command_line(server, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b", n=99)]))

    def batch(*arguments):
        return run_host("batch", *arguments, "--url", server.url, cwd=tmp_path)

    created = batch("create", "in.jsonl", "--metadata", "team=x", "--json")
    assert created.returncode == 0, created.stderr
    created = json.loads(created.stdout)
    assert created["metadata"] == {"team": "x"}
    watched = batch("watch", created["id"])
    assert watched.returncode == 1 and "completed  2/2 done, 1 failed" in watched.stdout
    assert created["id"] in batch("list").stdout
    assert json.loads(batch("get", created["id"], "--json").stdout)["status"] == "completed"
    done = batch("download", created["id"], "-o", "o.jsonl", "-e", "e.jsonl")
    assert done.returncode == 0, done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "o.jsonl") + lines(tmp_path / "e.jsonl")] == ["a", "b"]
    refused = batch("cancel", created["id"])
    assert refused.returncode == 1 and refused.stderr == "error: Cannot cancel a batch with status 'completed'.\n"
    again = batch("create", created["input_file_id"], "--watch")
    assert "completed  2/2 done" in again.stdout
    nobody = run_host("batch", "list", "--url", "http://127.0.0.1:9")
    assert nobody.returncode == 1 and "is the server running" in nobody.stderr


def start(tmp_path, *arguments, env=None):
    base = ["serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "data", "--plugins", PLUGINS]
    return run_host(*base, *arguments, env=env, timeout=20)


def test_mistakes_at_the_start_are_told_of_in_one_message(tmp_path, serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_host("serve", "--listen", f"127.0.0.1:{port}", "--data", tmp_path / "d", "--plugins", PLUGINS)
        assert done.returncode == 1 and f"failed to listen on 127.0.0.1:{port}" in done.stderr
        assert "--listen" in done.stderr

    (tmp_path / "c.toml").write_text('max_file_size = "1GiB"\nmax_fil_size = "1GiB"\n')
    done = start(tmp_path, "--config", tmp_path / "c.toml")
    assert done.returncode == 3 and "line 2" in done.stderr and "max_fil_size" in done.stderr
    done = start(tmp_path, "--config", tmp_path / "nothing.toml")
    assert done.returncode == 3 and "nothing.toml" in done.stderr
    done = start(tmp_path, env={"BATCHWRIGHT_MAX_ATTEMPTS": "many"})
    assert done.returncode == 2 and "'many' for '--max-attempts" in done.stderr
    done = start(tmp_path, "--log-level", "=loud=")
    assert done.returncode == 1 and "log_level" in done.stderr

    (tmp_path / "file").write_text("")
    done = run_host("serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "file", "--plugins", PLUGINS)
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


def test_settings_come_from_the_environment_and_the_file(tmp_path, serve):
    (tmp_path / "c.toml").write_text('max_requests_per_file = 1\ncompletion_windows = ["24h", "1h"]\n')
    server = serve("--config", tmp_path / "c.toml", env={"BATCHWRIGHT_MAX_REPORTED_ERRORS": "1"})
    batch = server.client.batches.create(
        input_file_id=server.upload([chat("a"), chat("b"), "x", "y"]).id,
        endpoint="/v1/chat/completions",
        completion_window="1h",
    )
    assert batch.expires_at == batch.created_at + 3600
    batch = server.ended(batch.id)
    assert [error.code for error in batch.errors.data] == ["too_many_requests", "invalid_json_line", "too_many_errors"]


@pytest.fixture
def full_disk(tmp_path, serve, stub):
    """A server whose data folder is on a small disk, and a batch that fills it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    data = tmp_path / "server/data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", data], check=True)
    try:
        server = serve(plugins={"p": stub.plugin(["m"])})
        (data / "filler").write_bytes(b"x" * (8 << 20))
        with pytest.raises(openai.InternalServerError) as refused:
            server.upload(b"y" * (20 << 20))
        assert refused.value.status_code == 507 and refused.value.code == "storage_full"
        batch = server.create([chat(str(number), "!big 20000", model="m") for number in range(600)])
        wait_for(lambda: "disk is full" in server.logged(), what="the complaint")
        yield server, batch
        assert "panicked" not in server.logged()
    finally:
        server.kill()
        subprocess.run(["umount", "-l", data], check=True)


def test_a_full_disk_is_told_of_and_work_goes_on_when_there_is_room(full_disk):
    server, batch = full_disk
    assert server.client.batches.retrieve(batch.id).status in ("in_progress", "finalizing")
    (server.data / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", server.data], check=True)
    batch = server.ended(batch.id)
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == [str(number) for number in range(600)] and errors == []


def test_a_server_on_a_full_disk_can_be_stopped(full_disk):
    server, _ = full_disk
    assert server.stop() == 0


def test_the_server_stops_in_order_and_at_once_when_asked_twice(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    server.create([chat(str(number), "!delay 300", model="m") for number in range(20)])
    wait_for(lambda: sum(stub.counts().values()) > 0, what="a request in flight")
    assert server.stop() == 0 and "stopped" in server.logged()
    sent = sum(stub.counts().values())
    server.start()
    wait_for(lambda: all(batch.status == "completed" for batch in server.client.batches.list()), what="the end")
    assert sum(stub.counts().values()) == 20 >= sent

    server.create([chat(str(number), "!delay 60000", model="m") for number in range(20)])
    wait_for(lambda: sum(stub.counts().values()) > 20, what="a request in flight")
    server.child.send_signal(signal.SIGTERM)
    # The log has the first shutdown already.
    wait_for(lambda: server.logged().count("shutting down") == 2, what="the shutdown")
    server.child.send_signal(signal.SIGTERM)
    assert server.child.wait(timeout=10) == 0
