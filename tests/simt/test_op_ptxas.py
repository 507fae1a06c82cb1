"""What the CUDA compiler makes of the kernel: every instantiation, no spills, two blocks per SM."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent.parent / "csrc"
REGISTERS_PER_SM = 65536
THREADS = 256


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_no_spills(arch: str, tmp_path: Path) -> None:
    command = ["nvcc", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17", "-O3"]
    command += ["-Xptxas=-v", f"-I{CSRC}", "-c", str(CSRC / "step_score.cu")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "op.o")], capture_output=True, text=True, check=True
    )
    kernels = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers, .*?(\d+) bytes smem",
        done.stderr,
    )
    assert len(kernels) == 6, done.stderr  # hidden fp32, bf16, fp16 x W1 fp32, bf16
    for stack, stores, loads, registers, shared in kernels:
        assert (stack, stores, loads) == ("0", "0", "0")
        assert int(registers) * THREADS * 2 <= REGISTERS_PER_SM
        assert int(shared) < 48 * 1024
