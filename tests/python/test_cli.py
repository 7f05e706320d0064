"""The command line: `run` without a server, `batch` with one, startup errors, full disks, shutdown.

Attacks: kills at random moments, outputs that would overwrite a user's file, wrong settings, and a
data folder on a disk without space.
"""

import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request

import openai
import pytest
from conftest import HOST, PLUGINS, chat, jsonl, run_host, wait_for


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_writes_results_and_a_summary(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b")]))
    done = run_host("run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "completed: 2 of 2 answered, 0 failed" in done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_run_exits_1_and_names_the_error_file_if_a_line_fails(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b", n=99)]))
    command = ["run", "in.jsonl", "-o", "out.jsonl", "-e", "bad.jsonl", "--plugins", PLUGINS]
    done = run_host(*command, cwd=tmp_path)
    assert done.returncode == 1 and "errors: bad.jsonl" in done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "bad.jsonl")] == ["b"]

    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), "oops"]))
    done = run_host(*command, "--force", cwd=tmp_path)
    assert (
        done.returncode == 1
        and "line 2: invalid_json_line" in done.stderr
        and "rejected" in done.stderr
    )


def test_run_detects_the_endpoint_in_its_input(tmp_path):
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "echo", "input": "x"},
    }
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf\n" + jsonl([line]))
    done = run_host("run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        run_host("run", "nothing.jsonl", "-o", "o", "--plugins", PLUGINS, cwd=tmp_path).returncode
        == 1
    )


def provider_folder(tmp_path, stub, limits="max_in_flight = 4\n"):
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for file in ["validator-standard.wasm", "inference-openai.wasm", "standard.toml"]:
        (plugins / file).write_bytes((PLUGINS / file).read_bytes())
    (plugins / "p.toml").write_text(stub.plugin(["m"], f"[limits]\n{limits}"))
    return plugins


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_run_resumes_after_interrupt_or_kill(tmp_path, stub, how):
    plugins = provider_folder(tmp_path, stub)
    prompts = [f"!delay 20 {number}" for number in range(400)]
    content = jsonl([chat(str(i), text, model="m") for i, text in enumerate(prompts)])
    (tmp_path / "in.jsonl").write_bytes(content)
    command = [HOST, "run", "in.jsonl", "-o", "out.jsonl", "--plugins", plugins]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: sum(stub.counts().values()) > 40, what="some progress")
    first.send_signal(how)
    _, stderr = first.communicate(timeout=60)
    assert not (tmp_path / "out.jsonl").exists()
    if how == signal.SIGINT:
        assert first.returncode == 130 and re.search(
            r"stopped: \d+ of 400 done and kept", stderr
        ), stderr
    sent = sum(stub.counts().values())
    assert sent < 400
    # Another input with the same output is refused.
    (tmp_path / "other.jsonl").write_bytes(jsonl([chat("a")]))
    other = run_host("run", "other.jsonl", *command[3:], cwd=tmp_path)
    assert other.returncode == 2 and "/in.jsonl" in other.stderr and "--partial" in other.stderr, (
        other.stderr
    )
    # The content is compared, not the inode: a script may have written the same file again.
    (tmp_path / "in.jsonl").unlink()
    (tmp_path / "in.jsonl").write_bytes(content)
    done = run_host(*command[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "continuing an unfinished run" in done.stderr
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == [
        str(i) for i in range(400)
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["plugins"]
    counts = stub.counts()
    assert len(counts) == 400
    # An orderly stop drains, so that no request is sent twice.
    assert max(counts.values()) == 1 if how == signal.SIGINT else max(counts.values()) <= 2


def test_run_killed_at_any_moment_writes_each_result_once(tmp_path, stub):
    plugins = provider_folder(tmp_path, stub, "max_in_flight = 16\n")
    number = 1000
    (tmp_path / "in.jsonl").write_bytes(
        jsonl(
            [chat(str(i), f"!delay 60 {i}", model="m") for i in range(number)]
            + [chat("bad", "!status 400", model="m")]
        )
    )
    command = [HOST, "run", "in.jsonl", "-o", "out.jsonl", "--plugins", plugins]
    rng, kills, done = random.Random(11), 0, False
    while not done:
        run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        try:
            _, stderr = run.communicate(timeout=rng.uniform(0.05, 0.6) if kills < 20 else 60)
            done = True
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            kills += 1
            if (tmp_path / "out.jsonl").exists() and not (
                tmp_path / "out.jsonl.batchwright"
            ).exists():
                # The kill came after the last step.
                break
    else:
        assert run.returncode == 1, stderr
        assert (
            f"{number} of {number + 1} answered, 1 failed" in stderr
            or "this run had finished" in stderr
        ), stderr
    assert [line["custom_id"] for line in lines(tmp_path / "out.jsonl")] == [
        str(i) for i in range(number)
    ]
    assert [line["custom_id"] for line in lines(tmp_path / "out.errors.jsonl")] == ["bad"]
    counts = stub.counts()
    # Only requests in flight, or answered and not yet committed, are sent again.
    assert kills >= 5 and sum(counts.values()) - len(counts) <= kills * (16 + 16), counts
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.errors.jsonl",
        "out.jsonl",
        "plugins",
        "stub.log",
    ]


def test_run_partial_writes_the_results_of_an_unfinished_run(tmp_path, stub):
    plugins = provider_folder(tmp_path, stub)
    prompts = [*(str(number) for number in range(20)), *("!delay 600000" for _ in range(20))]
    (tmp_path / "in.jsonl").write_bytes(
        jsonl([chat(str(i), text, model="m") for i, text in enumerate(prompts)])
    )
    # Requests may overtake each other within the in-flight window: two may wait behind hung ones.
    window = ["--max-concurrent-requests-per-batch", "6"]
    command = [
        "run",
        "in.jsonl",
        "-o",
        "out.jsonl",
        "--plugins",
        plugins,
        "--stop-grace",
        "10ms",
        *window,
    ]
    nothing = run_host(*command, "--partial", cwd=tmp_path)
    assert nothing.returncode == 2 and "no unfinished run" in nothing.stderr
    run = subprocess.Popen([HOST, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: stub.counts().get("!delay 600000", 0) == 4, what="the hung requests")
    database = sqlite3.connect(
        f"file:{tmp_path}/out.jsonl.batchwright/batchwright.db?mode=ro", uri=True
    )
    wait_for(
        lambda: database.execute("SELECT completed FROM batches WHERE completed > 15").fetchall(),
        what="the results",
    )
    database.close()
    run.kill()
    run.communicate()
    (tmp_path / "in.jsonl").unlink()
    (tmp_path / "in.jsonl").write_text("something else\n")
    done = run_host(*command, "--partial", cwd=tmp_path)
    (answered,) = re.findall(r"cancelled: (\d+) of 40 answered", done.stderr)
    assert done.returncode == 1 and int(answered) > 15, done.stderr
    assert len(lines(tmp_path / "out.jsonl")) == int(answered)
    assert len(lines(tmp_path / "out.errors.jsonl")) == 40 - int(answered)
    assert {line["error"]["code"] for line in lines(tmp_path / "out.errors.jsonl")} == {
        "batch_cancelled"
    }
    assert not (tmp_path / "out.jsonl.batchwright").exists()


GOOD = jsonl([chat("a")])
REJECTED = b'{"custom_id":"a"}\n'


def snapshot(folder):
    """Returns the entries of a folder by name: contents of files, targets of links."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.iterdir()
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl", "-o", "in.jsonl"], "is the input"),
        (["bad.jsonl", "-o", "bad.jsonl"], "is the input"),
        (["in.jsonl", "-o", "hard.jsonl"], "is the input"),
        (["in.jsonl", "-o", "soft.jsonl"], "is the input"),
        (["in.jsonl", "-o", "./folder/../in.jsonl"], "is the input"),
        (["in.jsonl", "-o", "new.jsonl", "-e", "in.jsonl"], "is the input"),
        (["in.jsonl", "-o", "new.jsonl", "-e", "new.jsonl"], "are the same file"),
        (["in.jsonl", "-o", "new.jsonl", "-e", "./folder/../new.jsonl"], "are the same file"),
        (["in.jsonl", "-o", "old.jsonl"], "old.jsonl exists"),
        (["bad.jsonl", "-o", "old.jsonl"], "old.jsonl exists"),
        (["in.jsonl", "-o", "new.jsonl", "-e", "old.jsonl"], "old.jsonl exists"),
        (["in.jsonl", "-o", "link-to-old.jsonl"], "exists"),
        (["in.jsonl", "-o", "nowhere.jsonl"], "link to a missing file"),
        (["in.jsonl", "-o", "folder"], "is a folder"),
        (["in.jsonl", "-o", "no/such/folder.jsonl"], "its folder"),
        (["folder", "-o", "new.jsonl"], "not a regular file"),
        (["/dev/null", "-o", "new.jsonl"], "not a regular file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_run_overwrites_no_file_of_the_user(tmp_path, arguments, message, force):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "bad.jsonl").write_bytes(REJECTED)
    (tmp_path / "old.jsonl").write_text("answers of yesterday, paid for\n")
    (tmp_path / "folder").mkdir()
    os.link(tmp_path / "in.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to("in.jsonl")
    (tmp_path / "link-to-old.jsonl").symlink_to("old.jsonl")
    (tmp_path / "nowhere.jsonl").symlink_to("nothing.jsonl")
    before = snapshot(tmp_path)
    if force and "exists" in message:
        pytest.skip("overwriting is what --force is for")
    done = run_host(
        "run", *arguments, "--plugins", PLUGINS, *(["--force"] if force else []), cwd=tmp_path
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert snapshot(tmp_path) == before and not list(tmp_path.glob("*.batchwright"))


def test_run_finished_is_not_repeated_without_force(tmp_path, stub):
    plugins = provider_folder(tmp_path, stub)
    (tmp_path / "in.jsonl").write_bytes(
        jsonl([chat("a", "one", model="m"), chat("b", "!status 400", model="m")])
    )
    command = ["run", "in.jsonl", "-o", "out.jsonl", "--plugins", plugins]
    assert run_host(*command, cwd=tmp_path).returncode == 1
    before, sent = snapshot(tmp_path), sum(stub.counts().values())
    again = run_host(*command, cwd=tmp_path)
    assert again.returncode == 2 and "give --force" in again.stderr
    assert sum(stub.counts().values()) == sent and snapshot(tmp_path) == before
    # An unavailable provider loses no answer either.
    answers = before["out.jsonl"]
    stub.kill()
    unavailable = run_host(*command, "--force", "--max-outage", "1s", cwd=tmp_path)
    assert unavailable.returncode == 6 and (tmp_path / "out.jsonl").read_bytes() == answers, (
        unavailable.stderr
    )
    down = run_host(*command, "--force", "--partial", cwd=tmp_path)
    assert (
        down.returncode == 1
        and "out.jsonl is from an earlier run and stays as it is" in down.stderr
    ), down.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == answers
    assert len(lines(tmp_path / "out.errors.jsonl")) == 2
    # A rejected input leaves every file as it is.
    (tmp_path / "bad.jsonl").write_bytes(REJECTED)
    before = snapshot(tmp_path)
    rejected = run_host("run", "bad.jsonl", *command[2:], "--force", cwd=tmp_path)
    assert rejected.returncode == 1 and "rejected" in rejected.stderr
    assert snapshot(tmp_path) == before and not list(tmp_path.glob("*.batchwright"))


def test_run_writes_through_symlinks_and_to_pipes(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b", n=99)]))
    (tmp_path / "real").mkdir()
    (tmp_path / "real/out.jsonl").write_text("old\n")
    (tmp_path / "real/out.jsonl").chmod(0o640)
    (tmp_path / "link.jsonl").symlink_to("real/out.jsonl")
    command = ["run", "in.jsonl", "--plugins", PLUGINS]
    assert run_host(*command, "-o", "link.jsonl", "--force", cwd=tmp_path).returncode == 1
    assert (tmp_path / "link.jsonl").is_symlink() and len(lines(tmp_path / "real/out.jsonl")) == 1
    assert (tmp_path / "real/out.jsonl").stat().st_mode & 0o777 == 0o640
    done = run_host(*command, "-o", "/dev/stdout", "-e", "/dev/null", cwd=tmp_path)
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == ["a"], (
        done.stderr
    )
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", "pipe"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    run_host(*command, "-o", "pipe", "-e", "/dev/null", cwd=tmp_path)
    assert json.loads(reader.communicate(timeout=30)[0])["custom_id"] == "a"
    assert not list(tmp_path.rglob("*.batchwright"))


def test_run_has_no_completion_window(tmp_path, stub):
    plugins = provider_folder(tmp_path, stub)
    (tmp_path / "in.jsonl").write_bytes(
        jsonl([chat("a", "!delay 600000", model="m"), chat("b", "hi", model="m")])
    )
    (tmp_path / "c.toml").write_text('[batch]\ncompletion_windows = ["1h"]\n')
    command = ["run", "in.jsonl", "-o", "out.jsonl", "--plugins", plugins, "--config", "c.toml"]
    run = subprocess.Popen([HOST, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(stub.counts()) == 2, what="both requests in flight")
    run.kill()
    run.communicate()
    # The deadline is decades away, so a run continues after any pause.
    database = sqlite3.connect(tmp_path / "out.jsonl.batchwright/batchwright.db")
    (left,) = database.execute("SELECT expires_at - created_at FROM batches").fetchone()
    database.close()
    assert left > 50 * 365 * 86_400_000


def test_run_without_validator_is_refused(tmp_path, stub):
    plugins = provider_folder(tmp_path, stub)
    (plugins / "standard.toml").unlink()
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    done = run_host("run", "in.jsonl", "-o", "out.jsonl", "--plugins", plugins, cwd=tmp_path)
    assert done.returncode == 4 and "no validator is loaded" in done.stderr
    assert not (tmp_path / "out.jsonl.batchwright").exists()


def test_download_overwrites_no_file_and_reports_missing_errors(server, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a"), chat("b", n=99)]))
    (tmp_path / "old.jsonl").write_text("old\n")

    def batch(*arguments):
        return run_host("batch", *arguments, "--url", server.url, cwd=tmp_path)

    made = json.loads(batch("create", "in.jsonl", "--json").stdout)
    server.ended(made["id"])
    for arguments, message in [
        (["-o", "old.jsonl"], "old.jsonl exists"),
        (["-o", "x.jsonl", "-e", "x.jsonl"], "are the same file"),
        (["-o", "."], "is a folder"),
    ]:
        done = batch("download", made["id"], *arguments)
        assert done.returncode == 2 and message in done.stderr
    assert (tmp_path / "old.jsonl").read_text() == "old\n" and not (tmp_path / "x.jsonl").exists()
    done = batch("download", made["id"], "-o", "o.jsonl")
    assert done.returncode == 1 and "name a path for it with --errors" in done.stderr
    assert len(lines(tmp_path / "o.jsonl")) == 1
    # A truncated download does not replace a complete file.
    output = next(
        (server.data / "objects/default/files").glob(
            server.client.batches.retrieve(made["id"]).output_file_id
        )
    )
    before = (tmp_path / "o.jsonl").read_bytes()
    os.truncate(output, 10)
    done = batch("download", made["id"], "-o", "o.jsonl", "--force")
    assert done.returncode == 1 and "was interrupted" in done.stderr, done.stderr
    assert (tmp_path / "o.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "in.jsonl",
        "o.jsonl",
        "old.jsonl",
    ]


def test_run_refused_leaves_no_state(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a")]))
    command = ["run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS]
    done = run_host(*command, "--max-file-size", "10B", cwd=tmp_path)
    assert done.returncode == 1 and "larger than 10 bytes" in done.stderr
    done = run_host(
        "run", "in.jsonl", "-o", "out.jsonl", "--plugins", tmp_path / "nothing", cwd=tmp_path
    )
    assert done.returncode == 4 and "--plugins" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_run_refused_keeps_a_folder_that_it_did_not_create(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a")]))
    folder = tmp_path / "out.jsonl.batchwright"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    done = run_host(
        *["run", "in.jsonl", "-o", "out.jsonl", "--plugins", PLUGINS, "--max-file-size", "10B"],
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert (folder / "notes.txt").read_text() == "mine"


def test_batch_commands_create_watch_list_and_download(server, tmp_path):
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
    assert [
        line["custom_id"] for line in lines(tmp_path / "o.jsonl") + lines(tmp_path / "e.jsonl")
    ] == ["a", "b"]
    refused = batch("cancel", created["id"])
    assert (
        refused.returncode == 1
        and refused.stderr == "error: Cannot cancel a batch with status 'completed'.\n"
    )
    again = batch("create", created["input_file_id"], "--watch")
    assert "completed  2/2 done" in again.stdout
    unreachable = run_host("batch", "list", "--url", "http://127.0.0.1:9")
    assert unreachable.returncode == 1 and "is the server running" in unreachable.stderr


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


# Number of requests whose answers exceed the small disk many times.
FILLING_REQUESTS = 2000


@pytest.fixture
def full_disk(tmp_path, serve, stub):
    """Starts a server with its data folder on a small disk, and a batch that fills the disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    data = tmp_path / "server/data"
    data.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", data], check=True)
    try:
        server = serve(plugins={"p": stub.plugin(["m"])})
        (data / "filler").write_bytes(b"x" * (8 << 20))
        with pytest.raises(openai.InternalServerError) as refused:
            server.upload(b"y" * (20 << 20))
        assert refused.value.status_code == 507 and refused.value.code == "storage_full"
        batch = server.create(
            [chat(str(number), "!big 20000", model="m") for number in range(FILLING_REQUESTS)]
        )
        # The refused upload above is in the log, too.
        retried = re.compile("will be retried.*disk is full")
        wait_for(lambda: retried.search(server.logged()), what="the error in the log")
        yield server, batch
        assert "panicked" not in server.logged()
    finally:
        server.kill()
        subprocess.run(["umount", "-l", data], check=True)


def test_full_disk_is_reported_and_batch_continues_after_space_is_freed(full_disk):
    server, batch = full_disk
    assert server.client.batches.retrieve(batch.id).status in ("in_progress", "finalizing")
    (server.data / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=400m", server.data], check=True)
    batch = server.ended(batch.id)
    output, errors = server.results(batch)
    assert [line["custom_id"] for line in output] == [
        str(number) for number in range(FILLING_REQUESTS)
    ] and errors == []


def test_full_disk_does_not_block_shutdown(full_disk):
    server, _ = full_disk
    assert server.stop() == 0


def ready(server):
    try:
        with urllib.request.urlopen(server.url + "/health/ready") as answer:
            return json.load(answer)["status"]
    except urllib.error.HTTPError as error:
        assert error.code == 503
        return " ".join(json.load(error)["reasons"])


def unchanged(number):
    """Returns the number if it stays the same for a second."""
    before = number()
    time.sleep(1)
    return before if number() == before else None


def test_full_disk_stops_requests_and_few_are_sent_twice(full_disk, stub):
    server, batch = full_disk
    retrieve = server.client.batches.retrieve
    # Without disk space no result can be committed, so no further request is sent.
    sent = wait_for(lambda: unchanged(lambda: sum(stub.counts().values())), what="requests to stop")
    committed = retrieve(batch.id).request_counts.completed
    print(f"{sent} sent, {committed} committed")
    # At most the requests that the memory budget holds were sent.
    assert sent < FILLING_REQUESTS and sent - committed <= 800
    # Readiness fails; files can still be read and deleted.
    wait_for(lambda: "is full" in ready(server), what="readiness to fail")
    with urllib.request.urlopen(server.url + "/health/serving") as answer:
        assert answer.status == 200
    files = list(server.client.files.list())
    assert files and server.client.files.content(files[0].id).content
    # After a kill and with free space, committed requests are not sent again.
    server.kill()
    (server.data / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=400m", server.data], check=True)
    server.start()
    ended = server.ended(batch.id)
    assert ended.request_counts.completed == FILLING_REQUESTS
    counts = stub.ask("/arrivals")
    arrivals = sum(len(times) for times in counts.values())
    print(f"{arrivals - FILLING_REQUESTS} of {FILLING_REQUESTS} sent twice")
    assert arrivals - FILLING_REQUESTS <= sent - committed
    wait_for(lambda: ready(server) == "ok", what="readiness")


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
