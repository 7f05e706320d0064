"""The compiler process and the cache of compiled code.

Attacks: components that compile slowly or in much memory, an escape from the sandbox, planted and
damaged cache entries, caches that cannot be written.
"""

import contextlib
import os
import pathlib
import shutil
import stat
import subprocess
import threading

import pytest
from conftest import CONTAINED, PLUGINS, built, chat, plugin_states, run_host, wait_for
from containment import compilers_of

pytestmark = pytest.mark.quiet


def test_compiler_memory_is_limited(tmp_path):
    component = built("examples") / "policy-python.wasm"
    checked = run_host(
        "plugin", "check", component, "--cache", tmp_path / "cache", "--compile-memory", "64MiB"
    )
    assert (
        checked.returncode == 1
        and "more memory than 64MiB, the setting compile_memory" in checked.stdout
    )
    CONTAINED.append(("compiling takes much memory", checked.stdout.strip()))


def test_slow_compilation_delays_no_other_plugin(hostile, stub):
    server = hostile(arguments=["--compile-timeout", "8s"])
    shutil.copy(built("hostile") / "slow.wasm", server.plugins)
    server.add_plugin("slow", 'component = "slow.wasm"\nmodels = ["slow"]\n')
    # The slow component is in compilation when the other plugin is added.
    wait_for(lambda: compilers_of(server), what="the compiler")
    server.add_plugin("good", stub.plugin(["good"]))
    wait_for(lambda: "good" in server.models(), 6, "the good plugin")
    assert "slow" not in plugin_states(server), "the good plugin waited for the slow one"
    wait_for(
        lambda: plugin_states(server).get("slow", {}).get("state") == "failed",
        what="the error in the log",
    )
    # A change to another plugin does not start the compilation again.
    server.add_plugin("good", stub.plugin(["good", "better"]))
    wait_for(lambda: "better" in server.models(), 6, "the changed plugin")
    assert server.run([chat("a", model="better")]).request_counts.completed == 1


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


def test_plugin_cache_keeps_compiled_code_and_touches_no_other_file(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache/thesis.docx").write_text("years of work")
    os.utime(tmp_path / "cache/thesis.docx", (0, 0))
    for _ in range(2):
        checked = run_host(
            "plugin", "check", built("hostile") / "hostile.wasm", "--cache", "cache", cwd=tmp_path
        )
        assert checked.returncode == 0, checked.stdout
    kept = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert kept == [".cwasm", ".docx"]


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


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
