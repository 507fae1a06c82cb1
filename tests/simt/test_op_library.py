"""The CUDA library as it was built, read with the disassemblers that Triton's wheel brings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from step_sglang.scoring import build, op

LIBRARY = Path(op.__file__).parent / "libstep_cuda.so"
KERNELS = 6  # hidden fp32, bf16, fp16 x W1 fp32, bf16


def tools() -> Path | None:
    spec = find_spec("triton")
    folder = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else None
    return folder if folder and (folder / "nvdisasm").is_file() else None


pytestmark = [
    pytest.mark.skipif(not LIBRARY.is_file(), reason="the CUDA library is not built"),
    pytest.mark.skipif(tools() is None, reason="needs cuobjdump and nvdisasm"),
]


def run(tool: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    folder = tools()
    assert folder is not None
    command = [str(folder / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


@dataclass(frozen=True)
class Kernel:
    """One instantiation: its instructions in order, and where its labels are."""

    arch: str
    name: str
    code: list[str]
    labels: dict[str, int]

    def loops(self) -> Iterator[list[str]]:
        """The bodies between a label and a branch back to it."""
        for at, instruction in enumerate(self.code):
            target = re.search(r"\bBRA\b.*\((\.L_\w+)\)", instruction)
            if target and self.labels.get(target[1], at) < at:
                yield self.code[self.labels[target[1]] : at]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    folder = tmp_path_factory.mktemp("cubins")
    run("cuobjdump", "-xelf", "all", LIBRARY, cwd=folder)
    found = []
    for cubin in sorted(folder.iterdir()):
        arch = re.search(r"sm_(\d+)", cubin.name)
        assert arch is not None
        for part in re.split(r"^\s*\.section\s+", run("nvdisasm", cubin), flags=re.MULTILINE):
            if not part.startswith(".text."):
                continue
            code: list[str] = []
            labels: dict[str, int] = {}
            for line in part.splitlines():
                if label := re.match(r"\s*(\.L_\w+):", line):
                    labels[label[1]] = len(code)
                elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                    code.append(instruction[1])
            found.append(Kernel(arch[1], part.split(",", 1)[0], code, labels))
    return found


def test_architectures(kernels: list[Kernel]) -> None:
    """Machine code for every major version since Ampere; PTX that torch's oldest driver reads."""
    archs = re.findall(r"sm_(\d+)\.cubin", run("cuobjdump", "-lelf", LIBRARY))
    assert archs == list(build.DEFAULT_ARCHS)
    assert len(kernels) == KERNELS * len(archs)
    listed = re.findall(r"sm_(\d+)\.ptx", run("cuobjdump", "-lptx", LIBRARY))
    assert listed in ([], [archs[-1]])
    if listed:
        version = re.search(r"^\.version (\d+)\.(\d+)", run("cuobjdump", "-ptx", LIBRARY), re.M)
        cuda = build.torch_cuda()
        assert version is not None and cuda is not None
        # PTX 9.0 came with CUDA 13.0, 8.8 with 12.9, and so on, one minor version each.
        assert (int(version[1]) + 4, int(version[2])) <= cuda


def test_nothing_on_the_stack(kernels: list[Kernel]) -> None:
    usage = run("cuobjdump", "--dump-resource-usage", LIBRARY)
    sizes = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(sizes) == len(kernels)
    for registers, stack, shared, local in sizes:
        assert (stack, local) == ("0", "0")
        assert int(registers) <= 255 and int(shared) < 48 * 1024
    for kernel in kernels:
        spilled = [i for i in kernel.code if re.search(r"\b(LDL|STL)\b", i)]
        assert not spilled, (kernel.arch, kernel.name, spilled)


def test_wide_loads_in_the_loops(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        products = [loop for loop in kernel.loops() if sum("FFMA" in i for i in loop) >= 32]
        wide = [loop for loop in products if sum("LDG.E.128" in i for i in loop) >= 4]
        assert len(wide) >= 4, (kernel.arch, kernel.name)  # tiles of 8 or 4, 4, 2 and 1 rows
        assert len(wide) == len(products)


def test_the_count_stands_between_fences(kernels: list[Kernel]) -> None:
    """A fence after the barrier, then the count, then a fence before the shares are read."""
    for kernel in kernels:
        order = [
            "atomic" if "ATOM" in i else "fence"
            for i in kernel.code
            if re.search(r"\bMEMBAR\.(SC|ALL)\.GPU\b|\bATOMG?\b", i)
        ]
        assert order == ["fence", "atomic", "fence"], (kernel.arch, kernel.name, order)
        count = next(n for n, i in enumerate(kernel.code) if re.search(r"\bATOMG?\b", i))
        barriers = [n for n, i in enumerate(kernel.code) if re.search(r"\bBAR\.SYNC", i)]
        assert any(n < count for n in barriers) and any(n > count for n in barriers)
