"""Environment of the host: file modes, signals, settings, logs, caches, the compiler sandbox.

Attacks: other local users, planted cache entries, control characters, full pipes, cut downloads.
"""

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
from conftest import CHAT, HOST, PLUGINS, built, chat, jsonl, run_host, wait_for


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


def test_control_characters_are_escaped_in_cli_output(tmp_path):
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat(evil, model=evil), chat(evil, model=evil)]))
    ran = run_host(
        "run", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--plugins", PLUGINS
    )
    assert ran.returncode == 1 and "model_not_found" in ran.stderr
    assert not [letter for letter in ran.stderr if letter in "\x1b\x07\x9b\u202e"], ran.stderr


def test_request_failures_are_summarized_by_code(serve, stub, tmp_path):
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGINS, plugins)
    (plugins / "p.toml").write_text(stub.plugin(["m"]))
    lines = [
        chat(str(number), f"!status {400 + number % 2 * 22} {number}", "m") for number in range(5)
    ] + [chat("good", model="m")]
    (tmp_path / "in.jsonl").write_bytes(jsonl(lines))
    ran = run_host(
        "run",
        tmp_path / "in.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--plugins",
        plugins,
        "--max-attempts",
        "1",
    )
    assert ran.returncode == 1 and "status 400 ordered" in ran.stderr, ran.stderr
    server = serve(plugins={"p": stub.plugin(["m"])})
    wait_for(lambda: server.models() == ["m"], what="the plugin")
    batch = server.run([line for line in lines if "!status 400" in json.dumps(line)] + lines[-1:])
    done = run_host("batch", "--url", server.url, "get", batch.id)
    assert "failed: 3 status 400 ordered" in done.stdout, done.stdout
    listed = run_host("batch", "--url", server.url, "list").stdout
    assert (
        batch.id in listed
        and "in.jsonl" in listed
        and time.strftime("%Y-%m-%dT", time.gmtime()) in listed
    )


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


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("options", ["noexec", "ro"])
def test_plugins_compile_on_noexec_and_read_only_caches(serve, tmp_path, options):
    cache = tmp_path / "cache"
    cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", cache], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("this system does not allow mounts")
    try:
        server = serve("--cache", cache)
        assert server.run([chat("a")]).request_counts.completed == 1
        if options == "ro":
            assert "compiled again at each start" in server.logged()
        server.stop()
    finally:
        subprocess.run(["umount", cache], check=True)


def test_plugin_cache_writable_by_others_is_emptied(serve, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    planted = cache / f"{'a' * 64}-{'b' * 16}.cwasm"
    planted.write_text("planted")
    cache.chmod(0o2775)
    server = serve("--cache", cache)
    assert server.run([chat("a")]).request_counts.completed == 1
    assert mode(cache) & 0o777 == 0o700 and not planted.exists() and list(cache.glob("*.cwasm"))
    # A damaged cache entry is replaced by a new compilation.
    server.stop()
    for entry in cache.glob("*.cwasm"):
        entry.write_bytes(b"damaged")
    server.start()
    assert server.run([chat("a")]).request_counts.completed == 1


def test_compiler_process_is_sandboxed(serve):
    """Reads the limits of the compiler process from /proc while it runs."""
    seen = {}
    server = serve(plugins={})
    stop = threading.Event()

    def watch_compilers():
        while not stop.is_set():
            for task in pathlib.Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if b"compile-component" in (task / "cmdline").read_bytes():
                        status = (task / "status").read_text()
                        fields = dict(
                            line.split(":\t", 1) for line in status.splitlines() if ":\t" in line
                        )
                        if fields.get("Seccomp") == "2":
                            seen["no_new_privs"] = fields["NoNewPrivs"]
                            seen["group"] = os.getpgid(int(task.name)) == int(task.name)
                            seen["limits"] = (task / "limits").read_text()

    watcher = threading.Thread(target=watch_compilers)
    watcher.start()
    try:
        # Large enough for the compilation to be observable.
        folder = built("examples")
        large = (
            max(folder.rglob("*.wasm"), key=lambda path: path.stat().st_size)
            if folder.exists()
            else PLUGINS / "inference-openai.wasm"
        )
        shutil.copy(large, server.plugins / "large.wasm")
        (server.plugins / "large.toml").write_text('component = "large.wasm"\n')
        wait_for(lambda: seen, 60, "the compiler in its sandbox")
    finally:
        stop.set()
        watcher.join()
    assert seen["no_new_privs"] == "1" and seen["group"]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in seen["limits"].splitlines()[1:]}
    assert limits["Max core file size"] == ["0", "0"] and limits["Max open files"] == ["3", "3"]
    assert limits["Max data size"][0] == limits["Max data size"][1] != "unlimited"


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


def test_log_write_errors_do_not_stop_a_run(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(jsonl([chat(str(number)) for number in range(100)]))
    command = [
        HOST,
        "run",
        tmp_path / "in.jsonl",
        "--output",
        tmp_path / "out.jsonl",
        "--plugins",
        PLUGINS,
        "--log-filter",
        "debug",
    ]
    with open("/dev/full", "w") as full:
        ran = subprocess.run([str(part) for part in command], stderr=full, stdout=full, timeout=60)
    assert ran.returncode == 0 and (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 100


def test_stdout_write_errors_exit_with_1(server):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [str(HOST), "file", "--url", server.url, "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 1 and b"could not be written" in done.stderr


def test_growing_instance_is_replaced_without_failed_lines(serve):
    """Grows an instance up to its memory limit; a new instance must replace it."""
    server = serve()
    (server.plugins / "tight.toml").write_text(
        'component = "inference-echo.wasm"\nmodels = ["tight"]\n[limits]\nmax_memory = "6MiB"\n'
    )
    wait_for(lambda: "tight" in server.models(), what="the plugin")
    sizes = [1000, 100_000, 200_000, 300_000] * 10
    batch = server.run(
        [chat(str(number), "x" * size, "tight") for number, size in enumerate(sizes)]
    )
    assert batch.request_counts.completed == len(sizes), batch.request_counts


def test_guest_stderr_is_in_every_operator_report(serve):
    server = serve()
    shutil.copy(built("hostile") / "wasi-0.2.wasm", server.plugins)
    text = 'component = "wasi-0.2.wasm"\nmodels = ["curious"]\n[settings]\nwhat = "%s"\n'
    (server.plugins / "curious.toml").write_text(text % "good")
    wait_for(lambda: "curious" in server.models(), 60, "the plugin")
    _, errors = server.results(server.run([chat("panic", model="curious")]))
    error = errors[0]["error"]
    # The text may contain data of a tenant, so only the operator sees it.
    assert error["code"] == "plugin_failed" and "own words" not in error["message"]
    assert "it wrote:" in server.logged() and "the guest's own words" in server.logged()
    (server.plugins / "curious.toml").write_text(text % "panic")
    for arguments in [
        ["check", server.plugins / "curious.toml"],
        ["list", "--plugins", server.plugins],
    ]:
        done = run_host("plugin", *arguments)
        assert done.returncode == 1 and "the guest's own words" in done.stdout, done.stdout


def test_metadata_addresses_need_an_allow_entry(tmp_path):
    for file in ["inference-openai.wasm"]:
        shutil.copy(PLUGINS / file, tmp_path)
    text = (
        'component = "inference-openai.wasm"\nmodels = ["m"]\n{}'
        '[settings]\nbase_url = "http://169.254.169.254/v1"\n'
    )
    (tmp_path / "p.toml").write_text(text.format(""))
    refused = run_host("plugin", "check", tmp_path / "p.toml")
    assert (
        refused.returncode == 1
        and "169.254.169.254" in refused.stdout
        and "allow" in refused.stdout
    )
    (tmp_path / "p.toml").write_text(text.format('allow = ["169.254.169.254:80"]\n'))
    assert run_host("plugin", "check", tmp_path / "p.toml").returncode == 0
