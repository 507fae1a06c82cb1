"""setup.py's choices: CPU, CUDA, or a clear error. Nothing is compiled here."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ASK = """
import setuptools, sys
setuptools.setup = lambda **k: print("LIBRARIES", [e.name for e in k["ext_modules"]])
sys.argv = ["setup.py"]
import shutil; which = shutil.which
shutil.which = lambda name, *a, **k: None if name == "nvcc" else which(name, *a, **k)
from pathlib import Path
is_file = Path.is_file
Path.is_file = lambda self: {toolkit} if self.parts[-2:] == ("bin", "nvcc") else is_file(self)
code = compile(open("setup.py").read(), "setup.py", "exec")
exec(code, {{"__file__": "setup.py", "__name__": "__main__"}})
"""


def ask(toolkit: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STEP_", "CUDA_"))}
    return subprocess.run(
        [sys.executable, "-c", ASK.format(toolkit=toolkit)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, **env},
        check=False,
    )


def test_no_toolkit_builds_for_the_cpu_and_says_so() -> None:
    done = ask("False")
    assert done.returncode == 0, done.stderr
    assert "step_cpu" in done.stdout
    assert "step_cuda" not in done.stdout
    assert done.stderr.strip().splitlines() == [
        "step-sglang: no CUDA toolkit found, building the CPU op only"
    ]


def test_cuda_required_without_a_toolkit() -> None:
    done = ask("False", STEP_CUDA="1")
    assert done.returncode != 0
    assert "STEP_CUDA=1" in done.stderr
    assert "CUDA_HOME" in done.stderr
    assert "Traceback" not in done.stderr


def test_cuda_refused() -> None:
    done = ask("True", STEP_CUDA="0")
    assert "step_cuda" not in done.stdout
    assert done.stderr == ""


def test_toolkit_with_headers_and_runtime_is_used(tmp_path: Path) -> None:
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    done = ask("is_file(self)", STEP_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "step_cuda" in done.stdout, done.stderr


def test_nvcc_without_headers_is_no_toolkit(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    inside = f"is_file(self) and str(self).startswith({str(tmp_path)!r})"
    done = ask(inside, STEP_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0


def test_setting_that_means_nothing() -> None:
    done = ask("False", STEP_CUDA="yes")
    assert done.returncode != 0
    assert "STEP_CUDA must be 0, 1 or unset, found 'yes'" in done.stderr
