"""The wheel holds all it needs: build it, install it away from the checkout, use it there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_wheel_installs_and_works_elsewhere(tmp_path: Path) -> None:
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    env = {**os.environ, "STEP_CUDA": "0"}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels)]
    subprocess.run([*build, str(source)], check=True, env=env, capture_output=True)
    (wheel,) = wheels.iterdir()
    assert "-py3-none-" in wheel.name
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(home)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    # -S leaves out the environment's own installation of the package, and its other packages.
    site = (
        f"import sys; sys.path += {[str(home), *(p for p in sys.path if 'site-packages' in p)]}\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", site + USE, str(home)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "USED" in done.stdout, done.stderr
