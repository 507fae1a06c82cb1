"""The op's marginal cost where it runs: in a graph, behind work that has emptied the caches.

A graph of 50 times (copy of 256 MB, op) is replayed in turns with one of the copies alone; a
fiftieth of the difference is one call. Where there is no CUDA device the same calls are made one
by one, with a smaller copy, so that the script itself can be run anywhere.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], None]
COPIES = 50
COPY_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}


@dataclass(frozen=True)
class Cost:
    """Microseconds of one call: the median over the rounds, and its quartiles."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def marginal(works: Sequence[Work], device: str, rounds: int = 31) -> list[Cost]:
    """What each work adds to the copies, measured in alternating rounds.

    Args:
        works: enqueue on the current stream; on CUDA they are captured.
        device: "cuda" or "cpu".
        rounds: replays of each.
    """
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    copies = COPIES if device == "cuda" else 2
    runs = [_repeated([copy], copies, device)]
    runs += [_repeated([copy, work], copies, device) for work in works]
    times: list[list[float]] = [[] for _ in runs]
    for round_number in range(rounds + 2):
        for values, run in zip(times, runs, strict=True):
            elapsed = _microseconds(run, device)
            if round_number >= 2:  # the first ones warm up
                values.append(elapsed)
    base, *others = times
    return [_cost([(a - b) / copies for a, b in zip(v, base, strict=True)]) for v in others]


def _cost(values: list[float]) -> Cost:
    low, median, high = statistics.quantiles(values, n=4)
    return Cost(low, median, high)


def _repeated(works: Sequence[Work], times: int, device: str) -> Work:
    """A graph of these works, or a function that calls them where there are no graphs."""

    def run() -> None:
        for _ in range(times):
            for work in works:
                work()

    if device != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads kernels, which must not happen in a capture
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Work = graph.replay
    return replay


def _microseconds(run: Work, device: str) -> float:
    if device != "cuda":
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def nothing() -> None:
    """A work that adds nothing: its cost is what the method itself cannot resolve."""


if __name__ == "__main__":
    sys.exit("op_timing.py is a part of bench/op.py and bench/gpu_report.py: run one of those")
