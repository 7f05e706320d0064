"""The `batch` and `file` commands, which are clients of a server.

Attacks: outputs that would overwrite a user's file, truncated and interrupted downloads.
"""

import contextlib
import http.client
import json
import os
import socket
import threading

from conftest import CHAT, chat, jsonl, lines, run_host


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


def test_download_cut_off_keeps_the_existing_file(serve, tmp_path):
    server = serve()
    batch = server.run([chat(str(number), "x" * 2000) for number in range(2000)])
    target = tmp_path / "out.jsonl"
    download = ["batch", "download", batch.id, "--output", target, "--force"]
    assert run_host(*download, "--url", server.url).returncode == 0
    whole = target.read_bytes()
    listener = socket.create_server(("127.0.0.1", 0))

    def cut_short():
        """Forwards requests; drops the second half of file contents."""
        while True:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    path = client.recv(65536).split()[1].decode()
                    upstream = http.client.HTTPConnection(server.url.removeprefix("http://"))
                    upstream.request("GET", path)
                    answer = upstream.getresponse()
                    body = answer.read()
                    head = f"HTTP/1.1 {answer.status} OK\r\ncontent-length: {len(body)}\r\n"
                    head += "connection: close\r\n\r\n"
                    client.sendall(
                        head.encode() + (body[: len(body) // 2] if "/content" in path else body)
                    )

    threading.Thread(target=cut_short, daemon=True).start()
    broken = run_host(*download, "--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert broken.returncode == 1 and "was interrupted" in broken.stderr, broken.stderr
    assert target.read_bytes() == whole and [path.name for path in tmp_path.glob(".batch*")] == []
    # A batch with only errors, and no --errors: the exit status reports the missing file.
    failed = server.run([chat("a", n=0)])
    alone = run_host(
        "batch", "download", failed.id, "--output", tmp_path / "none.jsonl", "--url", server.url
    )
    assert alone.returncode == 1 and "--errors" in alone.stderr


def test_file_commands_list_and_delete_and_result_lifetimes_are_settings(serve):
    server = serve("--output-file-lifetime", "1h", "--error-file-lifetime", "2h")
    batch = server.run([chat("a")])
    file = server.client.files.retrieve(batch.output_file_id)
    assert file.expires_at - file.created_at == 3600
    own = server.client.batches.create(
        input_file_id=batch.input_file_id,
        endpoint=CHAT,
        completion_window="24h",
        extra_body={"output_expires_after": {"anchor": "created_at", "seconds": 7200}},
    )
    file = server.client.files.retrieve(server.ended(own.id).output_file_id)
    assert file.expires_at - file.created_at == 7200
    listed = run_host("file", "--url", server.url, "list", "--purpose", "batch_output").stdout
    assert (
        listed.count("file-") == 2
        and f"{batch.id}_output.jsonl" in listed
        and "expires 20" in listed
    )
    gone = run_host("file", "--url", server.url, "delete", batch.output_file_id, "file-unknown")
    assert (
        gone.returncode == 1
        and f"deleted {batch.output_file_id}" in gone.stdout
        and "No file found" in gone.stderr
    )
    plain = serve(name="plain")
    assert plain.client.files.retrieve(plain.run([chat("a")]).output_file_id).expires_at is None
