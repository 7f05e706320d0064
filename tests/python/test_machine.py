"""Where a server runs: its disk, its signals, its settings."""

import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time

import pytest
from conftest import CHAT, HOST, PLUGINS, ROOT, built, chat, jsonl, run_host, wait_for



def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_what_a_server_keeps_is_for_its_own_user_alone(serve, tmp_path):
    server = serve()
    for opened in [False, True]:
        if opened:
            # As an older version made it.
            for path in [server.data, server.data / "objects", server.data / "batchwright.db"]:
                path.chmod(mode(path) | (0o055 if path.is_dir() else 0o044))
            server.start()
        server.run([chat("a")])
        assert mode(server.data) == 0o700
        for path in server.data.rglob("*"):
            assert mode(path) & 0o077 == 0, path
        server.stop()
    # A clean stop leaves no log of changes behind.
    assert not list(server.data.glob("*-wal"))


def test_a_folder_of_somebodys_keeps_its_mode(serve, tmp_path):
    data = tmp_path / "server/data"
    data.mkdir(parents=True)
    (data / "thesis.txt").write_text("mine")
    data.chmod(0o755)
    (data / "thesis.txt").chmod(0o644)
    server = serve()
    server.run([chat("a")])
    assert (mode(data), mode(data / "thesis.txt"), mode(data / "batchwright.db")) == (0o755, 0o644, 0o600)


def test_a_run_keeps_its_state_to_itself_and_its_results_to_the_users_umask(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat("a")]))
    seen = []
    state = tmp_path / "out.jsonl.batchwright"
    command = [HOST, "run", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plugins", PLUGINS]
    child = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, umask=0o022)
    while child.poll() is None:
        with contextlib.suppress(OSError):
            seen.append(mode(state))
    assert child.returncode == 0, child.stderr.read()
    assert set(seen) == {0o700} and mode(tmp_path / "out.jsonl") == 0o644


def test_control_characters_are_not_obeyed_by_terminals(tmp_path):
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat(evil, model=evil), chat(evil, model=evil)]))
    ran = run_host("run", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plugins", PLUGINS)
    assert ran.returncode == 1 and "model_not_found" in ran.stderr
    assert not [letter for letter in ran.stderr if letter in "\x1b\x07\x9b\u202e"], ran.stderr


def test_failures_are_summed_up_by_code(serve, stub, tmp_path):
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGINS, plugins)
    (plugins / "p.toml").write_text(stub.plugin(["m"]))
    lines = [chat(str(number), f"!status {400 + number % 2 * 22} {number}", "m") for number in range(5)] + [chat("good", model="m")]
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines))
    ran = run_host("run", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plugins", plugins, "--max-attempts", "1")
    assert ran.returncode == 1 and "status 400 ordered" in ran.stderr, ran.stderr
    server = serve(plugins={"p": stub.plugin(["m"])})
    wait_for(lambda: server.models() == ["m"], what="the plugin")
    batch = server.run([line for line in lines if "!status 400" in json.dumps(line)] + lines[-1:])
    told = run_host("batch", "--url", server.url, "get", batch.id)
    assert "failed: 3 status 400 ordered" in told.stdout, told.stdout
    listed = run_host("batch", "--url", server.url, "list").stdout
    assert batch.id in listed and "in.jsonl" in listed and time.strftime("%Y-%m-%dT", time.gmtime()) in listed


def test_files_can_be_listed_and_deleted_and_results_expire_by_a_setting(serve):
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
    assert listed.count("file-") == 2 and f"{batch.id}_output.jsonl" in listed and "expires 20" in listed
    gone = run_host("file", "--url", server.url, "delete", batch.output_file_id, "file-unknown")
    assert gone.returncode == 1 and f"deleted {batch.output_file_id}" in gone.stdout and "No file found" in gone.stderr
    plain = serve(name="plain")
    assert plain.client.files.retrieve(plain.run([chat("a")]).output_file_id).expires_at is None


def test_signals_reload_or_are_ignored(serve, stub, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("sk-0123456789-first-0123")
    server = serve(plugins={"p": stub.plugin(["m"], f'[credentials]\napi_key = "file:{secret}"\n')})
    wait_for(lambda: server.models() == ["m"], what="the plugin")
    for number in [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]:
        server.child.send_signal(number)
    wait_for(lambda: "SIGHUP" in server.logged() and server.logged().count("signal ignored") == 2, what="the log")
    assert server.models() == ["m"] and server.child.poll() is None
    # A secret in another folder is read again when it changes.
    loaded = server.logged().count("plugin loaded")
    secret.write_text("sk-0123456789-second-0123")
    wait_for(lambda: server.logged().count("plugin loaded") > loaded, what="the plugin to be loaded again")
    output, _ = server.results(server.run([chat("a", "!headers", model="m")]))
    assert "authorization" in output[0]["response"]["body"]["choices"][0]["message"]["content"]


def test_a_hangup_of_the_terminal_stops_a_run_as_an_interrupt_does(stub, tmp_path):
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGINS, plugins)
    (plugins / "p.toml").write_text(stub.plugin(["m"]))
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat(str(number), f"!delay 200 {number}", "m") for number in range(200)]))
    command = [HOST, "run", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plugins", plugins]
    command = [str(part) for part in [*command, "--max-concurrent-requests-per-batch", "20"]]
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: len(stub.counts()) >= 40, what="requests under way")
    child.stderr.close()
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=30) == 130
    again = run_host(*command[1:])
    assert again.returncode == 0, again.stderr
    assert set(stub.counts().values()) == {1}, "a request was sent twice"


def test_settings_that_cannot_be_meant_are_named_all_at_once(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        '[execution]\nmax_atempts = 3\n[server]\nclient_timeout = 5\nmax_connections = 0\nidle_timeout = "0s"\n'
        '[batch]\nmax_file_size = "big"\n'
    )
    told = run_host("serve", "--config", config, "--data", tmp_path / "data")
    assert told.returncode == 3
    for words in [
        "line 2: there is no setting `max_atempts`; did you mean `max_attempts`?",
        "line 4: client_timeout",
        "line 5: max_connections: `0` is not a whole number of at least 1",
        "line 6: idle_timeout: `0s` must be more than 0",
        "line 8: max_file_size",
    ]:
        assert words in told.stderr, told.stderr
    assert "usize" not in told.stderr and "nonzero" not in told.stderr.lower()
    for arguments, words in [
        (["--log-filter", "warning"], "did you mean `warn`?"),
        (["--client-timeout", "0s"], "--client-timeout: `0s` must be more than 0"),
        (["--max-atempts", "3"], "--max-attempts"),
        (["--max-attempts", "0", "--client-timeout", "5"], "at least 1\n"),
        (["--max-attempts", "0", "--client-timeout", "5"], "--client-timeout: `5` is not a dura"),
        (["--log-level", "info"], "--log-level is called --log-filter"),
    ]:
        told = run_host("serve", *arguments, "--data", tmp_path / "data")
        assert told.returncode in (2, 3) and words in told.stderr, told.stderr
    assert not (tmp_path / "data").exists()


def test_the_first_lines_of_a_log_say_what_runs_and_what_was_mistyped(serve):
    env = {"BATCHWRIGHT_LISTENN": "x", "BATCHWRIGHT_PORT": "tcp://10.0.0.1:80", "BATCHWRIGHT_SERVICE_HOST": "10.0.0.1"}
    server = serve("--log-format", "json", env=env)
    wait_for(lambda: "server started" in server.logged(), what="the line")
    lines = [json.loads(line) for line in server.logged().splitlines()]
    (started,) = [line["fields"] for line in lines if line["fields"]["message"] == "server started"]
    version = run_host("--version").stdout.split(maxsplit=1)[1].strip()
    assert started["version"] == version and "(" in version and started["loaded"] == "echo,standard"
    assert str(server.data) == started["data"] and started["address"] in server.url
    (warned,) = [line["fields"] for line in lines if line["level"] == "WARN"]
    assert warned["message"] == "unknown environment variable ignored"
    assert warned["variable"] == "BATCHWRIGHT_LISTENN" and warned["did_you_mean"] == "BATCHWRIGHT_LISTEN"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts are made by root")
@pytest.mark.parametrize("options", ["noexec", "ro"])
def test_plugins_compile_and_load_whatever_the_cache_is_mounted_on(serve, tmp_path, options):
    cache = tmp_path / "cache"
    cache.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", cache], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this system lets nothing be mounted")
    try:
        server = serve("--cache", cache)
        assert server.run([chat("a")]).request_counts.completed == 1
        if options == "ro":
            assert "compiled again at each start" in server.logged()
        server.stop()
    finally:
        subprocess.run(["umount", cache], check=True)


def test_a_cache_that_others_could_write_to_is_emptied_and_used(serve, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    planted = cache / f"{'a' * 64}-{'b' * 16}.cwasm"
    planted.write_text("planted")
    cache.chmod(0o2775)
    server = serve("--cache", cache)
    assert server.run([chat("a")]).request_counts.completed == 1
    assert mode(cache) & 0o777 == 0o700 and not planted.exists() and list(cache.glob("*.cwasm"))
    # A damaged entry is compiled again.
    server.stop()
    for entry in cache.glob("*.cwasm"):
        entry.write_bytes(b"damaged")
    server.start()
    assert server.run([chat("a")]).request_counts.completed == 1


def test_the_compiler_is_shut_in(serve):
    """What the process may do is read from the system while it compiles."""
    seen = {}
    server = serve(plugins={})
    stop = threading.Event()

    def look():
        while not stop.is_set():
            for task in pathlib.Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if b"compile-component" in (task / "cmdline").read_bytes():
                        status = (task / "status").read_text()
                        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
                        if fields.get("Seccomp") == "2":
                            seen["no_new_privs"] = fields["NoNewPrivs"]
                            seen["group"] = os.getpgid(int(task.name)) == int(task.name)
                            seen["limits"] = (task / "limits").read_text()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        # Large enough that compiling it takes a while.
        folder = built("examples")
        large = max(folder.rglob("*.wasm"), key=lambda path: path.stat().st_size) if folder.exists() else PLUGINS / "inference-openai.wasm"
        shutil.copy(large, server.plugins / "large.wasm")
        (server.plugins / "large.toml").write_text('component = "large.wasm"\n')
        wait_for(lambda: seen, 60, "the compiler in its sandbox")
    finally:
        stop.set()
        looking.join()
    assert seen["no_new_privs"] == "1" and seen["group"]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in seen["limits"].splitlines()[1:]}
    assert limits["Max core file size"] == ["0", "0"] and limits["Max open files"] == ["3", "3"]
    assert limits["Max data size"][0] == limits["Max data size"][1] != "unlimited"


def test_a_download_that_breaks_off_leaves_what_was_there(serve, tmp_path):
    server = serve()
    batch = server.run([chat(str(number), "x" * 2000) for number in range(2000)])
    target = tmp_path / "out.jsonl"
    download = ["batch", "download", batch.id, "--output", target, "--force"]
    assert run_host(*download, "--url", server.url).returncode == 0
    whole = target.read_bytes()
    listener = socket.create_server(("127.0.0.1", 0))

    def cut_short():
        """Passes everything on, but for the second half of a content."""
        while True:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    path = client.recv(65536).split()[1].decode()
                    upstream = http.client.HTTPConnection(server.url.removeprefix("http://"))
                    upstream.request("GET", path)
                    answer = upstream.getresponse()
                    body = answer.read()
                    head = f"HTTP/1.1 {answer.status} OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
                    client.sendall(head.encode() + (body[: len(body) // 2] if "/content" in path else body))

    threading.Thread(target=cut_short, daemon=True).start()
    broken = run_host(*download, "--url", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert broken.returncode == 1 and "was interrupted" in broken.stderr, broken.stderr
    assert target.read_bytes() == whole and [path.name for path in tmp_path.glob(".batch*")] == []
    # Only errors, and no place for them: the status says that something is missing.
    failed = server.run([chat("a", n=0)])
    alone = run_host("batch", "download", failed.id, "--output", tmp_path / "none.jsonl", "--url", server.url)
    assert alone.returncode == 1 and "--errors" in alone.stderr


def test_a_run_takes_odd_folders_and_refuses_what_it_cannot_read_twice(tmp_path):
    folder = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    folder.mkdir()
    (folder / "in.jsonl").write_bytes(jsonl([chat("a")]))
    config = tmp_path / "config.toml"
    config.write_text('[batch]\ncompletion_windows = ["1h", "24h"]\n')
    ran = subprocess.run(
        [HOST, "run", folder / "in.jsonl", "--output", folder / "out.jsonl", "--plugins", PLUGINS, "--config", config], capture_output=True
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("f")] == [folder.name]
    piped = subprocess.run(
        [HOST, "run", "/dev/stdin", "--output", tmp_path / "piped.jsonl", "--plugins", PLUGINS], input=jsonl([chat("a")]), capture_output=True
    )
    assert piped.returncode == 2 and b"save it to a file" in piped.stderr
    assert not list(tmp_path.glob("*.batchwright"))


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat(str(number)) for number in range(100)]))
    command = [HOST, "run", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plugins", PLUGINS, "--log-filter", "debug"]
    with open("/dev/full", "w") as full:
        ran = subprocess.run([str(part) for part in command], stderr=full, stdout=full, timeout=60)
    assert ran.returncode == 0 and (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 100


def test_output_that_is_lost_is_no_success(server):
    with open("/dev/full", "w") as full:
        told = subprocess.run([str(HOST), "file", "--url", server.url, "list", "--json"], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert told.returncode == 1 and b"could not be written" in told.stderr


def test_an_instance_that_only_grows_costs_no_line(serve):
    """Each answer is larger than the one before, and the limit is near: a used instance makes way for a new one."""
    server = serve()
    (server.plugins / "tight.toml").write_text('component = "inference-echo.wasm"\nmodels = ["tight"]\n[limits]\nmemory = "6MiB"\n')
    wait_for(lambda: "tight" in server.models(), what="the plugin")
    sizes = [1000, 100_000, 200_000, 300_000] * 10
    batch = server.run([chat(str(number), "x" * size, "tight") for number, size in enumerate(sizes)])
    assert batch.request_counts.completed == len(sizes), batch.request_counts


def test_what_a_guest_wrote_before_its_end_is_in_every_report(serve):
    server = serve()
    shutil.copy(built("hostile") / "wasi-0.2.wasm", server.plugins)
    text = 'component = "wasi-0.2.wasm"\nmodels = ["curious"]\n[settings]\nwhat = "%s"\n'
    (server.plugins / "curious.toml").write_text(text % "good")
    wait_for(lambda: "curious" in server.models(), 60, "the plugin")
    _, errors = server.results(server.run([chat("panic", model="curious")]))
    error = errors[0]["error"]
    # What a tenant sent may be in the words: they are the operator's.
    assert error["code"] == "plugin_failed" and "own words" not in error["message"]
    assert "it wrote:" in server.logged() and "the guest's own words" in server.logged()
    (server.plugins / "curious.toml").write_text(text % "panic")
    for arguments in [["check", server.plugins / "curious.toml"], ["list", "--plugins", server.plugins]]:
        told = run_host("plugin", *arguments)
        assert told.returncode == 1 and "the guest's own words" in told.stdout, told.stdout


def test_addresses_that_give_out_credentials_are_not_dialled_because_a_url_has_them(tmp_path):
    for file in ["inference-openai.wasm"]:
        shutil.copy(PLUGINS / file, tmp_path)
    text = 'component = "inference-openai.wasm"\nmodels = ["m"]\n{}[settings]\nbase_url = "http://169.254.169.254/v1"\n'
    (tmp_path / "p.toml").write_text(text.format(""))
    refused = run_host("plugin", "check", tmp_path / "p.toml")
    assert refused.returncode == 1 and "169.254.169.254" in refused.stdout and "allow" in refused.stdout
    (tmp_path / "p.toml").write_text(text.format('allow = ["169.254.169.254:80"]\n'))
    assert run_host("plugin", "check", tmp_path / "p.toml").returncode == 0
