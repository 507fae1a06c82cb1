"""Amends modules in the processes of a real server, from outside: the product has no hook for it.

A ``sitecustomize`` module on PYTHONPATH calls a test's function with each module it names, when
that has been imported; in a warm server (:mod:`tests.server.warm`) some are imported before.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import importlib, importlib.abc, sys

AMENDMENTS = %r


def amend(module, functions):
    for function in functions:
        where, _, what = function.partition(":")
        getattr(importlib.import_module(where), what)(module)


class Amender(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in AMENDMENTS:
            return None
        functions = AMENDMENTS.pop(name)
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)))
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            amend(module, functions)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Amender())
for name in AMENDMENTS.keys() & sys.modules.keys():
    amend(sys.modules[name], AMENDMENTS.pop(name))
"""


def amend(
    folder: Path,
    *amendments: tuple[str, str],
    paths: tuple[Path, ...] = (),
    unpinned: bool = False,
) -> dict[str, str]:
    """The environment of a server in which ("module", "tests.module:function") are applied.

    ``paths``: where to look for modules beside those of the tests.
    ``unpinned``: pinned memory is ordinary memory in it, where there is no device to pin it for.
    """
    by_module: dict[str, list[str]] = {}
    for module, function in amendments:
        by_module.setdefault(module, []).append(function)
    program = PROGRAM % by_module
    if unpinned:
        other = Path(__file__).parent / "unpinned" / "sitecustomize.py"
        program += f"\nexec(open({str(other)!r}).read())\n"
    (folder / "sitecustomize.py").write_text(program)
    found = filter(None, (folder, ROOT, *paths, os.environ.get("PYTHONPATH")))
    return {"PYTHONPATH": os.pathsep.join(map(str, found))}
