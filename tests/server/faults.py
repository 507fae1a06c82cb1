"""Plants failures in the processes of a real server, from outside: the product has no hook for it.

A ``sitecustomize`` module on PYTHONPATH wraps functions when their module is imported.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

PROGRAM = """
import importlib.abc, itertools, json, sys

FAULTS = {}
for fault in json.loads(%r):
    FAULTS.setdefault(fault["module"], []).append(fault)


def plant(module, fault):
    owner, _, name = fault["function"].rpartition(".")
    owner = getattr(module, owner) if owner else module
    original = getattr(owner, name)
    calls = itertools.count(1)

    def planted(*args, **kwargs):
        failing = here(fault["rank"]) and next(calls) %% fault["every"] == 0
        result = original(*args, **kwargs) if fault["after"] or not failing else None
        if failing:
            raise RuntimeError("planted in " + fault["function"])
        return result

    setattr(owner, name, planted)


def here(rank):
    if rank is None:
        return True
    import torch
    return torch.distributed.get_rank() == rank


class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in FAULTS:
            return None
        faults = FAULTS.pop(name)
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)))
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            for fault in faults:
                plant(module, fault)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Planter())
"""


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
    text = json.dumps([asdict(fault) for fault in faults])
    (folder / "sitecustomize.py").write_text(PROGRAM % text)
    paths = filter(None, (str(folder), os.environ.get("PYTHONPATH")))
    return {"PYTHONPATH": os.pathsep.join(paths)}
