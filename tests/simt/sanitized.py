"""Builds the CPU op, without torch, into a program under AddressSanitizer and UBSan."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from step_sglang.scoring.build import CPU_SOURCES, ISA_FLAGS
from tests.simt.emulator import COMPILER, CSRC, HERE, built, run

FLAGS = [
    "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-fno-omit-frame-pointer", "-DSTEP_CPU",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip


def build(edited: Mapping[str, str] | None = None) -> Path:
    """The driver's path; ``edited`` replaces the text of files in csrc."""
    isa = ISA_FLAGS if platform.machine() == "x86_64" else {}
    wanted = [name for name in CPU_SOURCES if name not in ("binding.cpp", "compat.cpp")]
    files = {p.name: p.read_text() for p in CSRC.iterdir() if p.suffix in (".h", ".inl", ".cpp")}
    files = {**files, **(edited or {}), "driver.cpp": (HERE / "driver.cpp").read_text()}
    text = repr(sorted(files.items())) + repr(isa) + repr(FLAGS)

    def make(work: Path) -> Path:
        for name, content in files.items():
            (work / name).write_text(content)

        def compiled(name: str) -> str:
            obj = work / f"{name}.o"
            run([COMPILER, *FLAGS, *isa.get(name, ()), "-c", str(work / name), "-o", str(obj)])
            return str(obj)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, [*wanted, "driver.cpp"]))
        program = work / "driver"
        run([COMPILER, *FLAGS, *objects, "-o", str(program)])
        return program

    return built("cpu", text, make)
