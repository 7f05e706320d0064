"""What commands print about failures and plugins.

Attacks: control characters in ids, summaries that a component forges, streams that cannot be
written.
"""

import json
import shutil
import subprocess
import time

from conftest import CONTAINED, HOST, PLUGINS, built, chat, jsonl, run_host, wait_for


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


def test_inspect_output_cannot_be_forged_by_a_component():
    shown = run_host("plugin", "inspect", built("hostile") / "liar.wasm")
    assert shown.returncode == 0, shown.stderr
    assert [
        line for line in shown.stdout.splitlines() if line.startswith("sha256")
    ] == shown.stdout.splitlines()[-1:]
    assert "\x1b" not in shown.stdout and "harmless imports nothing" in " ".join(
        shown.stdout.split()
    )
    CONTAINED.append(
        (
            "summary with forged lines",
            next(line for line in shown.stdout.splitlines() if "harmless" in line),
        )
    )


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
