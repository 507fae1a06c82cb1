"""The table of hooked targets explains itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from step_sglang import patches
from step_sglang.errors import ConfigError
from step_sglang.patches import adapters
from step_sglang.patches.adapters import Adapter
from step_sglang.patches.contract import (
    DIFFERENT,
    HOOKED,
    Either,
    Finding,
    Target,
    every_target,
    inspect_targets,
)
from step_sglang.patches.reader import MissingError

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
    known = [target.path + "." for target in every_target()]
    names = set(imported())
    assert len(names) > 10
    assert {n for n in names if not any(path.startswith(n + ".") for path in known)} == set()


def test_every_hook_says_why_it_is_there_and_what_would_end_it() -> None:
    forms = [form for adapter in rows() for form in adapter.either.forms]
    assert len(forms) >= 6
    for target in (*HOOKED, *forms):
        assert target.why and target.until, target.path
        lines = Finding(target).explained().splitlines()
        assert lines[0].startswith("ok ") and target.path in lines[0]
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["why", "until"]


def test_a_target_without_a_reason_is_one_line() -> None:
    called = replace(HOOKED[0], why="", until="")
    assert Finding(called).explained() == str(Finding(called))


def rows() -> list[Adapter]:
    return [value for value in vars(adapters).values() if isinstance(value, Adapter)]


def test_each_form_of_a_difference_has_its_hook() -> None:
    for adapter in rows():
        assert adapter.either in DIFFERENT
        assert set(adapter.hooks) == set(adapter.either.forms)
        for form, hook in adapter.hooks.items():
            assert hook.target is form and callable(hook.load())


class Having:
    """An SGLang that has these paths, without parameters."""

    def __init__(self, *paths: str) -> None:
        self.paths = paths

    def has(self, path: str) -> None:
        if path not in self.paths:
            raise MissingError("missing")


def test_the_newest_form_that_is_there_is_taken() -> None:
    either = Either("a place", (new := Target("a.new"), old := Target("a.old")))
    assert either.form(Having("a.old", "a.new")) is new
    assert either.form(Having("a.old")) is old
    assert either.form(Having("a.other")) is None
    (found,) = inspect_targets((), (either,), Having("a.other"))
    assert found.target is new and found.found == "missing"
    assert inspect_targets((), (either,), Having("a.old")) == [Finding(old)]


def test_no_form_is_a_clear_refusal() -> None:
    lost = Either("where it begins", (Target("sglang.version.first"), Target("sglang.version.x")))
    with pytest.raises(
        ConfigError, match=r"no sglang\.version\.first or sglang\.version\.x: where it"
    ):
        Adapter(lost, {}).chosen()
