"""Plugin directory: loading, errors, and swapping a provider by editing or adding a file.

Attacks: broken files and components, duplicate models, other tenants, swaps during a batch.
"""

import hashlib
import json
import shutil
import time
import urllib.request

import pytest
from conftest import COMPONENTS, PLUGINS, ROOT, Stub, built, chat, run_host, wait_for


def answer(server, model="m"):
    """Returns the answer of the plugin that serves a model."""
    output, errors = server.results(server.run([chat("a", "hello", model=model)]))
    assert errors == [], errors
    return output[0]["response"]["body"]["choices"][0]["message"]["content"]


def test_provider_is_swapped_by_editing_or_adding_a_file(serve, tmp_path):
    one, two = Stub(tmp_path, "one"), Stub(tmp_path, "two")
    try:
        server = serve(plugins={"p": one.plugin(["m"])})
        assert answer(server) == "one: hello"
        # An edited file.
        server.add_plugin("p", two.plugin(["m"]))
        wait_for(lambda: answer(server) == "two: hello", what="the edited plugin")
        # An added file, with another component under another name.
        shutil.copy(PLUGINS / "inference-openai.wasm", server.plugins / "dropped.wasm")
        server.add_plugin("q", one.plugin(["new"]).replace("inference-openai.wasm", "dropped.wasm"))
        wait_for(lambda: "new" in server.models(), what="the added plugin")
        assert answer(server, "new") == "one: hello"
        # A removed file.
        (server.plugins / "q.toml").unlink()
        wait_for(lambda: "new" not in server.models(), what="the plugin to be removed")
        assert server.run([chat("a", model="new")]).errors.data[0].code == "model_not_found"
    finally:
        one.kill(), two.kill()


def test_plugin_file_with_a_typo_leaves_the_old_plugin_serving(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    server.add_plugin("p", stub.plugin(["m"]) + "[limtis]\n")
    wait_for(
        lambda: "previous version still serving" in server.logged(), what="the error in the log"
    )
    assert "limtis" in server.logged()
    assert answer(server) == "stub: hello"
    server.add_plugin("p", stub.plugin(["other"]))
    wait_for(lambda: "other" in server.models(), what="the fixed plugin")


BROKEN = {
    "typo": ('component = "inference-echo.wasm"\nmodles = ["a"]\n', ["line 2", "modles", "models"]),
    "no-component": ('component = "nothing.wasm"\nmodels = ["a"]\n', ["component", "nothing.wasm"]),
    "core-module": (
        'component = "core.wasm"\nmodels = ["a"]\n',
        ["core WebAssembly module", "wasm-tools component new"],
    ),
    "cut-short": ('component = "cut.wasm"\nmodels = ["a"]\n', ["cut.wasm", "not a component"]),
    "text": (
        'component = "text.wasm"\nmodels = ["a"]\n',
        ["text.wasm", "no WebAssembly component"],
    ),
    "empty": (
        'component = "empty.wasm"\nmodels = ["a"]\n',
        ["exports nothing", "world `validator` or `adapter`"],
    ),
    "credential": (
        'component = "inference-openai.wasm"\nmodels = ["a"]\n'
        '[credentials]\napi_key = "env:NO_SUCH_KEY"\n',
        ["credentials.api_key", "NO_SUCH_KEY", "export"],
    ),
    "inline-secret": (
        'component = "inference-openai.wasm"\nmodels = ["a"]\n'
        '[credentials]\napi_key = "sk-inline"\n',
        ["credentials.api_key", "env:NAME"],
    ),
    "setting": (
        'component = "inference-openai.wasm"\nmodels = ["a"]\n[settings]\nbase-url = "http://x"\n',
        ["settings", "base-url", "base_url"],
    ),
    "bad-url": (
        'component = "inference-openai.wasm"\nmodels = ["a"]\n[settings]\nbase_url = "x"\n',
        ["settings.base_url"],
    ),
    "no-models": ('component = "inference-echo.wasm"\n', ["models"]),
    "validator-models": (
        'component = "validator-standard.wasm"\nmodels = ["a"]\n',
        ["models", "validator"],
    ),
    "pin": (
        f'component = "inference-echo.wasm"\nmodels = ["a"]\nsha256 = "{"0" * 64}"\n',
        ["sha256", "0000"],
    ),
    "zz-taken": ('component = "inference-echo.wasm"\nmodels = ["echo"]\n', ["echo", "already"]),
}


@pytest.fixture
def broken(tmp_path):
    folder = tmp_path / "plugins"
    folder.mkdir()
    for file in [*COMPONENTS, "standard.toml", "echo.toml"]:
        shutil.copy(PLUGINS / file, folder / file)
    (folder / "core.wasm").write_bytes(b"\0asm\1\0\0\0")
    (folder / "empty.wasm").write_bytes(b"\0asm\x0d\0\1\0")
    (folder / "cut.wasm").write_bytes((PLUGINS / "inference-echo.wasm").read_bytes()[:5000])
    (folder / "text.wasm").write_text("hello")
    for name, (text, _) in BROKEN.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def test_broken_plugins_are_reported_and_others_load(broken, serve, tmp_path):
    listed = run_host("plugin", "list", "--plugins", broken)
    assert listed.returncode == 1, listed.stderr
    messages = listed.stdout.split("\nfailed: ")[1:]
    assert len(messages) == len(BROKEN)
    for name, (_, parts) in BROKEN.items():
        assert any(all(part in message for part in parts) for message in messages), (name, messages)
    assert "sk-inline" not in listed.stdout
    assert "loaded" in next(line for line in listed.stdout.splitlines() if line.startswith("echo "))

    checked = run_host("plugin", "check", broken)
    assert checked.returncode == 1
    assert (
        checked.stdout.count("\nfailed  ") + checked.stdout.startswith("failed  ")
        >= len(BROKEN) - 1
    )

    (tmp_path / "server").mkdir()
    shutil.copytree(broken, tmp_path / "server/plugins")
    server = serve()
    assert server.models() == ["echo"]
    with urllib.request.urlopen(server.url + "/health/ready") as ready:
        assert json.load(ready)["plugins"]["failed"] == len(BROKEN)
    assert server.run([chat("a")]).status == "completed"


def test_new_plugin_takes_no_model_away_and_removed_plugin_may_return(serve, stub):
    server = serve("--retry-backoff", "200ms", plugins={"p": stub.plugin(["m"])})
    # The name `a` sorts before `p`, and `p` keeps the model.
    server.add_plugin("a", stub.plugin(["m", "n"]))
    wait_for(
        lambda: "is served by the plugin `p` already" in server.logged(),
        what="the error in the log",
    )
    assert server.models() == ["m"]
    assert answer(server) == "stub: hello"
    # A plugin removed for a moment fails no request.
    batch = server.create([chat(str(number), "!delay 5", model="m") for number in range(2000)])
    wait_for(
        lambda: server.client.batches.retrieve(batch.id).request_counts.completed > 50,
        what="some progress",
    )
    (server.plugins / "a.toml").unlink()
    (server.plugins / "p.toml").unlink()
    wait_for(lambda: server.models() == [], what="the plugin to be removed")
    server.add_plugin("p", stub.plugin(["m"]))
    assert server.ended(batch.id).request_counts.completed == 2000


def test_contract_patch_version_loads_and_minor_version_does_not(tmp_path):
    component = (PLUGINS / "inference-echo.wasm").read_bytes()
    (tmp_path / "later.wasm").write_bytes(component.replace(b"@0.1.0", b"@0.1.7"))
    (tmp_path / "other.wasm").write_bytes(component.replace(b"@0.1.0", b"@0.2.0"))
    later = run_host("plugin", "check", tmp_path / "later.wasm")
    assert later.returncode == 0, later.stdout
    other = run_host("plugin", "check", tmp_path / "other.wasm")
    assert (
        other.returncode == 1
        and "inference@0.2.0" in other.stdout
        and "inference@0.1.0" in other.stdout
    )


def test_inspect_shows_kind_imports_and_contract():
    shown = run_host("plugin", "inspect", PLUGINS / "inference-openai.wasm").stdout
    rows = [line.split(maxsplit=1) for line in shown.splitlines()]
    for row in [
        ["kind", "adapter"],
        ["imports", "nothing"],
        ["contract", "batchwright:plugin@0.1.0"],
    ]:
        assert row in rows, shown
    assert any(
        "api_key (optional), sent as `authorization: Bearer …`" in line
        for line in shown.splitlines()
    )
    wrong = run_host("plugin", "inspect", "/nothing.wasm")
    assert wrong.returncode == 4 and "failed to read /nothing.wasm" in wrong.stderr


def test_missing_plugin_directory_is_reported(tmp_path):
    for command in [
        ["plugin", "list"],
        ["serve", "--listen", "127.0.0.1:0", "--data", tmp_path / "d"],
    ]:
        done = run_host(*command, "--plugins", tmp_path / "nothing")
        assert done.returncode == 4 and "nothing: No such file" in done.stderr, done.stderr
    assert not (tmp_path / "d").exists()


def test_plugin_of_another_tenant_is_invisible(serve, stub):
    theirs = stub.plugin(["theirs"]).replace("models", 'tenants = ["acme"]\nmodels', 1)
    server = serve(plugins={"p": theirs, "q": stub.plugin(["ours", "family-*"])})
    assert server.models() == ["ours"]
    assert server.client.models.retrieve("family-7b").owned_by == "q"
    assert server.run([chat("a", model="theirs")]).errors.data[0].code == "model_not_found"
    assert answer(server, "family-7b") == "stub: hello"


def test_fresh_instances_answer_requests(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"], '[limits]\nisolation = "per-call"\n')})
    batch = server.run([chat(str(number), model="m") for number in range(500)])
    assert batch.request_counts.completed == 500


def plugins(server):
    return {plugin["name"]: plugin for plugin in get(server, "/v1/plugins")["data"]}


def get(server, path):
    with urllib.request.urlopen(server.url + path) as answer:
        return json.load(answer)


def test_one_model_validator_is_disabled_until_enabled(serve, stub):
    server = serve(
        plugins={
            "p": stub.plugin(["m", "n"]),
            "one": 'component = "one-model.wasm"\nenabled = false\n',
        }
    )
    lines = [
        chat("a", model="m"),
        chat("b", model="n"),
        "",
        chat("d", model="m"),
        chat("e", model="n"),
    ]
    assert server.run(lines).status == "completed"
    assert plugins(server)["one"]["state"] == "disabled" and plugins(server)["one"]["error"] is None
    server.add_plugin("one", 'component = "one-model.wasm"\norder = 7\n')
    wait_for(lambda: plugins(server)["one"]["state"] == "loaded", what="the validator to be loaded")
    batch = server.run(lines)
    assert [(error.line, error.code, error.param) for error in batch.errors.data] == [
        (2, "mismatched_model", "body.model"),
        (5, "mismatched_model", "body.model"),
    ]
    assert "'n' is not that of the first request, 'm'" in batch.errors.data[0].message
    assert [
        plugin["name"] for plugin in get(server, f"/v1/batches/{batch.id}/plugins")["data"]
    ] == ["one", "standard"]
    # A validator limited to another endpoint does not apply.
    server.add_plugin("one", 'component = "one-model.wasm"\nendpoints = ["/v1/embeddings"]\n')
    wait_for(
        lambda: plugins(server)["one"]["endpoints"] == ["/v1/embeddings"], what="the changed plugin"
    )
    assert server.run(lines).status == "completed"
    # A validator limited to another tenant does not apply.
    server.add_plugin("one", 'component = "one-model.wasm"\ntenants = ["somebody-else"]\n')
    wait_for(lambda: "one" not in plugins(server), what="the changed plugin")
    assert server.run(lines).status == "completed"


def test_bad_plugin_file_keeps_the_old_plugin_and_shows_its_state(serve, stub):
    server = serve(plugins={"p": stub.plugin(["m"])})
    loaded = plugins(server)["p"]
    assert loaded["state"] == "loaded" and loaded["models"] == ["m"] and loaded["kind"] == "adapter"
    server.add_plugin("p", "component = 7")
    wait_for(lambda: plugins(server)["p"]["state"] == "outdated", what="the error in the log")
    outdated = plugins(server)["p"]
    # Only the operator sees path and cause, in the log.
    assert outdated["error"] == "The plugin's file does not load; the server's log says why."
    assert "p.toml" in server.logged() and "`component`" in server.logged()
    assert outdated["sha256"] == loaded["sha256"]
    assert server.run([chat("a", model="m")]).request_counts.completed == 1
    server.add_plugin("q", 'component = "missing.wasm"\nmodels = ["q"]')
    wait_for(lambda: "q" in plugins(server), what="the new plugin")
    assert plugins(server)["q"]["state"] == "failed" and "missing.wasm" in server.logged()
    # An unreadable file may belong to another tenant, so clients must not see it.
    server.add_plugin("r", "models = [")
    server.add_plugin(
        "s", 'component = "missing.wasm"\ntenants = ["somebody-else"]\nmodels = ["s"]'
    )
    wait_for(
        lambda: 'plugin="s"' in server.logged() and 'plugin="r"' in server.logged(),
        what="the errors in the log",
    )
    assert not {"r", "s"} & set(plugins(server))
    assert str(server.plugins) not in json.dumps(plugins(server))


def test_adapter_swapped_many_times_answers_every_request_once(serve, stub, long):
    server = serve(plugins={"p": stub.plugin(["m"], "[limits]\nmax_in_flight = 7\n")})
    component = server.plugins / "inference-openai.wasm"
    # A custom section changes the bytes and the digest, not the behavior.
    original = component.read_bytes()
    other = original + b"\x00\x05\x04note"
    number, all_swaps = (20_000, 50) if long else (6_000, 12)
    prompts = [f"!delay 15 {line}" for line in range(number)]
    batch = server.create(
        [chat(str(line), prompt, model="m") for line, prompt in enumerate(prompts)]
    )
    swaps = 0
    while swaps < all_swaps:
        swaps += 1
        new = component.with_suffix(".new")
        new.write_bytes(other if swaps % 2 else original)
        new.rename(component)
        wait_for(
            lambda: server.logged().count('plugin loaded plugin="p"') == swaps + 1,
            what=f"swap {swaps}",
        )
    assert server.client.batches.retrieve(batch.id).status == "in_progress", (
        "the batch ended too soon for this test"
    )
    ended = server.ended(batch.id)
    output, errors = server.results(ended)
    assert errors == [] and [line["custom_id"] for line in output] == [
        str(line) for line in range(number)
    ]
    for line, prompt in zip(output, prompts, strict=True):
        assert line["response"]["body"]["choices"][0]["message"]["content"] == f"stub: {prompt}"
    counts = stub.counts()
    assert len(counts) == number and set(counts.values()) == {1}
    served = get(server, f"/v1/batches/{batch.id}/plugins")["data"]
    digests = {hashlib.sha256(bytes_).hexdigest() for bytes_ in (original, other)}
    assert {plugin["sha256"] for plugin in served if plugin["name"] == "p"} == digests
    assert [plugin["name"] for plugin in served] == ["standard", "p", "p"]


def test_openai_adapter_passes_its_recorded_cases():
    cases = ROOT / "guest-inference-openai/cases"
    tested = run_host("plugin", "test", PLUGINS / "inference-openai.wasm", "--cases", cases)
    assert tested.returncode == 0 and " 0 failed" in tested.stdout, tested.stdout
    assert all(f"case {case.name}" in tested.stdout for case in cases.glob("*.json"))


def test_plugin_test_reports_bad_cases_and_loops(tmp_path):
    cases = tmp_path / "cases"
    cases.mkdir()
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    request = {"endpoint": "/v1/chat/completions", "model": "m", "body": body}
    (cases / "few.json").write_text(
        json.dumps({"request": request, "exchanges": [], "answer": {"status": 200}})
    )
    (cases / "other.json").write_text(
        json.dumps(
            {"request": request, "exchanges": [{"elapsed": True}], "answer": {"status": 200}}
        )
    )
    # The file of an operator, on a machine without the operator's secret.
    shutil.copy(PLUGINS / "inference-openai.wasm", tmp_path)
    (tmp_path / "p.toml").write_text(
        'component = "inference-openai.wasm"\nmodels = ["m"]\n'
        '[settings]\nbase_url = "https://api.example.com/v1"\n'
        '[credentials]\napi_key = "env:NOT_HERE"\n'
    )
    assert run_host("plugin", "check", tmp_path / "p.toml").returncode == 1
    tested = run_host("plugin", "test", tmp_path / "p.toml", "--cases", cases)
    assert tested.returncode == 1 and " 2 failed" in tested.stdout, tested.stdout
    assert (
        "case few.json: the case has too few exchanges: the adapter sends POST "
        "https://api.example.com/v1/chat/completions" in tested.stdout
    )
    assert "expected the adapter to wait" in tested.stdout and '"send"' in tested.stdout
    # A component that never returns is abandoned after a few calls.
    begun = time.monotonic()
    spinning = run_host(
        "plugin",
        "test",
        built("hostile") / "hostile.wasm",
        "--settings",
        '{"what":"spin"}',
        timeout=120,
    )
    assert spinning.returncode == 1 and "3 calls in a row ran out of time" in spinning.stdout, (
        spinning.stdout
    )
    print(f"abandoned after {time.monotonic() - begun:.1f} s")
