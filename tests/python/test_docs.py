"""Attacks the documentation: every shell block of a document runs, or says why it does not."""

import os
import re
import subprocess

import pytest
from conftest import ROOT

DOCUMENTS = [
    path
    for pattern in ["*.md", "docs/**/*.md"]
    for path in sorted(ROOT.glob(pattern))
    # Its text is the output of commands.
    if path.name != "cli.md"
]
# A marker comment, if there is one, and a block of shell commands.
BLOCK = re.compile(r"(?:<!-- not run: ([^>]+) -->\n+)?^ *```(?:sh|bash)\n(.*?)^ *```$", re.M | re.S)


def blocks():
    """Shell blocks without a reason not to run, each with its document and line."""
    for path in DOCUMENTS:
        text = path.read_text()
        for block in BLOCK.finditer(text):
            if block[1] is None:
                line = text.count("\n", 0, block.start(2))
                name = f"{path.relative_to(ROOT)}:{line}"
                yield pytest.param(block[2], id=name)


@pytest.mark.parametrize("commands", list(blocks()))
def test_shell_block_of_a_document_runs(commands, tmp_path, stub):
    (tmp_path / "dist").symlink_to(ROOT / "dist")
    environment = {
        **os.environ,
        "PATH": f"{ROOT / 'dist'}:{os.environ['PATH']}",
        "PROVIDER_URL": stub.url,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"


def test_every_kind_of_document_is_read():
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert {"README.md", "docs/start/quickstart.md", "docs/operating/running.md"} <= names
