"""setup.py's choices: CPU, CUDA, which toolkit and architectures, or a clear error.

Compilers are scripts that answer as nvcc does; nothing is compiled here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from step_sglang.scoring import build
from step_sglang.scoring.build import BuildError, Toolkit
from tests.toolkits import ARCHS_13, make_toolkit

ROOT = Path(__file__).parent.parent.parent
ASK = """
import setuptools, sys
setuptools.setup = lambda **k: print("LIBRARIES", [e.name for e in k["ext_modules"]])
sys.argv = ["setup.py"]
import pathlib
{amend}
code = compile(open("setup.py").read(), "setup.py", "exec")
exec(code, {{"__file__": "setup.py", "__name__": "__main__"}})
"""
# No toolkit of this machine: only what the environment names counts.
NOWHERE = """
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda self: (
    is_file(self) and (self.name != "nvcc" or "pytest-" in str(self))
)
"""
ARCHS_12_4 = "50 60 70 75 80 86 87 89 90"


def ask(**env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STEP_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "-c", ASK.format(amend=NOWHERE)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, **env},
        check=False,
    )


def toolkit(home: Path, version: str = "13.0", archs: str = ARCHS_13) -> Toolkit:
    found = build.read_toolkit(make_toolkit(home, version, archs))
    assert found is not None
    return found


def test_no_toolkit_builds_for_the_cpu_and_says_so() -> None:
    done = ask()
    assert done.returncode == 0, done.stderr
    assert "step_cpu" in done.stdout
    assert "step_cuda" not in done.stdout
    assert done.stderr.strip().splitlines() == [
        "step-sglang: no CUDA toolkit found, building the CPU op only; a GPU server builds the "
        "CUDA op at its first start"
    ]


def test_cuda_required_without_a_toolkit() -> None:
    done = ask(STEP_CUDA="1")
    assert done.returncode != 0
    assert "STEP_CUDA=1" in done.stderr
    assert "CUDA_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_cuda_refused() -> None:
    done = ask(STEP_CUDA="0")
    assert "step_cuda" not in done.stdout
    assert done.stderr == ""


def test_toolkit_with_headers_and_runtime_is_used(tmp_path: Path) -> None:
    done = ask(STEP_CUDA="1", CUDA_HOME=str(make_toolkit(tmp_path)))
    assert "step_cuda" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "missing", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"]
)
def test_a_part_of_a_toolkit_is_none(tmp_path: Path, missing: str) -> None:
    (make_toolkit(tmp_path) / missing).unlink()
    assert build.read_toolkit(tmp_path) is None
    assert ask(STEP_CUDA="1", CUDA_HOME=str(tmp_path)).returncode != 0


def test_a_compiler_that_does_not_run_is_none(tmp_path: Path) -> None:
    (make_toolkit(tmp_path) / "bin/nvcc").write_text("#!/bin/sh\nexit 1\n")
    assert build.read_toolkit(tmp_path) is None


def test_setting_that_means_nothing() -> None:
    done = ask(STEP_CUDA="yes")
    assert done.returncode != 0
    assert "STEP_CUDA must be 0, 1 or unset, found 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("torch", "versions", "chosen"),
    [
        ((13, 0), ("12.4", "13.0", "13.5"), "13.0"),
        ((13, 0), ("13.5", "13.0"), "13.0"),  # its PTX is what every driver of torch reads
        ((13, 0), ("12.4", "13.5"), "13.5"),
        ((13, 0), ("12.4",), "12.4"),
        ((12, 8), ("13.0", "12.4", "12.9"), "12.4"),
        ((12, 8), ("13.0", "12.9"), "12.9"),
        ((12, 8), ("13.0",), None),  # needs a later driver than torch does
    ],
)
def test_the_toolkit_of_torchs_major_version_is_preferred(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: tuple[int, int],
    versions: tuple[str, ...],
    chosen: str | None,
) -> None:
    homes = [make_toolkit(tmp_path / version, version) for version in versions]
    monkeypatch.setattr(build, "_homes", lambda: homes)
    monkeypatch.setattr(build, "torch_cuda", lambda: torch)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = build.find_toolkit()
    assert (None if found is None else found.home.name) == chosen


def test_the_toolkit_that_sglang_brings_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    homes = build._homes()
    assert any(home.parts[-2:] == ("nvidia", "cu13") for home in homes), homes


def test_torchs_own_cuda_version() -> None:
    import torch

    found = build.torch_cuda()
    assert torch.version.cuda == (None if found is None else ".".join(map(str, found)))


def test_only_architectures_that_the_compiler_has(tmp_path: Path) -> None:
    """An nvcc before 12.8 rejects compute_100, and the whole installation with it."""
    assert build.choose_archs(toolkit(tmp_path / "new")) == ("80", "90", "100", "120")
    old = toolkit(tmp_path / "old", "12.4", ARCHS_12_4)
    assert build.choose_archs(old) == ("80", "90")
    assert build.choose_archs(old, "8.6; 90") == ("86", "90")
    with pytest.raises(BuildError, match=r"nvcc \(12\.4\) does not compile for 100; it has 50"):
        build.choose_archs(old, "90;100")
    with pytest.raises(BuildError, match="must look like"):
        build.choose_archs(old, "sm_90")


def test_ptx_only_where_the_driver_of_torchs_cuda_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "torch_cuda", lambda: (13, 0))
    same = build.gencode_flags(toolkit(tmp_path / "13.0"), ("80", "120"))
    assert same[-1] == "-gencode=arch=compute_120,code=compute_120"
    newer = build.gencode_flags(toolkit(tmp_path / "13.5", "13.5"), ("80", "120"))
    assert newer == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
    ]
