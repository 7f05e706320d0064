"""Code and plugin file of the README, run exactly as printed."""

import re
import subprocess
import sys

from conftest import PLUGINS, ROOT, run_host

README = (ROOT / "README.md").read_text()


def test_readme_sdk_tour_runs(server, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.strip().splitlines()) <= 20
    code = code.replace("http://127.0.0.1:8080", server.url)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "completed BatchRequestCounts(completed=2, failed=0, total=2) None"
    )
    assert "Name a colour." in done.stdout
    # The same file without a server.
    done = run_host(
        "run", "prompts.jsonl", "-o", "answers.jsonl", "--plugins", PLUGINS, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_readme_plugin_file_loads(server, tmp_path, monkeypatch):
    (text,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    file = server.plugins / "mine.toml"
    file.write_text(text)
    checked = run_host("plugin", "check", file, env={"MY_PROVIDER_KEY": "sk-0123456789"})
    assert checked.returncode == 0, checked.stdout
