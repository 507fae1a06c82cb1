"""The table of hooked targets explains itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from step_sglang import patches
from step_sglang.patches.contract import HOOKED, USED, Finding

# The CPU platform stands beside STEP: it is chosen by SGLANG_PLATFORM, with or without it.
PLATFORM = ("platform.py", "cpu_attention.py", "cpu_speculation.py")


def imported() -> Iterator[str]:
    """Every name that the patches import from SGLang."""
    for path in Path(patches.__path__[0]).glob("*.py"):
        if path.name in PLATFORM:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_what_is_imported_from_sglang_is_in_the_table() -> None:
    known = [target.path + "." for target in (*HOOKED, *USED)]
    names = set(imported())
    assert len(names) > 10
    assert {n for n in names if not any(path.startswith(n + ".") for path in known)} == set()


def test_every_hook_says_why_it_is_there_and_what_would_end_it() -> None:
    assert [target.path for target in HOOKED if not (target.why and target.until)] == []
    for target in HOOKED:
        lines = Finding(target).explained().splitlines()
        assert lines[0].startswith("ok ") and target.path in lines[0]
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["why", "until"]


def test_a_target_without_a_reason_is_one_line() -> None:
    called = replace(HOOKED[0], why="", until="")
    assert Finding(called).explained() == str(Finding(called))
