"""The table of hooked targets explains itself."""

from __future__ import annotations

from dataclasses import replace

from step_sglang.patches.contract import HOOKED, Finding


def test_every_hook_says_why_it_is_there_and_what_would_end_it() -> None:
    assert [target.path for target in HOOKED if not (target.why and target.until)] == []
    for target in HOOKED:
        lines = Finding(target).explained().splitlines()
        assert lines[0].startswith("ok ") and target.path in lines[0]
        assert [line.split(":")[0].strip() for line in lines[1:]] == ["why", "until"]


def test_a_target_without_a_reason_is_one_line() -> None:
    called = replace(HOOKED[0], why="", until="")
    assert Finding(called).explained() == str(Finding(called))
