"""The simulated table of shares and early ends: its scores, its labels, its refusals."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "shares.py"


@pytest.fixture(scope="module")
def shares() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shares", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shares"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def traces(count: int) -> list[list[object]]:
    return [[300 + 40 * i, 0 if i % 2 else 1 + i % 3, []] for i in range(count)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("auc", [0.6, 0.7, 0.9])
def test_right_traces_beat_wrong_ones_as_often_as_stated(shares: ModuleType, auc: float) -> None:
    options = argparse.Namespace(seed=1, auc=auc, growth=0.0, unit=64, n=200, max_new_tokens=40_000)
    wins = []
    for draw in range(20):
        group = shares.group(0, traces(200), draw, options)
        right = [t.score for t in group.traces if t.correct]
        wrong = [t.score for t in group.traces if not t.correct]
        wins += [one > other for one, other in product(right, wrong)]
    assert sum(wins) / len(wins) == pytest.approx(auc, abs=0.02)


def test_every_line_says_that_it_is_simulated(tmp_path: Path) -> None:
    file = tmp_path / "traces.json.gz"
    file.write_bytes(
        gzip.compress(json.dumps({"questions": [{"traces": traces(10)}] * 3}).encode())
    )
    sizes = ("-n", 8, "--unit", 16, "--pool", 2000, "--max-new-tokens", 1000, "--draws", 2)
    ran = run(file, *sizes)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == f"simulated: python {SCRIPT} {file} " + " ".join(map(str, sizes))
    figures = [line for line in lines if any(c.isdigit() for c in line)]
    assert all("simulated" in line for line in figures)
    rows = [line for line in lines if line.startswith("| simulated")]
    assert len(rows) == 2 + 3 * 4
    # SC prunes nothing; with less of the pool more is pruned.
    pruned = [float(row.split("|")[-2]) for row in rows]
    assert pruned[:2] == [0, 0] and pruned[4] < pruned[8] < pruned[12]
    assert run(file, *sizes[:2]).returncode == 0  # an ample pool


def test_what_cannot_be_simulated(tmp_path: Path) -> None:
    file = tmp_path / "traces.json.gz"
    file.write_bytes(b"no gzip")
    assert "cannot be read as traces" in run(file).stderr
    file.write_bytes(gzip.compress(b'{"questions": [{"traces": [[0, 1]]}]}'))
    assert "without length and answer" in run(file).stderr
    file.write_bytes(gzip.compress(b'{"questions": [{"traces": [[10, 1]]}]}'))
    assert "fewer than 64 traces" in run(file).stderr
    file.write_bytes(gzip.compress(b'{"questions": [{"traces": [[10, 1]]}]}'))
    assert "--auc is above 0.5" in run(file, "-n", 1, "--auc", 0.4).stderr
