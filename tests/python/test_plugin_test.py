"""`plugin test`: the examples pass it with their cases, and it finds what is wrong."""

import json
import shutil

import pytest
from conftest import ROOT, TARGET, built, run_host


@pytest.mark.parametrize(
    "component, folder, settings",
    [
        ("anthropic", "anthropic-rust", {}),
        ("polled", "polled-rust", {"base_url": "https://jobs.example.com"}),
        ("ollama", "ollama-javascript", {"base_url": "http://127.0.0.1:11434"}),
        ("policy-python", "policy-python", {"banned_words": ["project x"], "max_tokens": 4096}),
        ("policy-c", "policy-c", {}),
    ],
)
def test_examples_pass_plugin_test_and_their_cases(component, folder, settings, tmp_path):
    cases = ROOT / "examples" / folder / "cases"
    if component == "ollama":
        # Its README sets this timeout, because QuickJS interprets the code.
        shutil.copy(built("examples") / "ollama.wasm", tmp_path)
        text = (
            'component = "ollama.wasm"\nmodels = ["m"]\n'
            '[settings]\nbase_url = "http://127.0.0.1:11434"\n[limits]\ncall_timeout = "2s"\n'
        )
        (tmp_path / "ollama.toml").write_text(text)
        given = [tmp_path / "ollama.toml"]
    else:
        given = [built("examples") / f"{component}.wasm", "--settings", json.dumps(settings)]
    tested = run_host(
        "plugin",
        "test",
        *given,
        "--cases",
        cases,
        env={"XDG_CACHE_HOME": str(TARGET / "examples-cache")},
        timeout=120,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert (
        " 0 failed" in tested.stdout
        and "CPU time" in tested.stdout
        and "memory up to" in tested.stdout
    )
    for case in cases.glob("*.json"):
        assert f"ok      case {case.name}" in tested.stdout


def test_plugin_test_reports_a_failed_case(tmp_path):
    case = json.loads((ROOT / "examples/anthropic-rust/cases/answer.json").read_text())
    case["answer"]["body"]["choices"][0]["message"]["content"] = "London."
    (tmp_path / "wrong.json").write_text(json.dumps(case))
    (tmp_path / "broken.json").write_text("{}")
    tested = run_host("plugin", "test", built("examples") / "anthropic.wasm", "--cases", tmp_path)
    assert tested.returncode == 1
    assert (
        "failed  case wrong.json: answer.body.choices[0].message.content is "
        '"Paris.", expected "London."' in tested.stdout
    )
    assert "failed  case broken.json: is not a case" in tested.stdout


def test_plugin_test_detects_state_kept_between_requests():
    tested = run_host("plugin", "test", built("hostile") / "hostile.wasm")
    assert tested.returncode == 1 and "two instances differ" in tested.stdout
