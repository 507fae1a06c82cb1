"""A scheduler process whose hooks do not load must end, not serve without pruning."""

from __future__ import annotations

import multiprocessing
import sys
from types import ModuleType

import pytest

from step_sglang import protocol


def load_without_the_op() -> None:
    """What a scheduler process does first, on a machine where the op does not load."""
    sys.modules["step_sglang.scoring.op"] = None  # type: ignore[assignment]
    sys.modules["sglang.srt.managers.scheduler"] = ModuleType(
        "stand-in: only its name is looked at"
    )
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.mark.parametrize("asked", [True, False])
def test_a_scheduler_without_the_op_ends(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "step_cpu")
    monkeypatch.setenv("SGLANG_PLUGINS", "step")
    if asked:
        monkeypatch.setenv(protocol.HOOKS_ENV, "1")
    else:
        monkeypatch.delenv(protocol.HOOKS_ENV, raising=False)
    child = multiprocessing.get_context("spawn").Process(target=load_without_the_op)
    child.start()
    child.join(timeout=120)
    assert child.exitcode == (1 if asked else 0)
