"""Projects of `plugin new` in each language.

Each project builds with the commands of its own README, passes `plugin test`, and runs in a server.
"""

import json
import os
import re
import shutil
import subprocess

import pytest
from conftest import HOST, ROOT, TARGET, built, chat, run_host, wait_for

LANGUAGES = ["rust", "python", "js", "c"]
# Tools installed by the tests, instead of the tools that an author installs.
PATH = ":".join(
    [
        str(HOST.parent),
        str(TARGET / "cargo-tools/bin"),
        str(TARGET / "tools/bin"),
        os.environ["PATH"],
    ]
)


def environment():
    """Returns the environment of an author of plugins."""
    given = {
        key: value
        for key, value in os.environ.items()
        if key not in ("CARGO_TARGET_DIR", "RUSTFLAGS")
    }
    return {
        **given,
        "PATH": PATH,
        "XDG_CACHE_HOME": str(TARGET / "examples-cache"),
        "npm_config_audit": "false",
        "npm_config_fund": "false",
    }


def make(folder, kind, lang):
    """Creates a project and runs the commands of its README; returns its folder and name."""
    name = f"my-{lang}-{kind}"
    made = run_host("plugin", "new", name, "--kind", kind, "--lang", lang, "--to", folder)
    assert made.returncode == 0, made.stderr
    project = folder / name
    commands = re.search(r"```sh\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)[1]
    # `plugin new` shows the same commands.
    assert all(line in made.stdout for line in commands.splitlines())
    # Installs the tools of each language.
    built("examples")
    # Shared between tests and runs, so that nothing is compiled or downloaded twice.
    shared = TARGET / "templates" / lang
    shared.mkdir(parents=True, exist_ok=True)
    if lang == "rust":
        (project / "target").symlink_to(shared)
    if lang == "python":
        (project / ".venv").symlink_to(TARGET / "tools")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=project,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout and len(
        re.findall(r"^ok      case \S+$", done.stdout, re.M)
    ) == len(list((project / "cases").iterdir()))
    return project, name


@pytest.mark.parametrize(
    "lang, file, command, passed",
    [
        ("rust", "src/lib.rs", ["cargo", "test", "--quiet"], "1 passed"),
        ("js", "plugin.test.js", ["node", "--test"], "pass 1"),
    ],
)
def test_unit_test_of_the_guide_passes_in_a_new_project(tmp_path, lang, file, command, passed):
    guide = (ROOT / "docs/guides/write-a-plugin.md").read_text()
    (code,) = re.findall(rf"<!-- unit test: {file} -->\n```\w+\n(.*?)```", guide, re.S)
    made = run_host("plugin", "new", "mine", "--kind", "adapter", "--lang", lang, "--to", tmp_path)
    assert made.returncode == 0, made.stderr
    project = tmp_path / "mine"
    if lang == "rust":
        shared = TARGET / "templates" / lang
        shared.mkdir(parents=True, exist_ok=True)
        (project / "target").symlink_to(shared)
    with open(project / file, "a") as source:
        source.write(code)
    done = subprocess.run(
        command, cwd=project, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and passed in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("lang", LANGUAGES)
def test_new_adapter_project_serves(serve, stub, tmp_path, lang):
    project, name = make(tmp_path, "adapter", lang)
    server = serve(
        "--retry-backoff",
        "10ms",
        "--cache",
        TARGET / "examples-cache",
        env={"MY_PROVIDER_KEY": "sk-of-the-author-0123456789"},
    )
    shutil.copy(project / f"{name}.wasm", server.plugins)
    text = (
        (project / f"{name}.toml")
        .read_text()
        .replace("http://127.0.0.1:8000/v1", f"{stub.url}/v1")
        .replace("# [cred", "[cred")
        .replace("# api", "api")
    )
    (server.plugins / f"{name}.toml").write_text(
        text + '\n[aliases]\nother = "theirs"\n'
        if "[limits]" not in text
        else text.replace("[limits]", '[aliases]\nother = "theirs"\n\n[limits]')
    )
    wait_for(lambda: "my-model" in server.models(), 60, "the plugin")
    prompts = ["hello", 'ü€😀 "\\ \n', "!headers", "!status 400", "!html"]
    lines = [
        chat(f"{number}", prompt, model="my-model", seed=12345678901)
        for number, prompt in enumerate(prompts)
    ]
    lines.append(chat("other", "with another name", model="other"))
    lines.append(
        {
            **chat("busy", model="my-model"),
            "body": {"model": "my-model", "messages": [{"role": "robot", "content": "x"}]},
        }
    )
    batch = server.run(lines)
    assert batch.status == "completed", batch.errors
    output, errors = server.results(batch)
    ends = {line["custom_id"]: line for line in output + errors}
    says = lambda custom_id: ends[custom_id]["response"]["body"]["choices"][0]["message"]["content"]
    assert says("0") == "stub: hello" and says("1") == f"stub: {prompts[1]}"
    assert json.loads(says("2"))["authorization"] == "Bearer [redacted]"
    assert ends["3"]["response"]["status_code"] == 400 and "error" in ends["3"]["response"]["body"]
    assert ends["4"]["error"]["code"] == "invalid_provider_response"
    assert (
        says("other") == "stub: with another name"
        and ends["other"]["response"]["body"]["model"] == "theirs"
    )
    assert ends["busy"]["error"]["message"] == "Unknown message role: robot"
    assert batch.usage.input_tokens == 7 * 4 and batch.usage.output_tokens == 3 * 4


@pytest.mark.parametrize("lang", LANGUAGES)
def test_new_validator_project_rejects_lines(serve, tmp_path, lang, long):
    if lang == "python" and not long:
        pytest.skip(
            "a long mode: compiling takes a minute; test_examples has a validator in Python"
        )
    project, name = make(tmp_path, "validator", lang)
    server = serve("--cache", TARGET / "examples-cache")
    shutil.copy(project / f"{name}.wasm", server.plugins)
    (server.plugins / f"{name}.toml").write_text(
        (project / f"{name}.toml").read_text().replace("4096", "100")
    )
    wait_for(lambda: f'plugin loaded plugin="{name}"' in server.logged(), 60, "the plugin")
    batch = server.run(
        [
            chat("a", max_tokens=100),
            chat("b", max_tokens=101),
            chat("c", max_completion_tokens=1e6),
            "no json",
        ]
    )
    assert [(error.line, error.code, error.param) for error in batch.errors.data] == [
        (2, "too_many_tokens", "body.max_tokens"),
        (3, "too_many_tokens", "body.max_completion_tokens"),
        # Validators never see a line that is no JSON.
        (4, "invalid_json_line", None),
    ]
    assert batch.errors.data[0].message == "At most 100 tokens may be asked for."


def test_plugin_new_reports_mistakes_and_overwrites_nothing(tmp_path):
    new = ["plugin", "new", "--kind", "adapter", "--lang", "rust", "--to", tmp_path]
    for name in ["Upper", "a/b", "../a", "", "1a", "a" * 41]:
        refused = run_host(*new, name)
        assert refused.returncode != 0 and "lower-case letters" in refused.stderr, name
    assert list(tmp_path.iterdir()) == []
    assert run_host(*new, "mine").returncode == 0
    (tmp_path / "mine/src/lib.rs").write_text("my work")
    refused = run_host(*new, "mine")
    assert refused.returncode != 0 and "already exists" in refused.stderr
    assert (tmp_path / "mine/src/lib.rs").read_text() == "my work"
    assert "there is no folder" in run_host(*new[:-1], tmp_path / "nowhere", "other").stderr
