"""Plants failures in the processes of a real server, from outside: amendments that raise."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.server.amended import amend

VARIABLE = "STEP_TEST_FAULTS"


@dataclass(frozen=True)
class Fault:
    """``module.function`` raises at every ``every``-th call of a process, or of one rank's.

    ``after``: when it has done its work, and not before.
    """

    module: str
    function: str
    every: int
    rank: int | None = None
    after: bool = False


def plant(folder: Path, *faults: Fault) -> dict[str, str]:
    """The environment of a server with these faults."""
    modules = dict.fromkeys(fault.module for fault in faults)
    amended = amend(folder, *((module, f"{__name__}:make_fail") for module in modules))
    return {**amended, VARIABLE: json.dumps([asdict(fault) for fault in faults])}


def make_fail(module: ModuleType) -> None:
    """In the server's processes: plant the faults of a module."""
    for fields in json.loads(os.environ[VARIABLE]):
        fault = Fault(**fields)
        if fault.module == module.__name__:
            _make_fail(module, fault)


def _make_fail(module: ModuleType, fault: Fault) -> None:
    path, _, name = fault.function.rpartition(".")
    owner = getattr(module, path) if path else module
    original = getattr(owner, name)
    calls = itertools.count(1)

    def planted(*args: Any, **kwargs: Any) -> Any:
        failing = _is_here(fault.rank) and next(calls) % fault.every == 0
        result = original(*args, **kwargs) if fault.after or not failing else None
        if failing:
            raise RuntimeError(f"planted in {fault.function}")
        return result

    setattr(owner, name, planted)


def _is_here(rank: int | None) -> bool:
    if rank is None:
        return True
    import torch

    return torch.distributed.get_rank() == rank
