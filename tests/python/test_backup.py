"""Backup of a running server and its restoration, with batches in every state."""

import fcntl
import json
import shutil
import threading
import time

import pytest
from conftest import Server, chat, lines, run_host, wait_for
from test_metrics import samples


def backup(server, folder, *arguments, code=0):
    done = run_host("backup", folder, "--data", server.data, *arguments)
    assert done.returncode == code, done.stderr
    return done


def restored(server, backup_folder, folder):
    """Restores a backup and starts a server on it, with the plugins of another one."""
    folder.mkdir()
    shutil.copytree(server.plugins, folder / "plugins")
    done = run_host("restore", backup_folder, "--data", folder / "data")
    assert done.returncode == 0, done.stderr
    return Server(folder, *server.arguments, env=server.env)


def test_server_knows_when_it_was_backed_up_last(serve, tmp_path):
    server = serve()
    name = "batchwright_last_backup_timestamp_seconds"
    wait_for(lambda: ("batchwright_disk_free_bytes", ()) in samples(server.url), what="the disk")
    assert (name, ()) not in samples(server.url)
    # The data folder of a config file, as the package does it.
    config = tmp_path / "batchwright.toml"
    config.write_text(f'[storage]\ndata = "{server.data}"\n')
    done = run_host("backup", tmp_path / "backup", "--config", config)
    assert done.returncode == 0, done.stderr
    at = wait_for(lambda: samples(server.url).get((name, ())), what="the metric")
    assert abs(time.time() - at) < 120
    # A folder that does not take the time makes no backup fail, and the operator learns of it.
    (server.data / "last-backup.part").mkdir()
    assert "alert may fire" in backup(server, tmp_path / "backup").stderr


def test_new_backup_replaces_none_and_an_interrupted_one_is_continued(serve, tmp_path):
    server = serve()
    for number in range(3):
        server.upload([chat(f"line-{number}")])
    first = tmp_path / "first"
    assert "3 copied" in backup(server, first, "--new").stdout
    refused = backup(server, first, "--new", code=5)
    assert "has a backup already" in refused.stderr and manifest(first)
    # A backup that was killed before it had a manifest.
    (first / "manifest.jsonl").unlink()
    (damaged, *_) = sorted((first / "objects").rglob("file-*"))
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)
    assert "1 copied" in backup(server, first).stdout, "what is whole is not copied again"
    assert "is complete" in backup(server, first, "--verify").stdout


def manifest(folder):
    return lines(folder / "manifest.jsonl")


def objects(folder):
    return {line["id"]: line for line in manifest(folder) if line["kind"] == "object"}


def test_backup_under_load_is_restored_with_batches_in_every_state(serve, stub, tmp_path):
    server = serve("--completion-windows=24h,1s", plugins={"p": stub.plugin(["m"])})
    client = server.client.batches
    completed = server.run(
        [chat(f"done-{number}", f"done {number}", model="m") for number in range(50)]
    )
    failed = server.run(["not json"])
    expired = client.create(
        input_file_id=server.upload([chat("late", "!delay 60000 x", model="m")]).id,
        endpoint="/v1/chat/completions",
        completion_window="1s",
    )
    server.ended(expired.id)
    cancelled = server.create([chat("cancelled", "!delay 60000 y", model="m")])
    wait_for(lambda: client.retrieve(cancelled.id).status == "in_progress", what="the start")
    client.cancel(cancelled.id)
    server.ended(cancelled.id)
    deleted = server.upload([chat("gone", model="m")])
    server.client.files.delete(deleted.id)
    # Some lines are done, and some are in flight.
    prompts = [f"half {number}" for number in range(20)]
    prompts += [f"!delay 8000 slow {number}" for number in range(20)]
    running = server.create([chat(prompt, prompt, model="m") for prompt in prompts])
    wait_for(lambda: client.retrieve(running.id).request_counts.completed == 20, what="half")
    stopped = threading.Event()
    made = []

    def load():
        while not stopped.is_set():
            made.append(server.create([chat(f"load-{n}", "hi", model="m") for n in range(20)]).id)

    loading = threading.Thread(target=load)
    loading.start()
    try:
        target = tmp_path / "backup"
        for _ in range(5):
            backup(server, target)
    finally:
        stopped.set()
        loading.join()
    print(f"five backups while {len(made)} batches were created")
    assert "is complete" in backup(server, target, "--verify").stdout
    before = stub.counts()
    server.kill()
    copy = restored(server, target, tmp_path / "copy")
    try:
        found = {batch.id: batch.status for batch in copy.client.batches.list()}
        for batch, status in (
            (completed, "completed"),
            (failed, "failed"),
            (expired, "expired"),
            (cancelled, "cancelled"),
        ):
            assert found.get(batch.id, client_status(copy, batch.id)) == status
        output, errors = copy.results(copy.client.batches.retrieve(completed.id))
        assert len(output) == 50 and not errors
        done = copy.ended(running.id, 90)
        assert (done.status, done.request_counts.completed) == ("completed", 40)
        output, _ = copy.results(done)
        assert [line["custom_id"] for line in output] == prompts
        # Lines with a result were not sent again, and those in flight once more at most.
        after = stub.counts()
        for prompt in prompts[:20]:
            assert after[prompt] == before[prompt] == 1
        assert all(after[prompt] <= 2 for prompt in prompts[20:])
        for batch in made:
            status = client_status(copy, batch)
            if status is not None:
                assert copy.ended(batch).request_counts.completed == 20
    finally:
        copy.kill()


def client_status(server, batch):
    try:
        return server.client.batches.retrieve(batch).status
    except Exception:
        return None


def test_second_backup_copies_what_is_new_and_drops_what_is_gone(serve, tmp_path):
    server = serve()
    first = server.run([chat("a")])
    target = tmp_path / "backup"
    assert "2 objects; 2 copied" in backup(server, target).stdout
    again = backup(server, target).stdout
    assert "2 objects; 0 copied" in again
    second = server.run([chat("b")])
    server.client.files.delete(first.output_file_id)
    wait_for(lambda: "3 objects; " in backup(server, target).stdout, what="the removal of the file")
    known = objects(target)
    assert set(known) == {first.input_file_id, second.input_file_id, second.output_file_id}
    stored = {path.name for path in (target / "objects").rglob("*") if path.is_file()}
    assert stored == set(known), "the objects of the manifest, and no other"
    # One database, without a log beside it.
    assert len(list(target.glob("*.db*"))) == 1
    kinds = [line["kind"] for line in manifest(target)]
    assert kinds[0] == "backup" and kinds[-1] == "end"


@pytest.mark.parametrize("what", ["object", "database", "manifest", "end"])
def test_damaged_backup_is_not_restored(serve, tmp_path, what):
    server = serve()
    batch = server.run([chat("a")])
    target = tmp_path / "backup"
    backup(server, target)
    path = {
        "object": next((target / "objects").rglob(batch.output_file_id)),
        "database": next(target.glob("*.db")),
        "manifest": target / "manifest.jsonl",
        "end": target / "manifest.jsonl",
    }[what]
    content = bytearray(path.read_bytes())
    if what == "end":
        content = content[: content.rindex(b'{"kind":"end"')]
    elif what == "manifest":
        content = content.replace(b'"bytes":', b'"bytes":1', 1)
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    checked = run_host("backup", target, "--verify")
    assert checked.returncode == 5 and "damaged" in checked.stderr
    done = run_host("restore", target, "--data", tmp_path / "data")
    assert done.returncode == 5 and "damaged" in done.stderr, done.stderr
    assert not (tmp_path / "data/batchwright.db").exists()


def test_restore_overwrites_nothing(serve, tmp_path):
    server = serve()
    server.run([chat("a")])
    target = tmp_path / "backup"
    backup(server, target)
    running = run_host("restore", target, "--data", server.data)
    assert running.returncode == 5 and "in use" in running.stderr
    server.stop()
    stopped = run_host("restore", target, "--data", server.data)
    assert stopped.returncode == 5 and "already" in stopped.stderr
    # An old log beside a restored database would damage it.
    (tmp_path / "data").mkdir()
    (tmp_path / "data/batchwright.db-wal").write_bytes(b"old")
    beside = run_host("restore", target, "--data", tmp_path / "data")
    assert beside.returncode == 5 and "batchwright.db-wal" in beside.stderr
    nothing = run_host("restore", tmp_path / "nothing", "--data", tmp_path / "new")
    assert nothing.returncode == 5 and "is no backup" in nothing.stderr
    empty = run_host("backup", tmp_path / "x", "--data", tmp_path / "nowhere")
    assert empty.returncode == 5 and "has no database" in empty.stderr


def test_interrupted_backup_leaves_the_one_before_it_valid(serve, tmp_path):
    server = serve()
    server.run([chat("a")])
    target = tmp_path / "backup"
    backup(server, target)
    before = (target / "manifest.jsonl").read_text()
    # What a killed backup leaves behind.
    (target / "batchwright-1-0.db.part").write_bytes(b"half")
    (target / "manifest.jsonl.part").write_text(json.dumps({"kind": "backup"}) + "\n")
    assert "is complete" in backup(server, target, "--verify").stdout
    assert (target / "manifest.jsonl").read_text() == before
    time.sleep(1)
    server.run([chat("b")])
    assert "4 objects" in backup(server, target).stdout
    assert not list(target.glob("*.part")), "what was left behind is removed"
    copy = restored(server, target, tmp_path / "copy")
    assert len(list(copy.client.batches.list())) == 2
    copy.kill()


def test_backups_do_not_overlap(serve, tmp_path):
    server = serve()
    server.run([chat("a")])
    for folder in (server.data, server.data / "backup", server.data.parent):
        done = run_host("backup", folder, "--data", server.data)
        assert done.returncode == 5 and "overlaps" in done.stderr, done.stderr
    target = tmp_path / "backup"
    backup(server, target)
    with (target / "backup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_host("backup", target, "--data", server.data)
    assert done.returncode == 5 and "another backup" in done.stderr
    backup(server, target)


def test_lost_file_is_said_by_backup_check_and_restoration(serve, tmp_path):
    server = serve()
    batch = server.run([chat("a")])
    next((server.data / "objects").rglob(batch.output_file_id)).unlink()
    target = tmp_path / "backup"
    assert "1 files have no content" in backup(server, target).stderr
    assert "1 files have no content" in backup(server, target, "--verify").stderr
    done = run_host("restore", target, "--data", tmp_path / "data")
    assert done.returncode == 0 and "1 files have no content" in done.stderr


def test_folder_with_other_files_is_refused_and_keeps_them(serve, tmp_path):
    server = serve()
    other = tmp_path / "archive"
    other.mkdir()
    (other / "batchwright-2025.db").write_text("precious")
    refused = run_host("backup", other, "--data", server.data)
    assert refused.returncode == 5 and "other files than a backup" in refused.stderr
    # Also the data folder of another server.
    second = serve(name="second")
    second.upload([chat("a", "hi")])
    second.stop()
    refused = run_host("backup", second.data, "--data", server.data)
    assert refused.returncode == 5 and list(second.data.glob("objects/*/files/*"))
    assert (other / "batchwright-2025.db").read_text() == "precious"
    # A file that is put into a backup later stays, too.
    target = tmp_path / "backup"
    assert run_host("backup", target, "--data", server.data).returncode == 0
    (target / "batchwright-2025.tar.gz").write_text("precious")
    (target / "batchwright-1-0.db").write_text("left by an interrupted backup")
    assert run_host("backup", target, "--data", server.data).returncode == 0
    assert (target / "batchwright-2025.tar.gz").exists()
    assert not (target / "batchwright-1-0.db").exists()


def test_commands_leave_no_log_beside_a_stopped_server(serve, tmp_path):
    server = serve()
    server.upload([chat("a", "hi")])
    server.stop()
    before = sorted(path.name for path in server.data.iterdir())
    assert not [name for name in before if name.endswith(("-wal", "-shm"))]
    run_host("backup", tmp_path / "backup", "--data", server.data)
    run_host("gc", "--dry-run", "--data", server.data)
    run_host("doctor", "--data", server.data, "--plugins", server.plugins)
    after = sorted(path.name for path in server.data.iterdir())
    assert after == sorted([*before, "last-backup"])
