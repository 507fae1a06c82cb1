"""Builds the CPU op, without torch, into a program under AddressSanitizer and UBSan."""

from __future__ import annotations

import ast
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.simt.emulator import COMPILER, CSRC, HERE, built, run

FLAGS = [
    "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-fno-omit-frame-pointer", "-DSTEP_CPU",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip


def _setting(name: str) -> Any:
    """A constant of setup.py, which cannot be imported."""
    for node in ast.parse((CSRC.parent / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def build(edited: Mapping[str, str] | None = None) -> Path:
    """The driver's path; ``edited`` replaces the text of files in csrc."""
    isa = _setting("ISA_FLAGS") if platform.machine() == "x86_64" else {}
    wanted = [name for name in _setting("CPU_SOURCES") if name != "binding.cpp"]
    files = {p.name: p.read_text() for p in CSRC.iterdir() if p.suffix in (".h", ".inl", ".cpp")}
    files = {**files, **(edited or {}), "driver.cpp": (HERE / "driver.cpp").read_text()}
    text = repr(sorted(files.items())) + repr(isa) + repr(FLAGS)

    def make(work: Path) -> Path:
        for name, content in files.items():
            (work / name).write_text(content)

        def compiled(name: str) -> str:
            obj = work / f"{name}.o"
            run([COMPILER, *FLAGS, *isa.get(name, []), "-c", str(work / name), "-o", str(obj)])
            return str(obj)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*wanted, "driver.cpp"]))
        program = work / "driver"
        run([COMPILER, *FLAGS, *objects, "-o", str(program)])
        return program

    return built("cpu", text, make)
