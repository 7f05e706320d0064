"""`run`, which needs no server: results, exit statuses, interrupted and finished runs.

Attacks: kills at random moments, and outputs that would overwrite a user's file.
"""

import json
import os
import pathlib
import random
import re
import signal
import sqlite3
import subprocess

import pytest
from conftest import HOST, PLUGINS, chat, jsonl, lines, run_host, wait_for


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


def test_run_accepts_non_utf8_paths_and_refuses_pipes_as_input(tmp_path):
    folder = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    folder.mkdir()
    (folder / "in.jsonl").write_bytes(jsonl([chat("a")]))
    config = tmp_path / "config.toml"
    config.write_text('[batch]\ncompletion_windows = ["1h", "24h"]\n')
    ran = subprocess.run(
        [
            HOST,
            "run",
            folder / "in.jsonl",
            "--output",
            folder / "out.jsonl",
            "--plugins",
            PLUGINS,
            "--config",
            config,
        ],
        capture_output=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("f")] == [folder.name]
    piped = subprocess.run(
        [HOST, "run", "/dev/stdin", "--output", tmp_path / "piped.jsonl", "--plugins", PLUGINS],
        input=jsonl([chat("a")]),
        capture_output=True,
    )
    assert piped.returncode == 2 and b"save it to a file" in piped.stderr
    assert not list(tmp_path.glob("*.batchwright"))
