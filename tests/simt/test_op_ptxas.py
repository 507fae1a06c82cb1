"""What each CUDA compiler of this machine makes of the kernel: every instantiation, no spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from step_sglang.scoring import build
from step_sglang.scoring.build import Toolkit

CSRC = Path(__file__).parent.parent.parent / "csrc"
REGISTERS_PER_SM = 65536
THREADS = 256


def toolkits() -> list[Toolkit]:
    """One of each version, such as the one that SGLang's dependencies bring."""
    found = [toolkit for home in build._homes() if (toolkit := build.read_toolkit(home))]
    return list({toolkit.version: toolkit for toolkit in found}.values())


@pytest.mark.slow
@pytest.mark.skipif(not toolkits(), reason="needs nvcc")
@pytest.mark.parametrize("arch", build.DEFAULT_ARCHS)
@pytest.mark.parametrize("toolkit", toolkits(), ids=lambda t: ".".join(map(str, t.version)))
def test_no_spills(toolkit: Toolkit, arch: str, tmp_path: Path) -> None:
    if arch not in toolkit.archs:
        pytest.skip("this nvcc does not know it")
    command = [str(toolkit.nvcc), f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17"]
    command += ["-O3", "-Xptxas=-v", f"-I{CSRC}", "-c", str(CSRC / "step_score.cu")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "op.o")], capture_output=True, text=True, check=True
    )
    kernels = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers, .*?(\d+) bytes smem",
        done.stderr,
    )
    assert len(kernels) == 6, done.stderr  # hidden fp32, bf16, fp16 x W1 fp32, bf16
    blocks = 1 if int(arch) >= 100 else 2  # as kMinBlocks
    for stack, stores, loads, registers, shared in kernels:
        assert (stack, stores, loads) == ("0", "0", "0")
        assert int(registers) * THREADS * blocks <= REGISTERS_PER_SM
        assert int(shared) < 48 * 1024
