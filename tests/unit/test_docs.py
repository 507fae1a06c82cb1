"""What the pages name exists: commands, options, files, links, flags."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from step_sglang import protocol
from step_sglang.cli.main import app
from step_sglang.config import StepConfig

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TOP = ("bench", "csrc", "docs", "examples", "patches", "step_sglang", "tests")
IDS = [page.name for page in PAGES]


def commands(text: str) -> list[list[str]]:
    """Every call of the command in a block, and in backticks where it has options, as words."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(step-sglang [^`]*)`", text.replace("\n", " "))
    found = []
    for line in (line for line in lines if "step-sglang" in line):
        words = shlex.split(line.split("     #")[0])
        if "step-sglang" in words:
            found.append(words[words.index("step-sglang") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_and_option_exists(page: Path) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0].startswith("--"):
            continue
        assert words[0] in group.commands, words
        known = {name for param in group.commands[words[0]].params for name in param.opts}
        ours = words[: words.index("--")] if "--" in words else words
        given = {word for word in ours if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        assert given <= known, (words, given - known)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_file_and_link_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(rf"(?<![\w/.-])((?:{'|'.join(TOP)})/[\w./-]*\w)(?![\w*])", text):
        if page.name == "CHANGELOG.md" or (ROOT / "step_sglang" / path).exists():
            continue  # what was, too
        assert (ROOT / path).exists(), path


def test_the_reference_has_every_flag_and_every_member_of_a_request() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for option in fields(StepConfig):
        flag = option.metadata.get("flag", "--step-" + option.name.replace("_", "-"))
        assert f"`{flag}" in text, flag
    for member in (*protocol.REQUEST_MEMBERS, *protocol.VOTE_MEMBERS):
        assert f'"{member}"' in text or f"`{member}`" in text, member
