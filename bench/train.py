"""How long the training of a scorer takes, and how much memory: 50,000 steps at d = 2560.

The states are random with a weak planted signal. Early stopping is off, so all 20 epochs run.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from step_sglang.training.fit import Recipe
from step_sglang.training.metrics import RUNNING_MEAN
from step_sglang.training.store import Writer
from step_sglang.training.stored import Steps, StoredQuestion, StoredTrace, StoreMeta
from step_sglang.training.train import train_scorer


def make_store(folder: Path, steps: int, width: int, n: int, per_trace: int) -> None:
    """Write about ``steps`` steps, half of the traces correct."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    zeros = np.zeros(per_trace, np.float32)
    positions = np.arange(9, 10 * per_trace, 10, dtype=np.int32)
    direction = torch.randn(width, generator=generator) / width**0.5
    with Writer(folder, StoreMeta("random", width, n, "bench")) as writer:
        for number in range(steps // (n * per_trace)):
            correct = rng.random(n) < 0.5
            hidden = torch.randn(n, per_trace, width, generator=generator)
            hidden += torch.from_numpy(correct)[:, None, None] * direction * 2
            traces = [
                StoredTrace(
                    f"q{number}", i, "", "1", "1" if right else "2", bool(right), 10 * per_trace,
                    "stop", 0, 0, Steps(positions, zeros, zeros), 0.0, 0.0,
                )
                for i, right in enumerate(correct)
            ]  # fmt: skip
            writer.add(StoredQuestion(tuple(traces), hidden.flatten(0, 1)))


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    """Train once per objective and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-mb", type=int, default=128)
    parser.add_argument("--objective", nargs="+", default=["bce", "pairwise"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        make_store(store, options.steps, options.width, 32, 25)
        size = sum(file.stat().st_size for file in store.rglob("*")) >> 20
        before = peak_mb()
        print(f"{options.steps} steps of width {options.width}: {size} MB on disk")
        for objective in options.objective:
            recipe = Recipe(objective, patience=20, memory_mb=options.memory_mb)
            started, cpu = time.monotonic(), time.process_time()
            trained = train_scorer(store, Path(folder) / objective, recipe)
            within = trained.test.ranking[RUNNING_MEAN][1.0].auc_within.value
            print(
                f"{objective}: fit {trained.fitted.seconds:.0f} s for "
                f"{len(trained.fitted.history)} epochs, all {time.monotonic() - started:.0f} s "
                f"({time.process_time() - cpu:.0f} s of CPU time), "
                f"peak memory {peak_mb()} MB ({before} before), within-question AUC {within:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
