"""Guides that no longer match the code: excerpts, plugin files and JSON in docs/guides."""

import json
import re
import shutil
import tomllib

import pytest
from conftest import PLUGINS, ROOT, TARGET, run_host

GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))


def blocks(language):
    """Returns the code blocks of a language, as parameters of a test."""
    return [
        pytest.param(code, id=f"{guide.stem}-{number}")
        for guide in GUIDES
        for number, code in enumerate(
            re.findall(rf"```{language}\n(.*?)```", guide.read_text(), re.S)
        )
    ]


def test_guide_excerpts_are_parts_of_their_sources():
    excerpts = [
        (guide.name, *found)
        for guide in GUIDES
        for found in re.findall(
            r"<!-- excerpt of (\S+) -->\n```\w+\n(.*?)```", guide.read_text(), re.S
        )
    ]
    assert len(excerpts) >= 4
    for guide, source, code in excerpts:
        assert code in (ROOT / source).read_text(), f"{guide} differs from {source}"


@pytest.mark.parametrize("text", blocks("toml"))
def test_guide_plugin_file_loads(text, tmp_path):
    shutil.copy(PLUGINS / tomllib.loads(text)["component"], tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    environment = {
        "MY_PROVIDER_KEY": "sk-0123456789abcdef",
        "XDG_CACHE_HOME": str(TARGET / "examples-cache"),
    }
    checked = run_host("plugin", "check", tmp_path / "mine.toml", env=environment)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("text", blocks("json"))
def test_guide_case_has_the_members_of_a_case(text):
    case = json.loads(text)
    assert set(case) in ({"request", "exchanges", "answer"}, {"batch", "lines", "violations"})
