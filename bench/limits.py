"""How many groups should run at once? In the simulator, on traces drawn like a large model's.

Nothing here ran on a model or a GPU. Lengths follow the quantiles of Qwen3-8B on AIME-25, wrong
traces are longer, step scores are noisy; the figures that this comes to are printed first. A step
costs what 8 billion bf16 weights, and each token's keys and values, take to read at 3.35 TB/s, and
0.01 ms a trace. All tokens are divided by `--scale`. Prints, per limit and number of traces:
accuracy of the score-weighted vote, mean seconds until a question is answered, and until all are.

    python bench/limits.py --questions 8 --traces 64
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import Counter
from statistics import NormalDist

import numpy as np

from step_sglang.config import StepConfig
from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.replay import until
from step_sglang.evaluation.simulator import Request, Reserve, ScoreEvent, Simulator
from step_sglang.pruning.admission import GroupLimit
from step_sglang.pruning.groups import Group

SHARES = (0.0, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 1.0)
LENGTHS = (2500, 3100, 4800, 9000, 15700, 25000, 33600, 41300, 48000)  # tokens
STEP = 400  # tokens of a step
WEIGHTS_MS, KV_BYTES, BANDWIDTH = 4.9, 147_456, 3.35e12
NORMAL = NormalDist()


class Trace(Request):
    """A trace and its answer; 0 is right."""

    answer = 0


def draw_traces(chance: random.Random, traces: int, scale: int, group: Group) -> list[Trace]:
    """A question's traces: some questions are hard, then traces are longer and mostly wrong."""
    ease = chance.betavariate(0.75, 0.4)
    found = []
    for _ in range(traces):
        right = chance.random() < ease
        spread = 0.9 * chance.gauss(0, 1) + 0.5 * (0.67 - ease) * 2 + (-0.25 if right else 0.45)
        length = float(np.interp(NORMAL.cdf(spread), SHARES, LENGTHS))
        lean = chance.gauss(0.3 if right else -0.3, 0.65)  # of all of a trace's scores
        steps = [
            ScoreEvent(max(1, position // scale), 1 / (1 + 2.718 ** -chance.gauss(lean, 1.2)))
            for position in range(STEP, int(length), STEP)
        ]
        trace = Trace(0, 0, max(2, int(length) // scale), group, steps=steps)
        trace.answer = 0 if right else 1 if chance.random() < 0.6 else chance.randint(2, 99)
        found.append(trace)
    return found


def vote(traces: list[Trace]) -> float:
    """Whether the traces that finished vote for the right answer."""
    weights: Counter[int] = Counter()
    for trace in traces:
        if trace.fate == "finished":
            weights[trace.answer] += trace.score_sum / trace.num_steps if trace.num_steps else 0.5
    return float(bool(weights) and weights.most_common(1)[0][0] == 0)


def burst(
    seed: int, options: argparse.Namespace, traces: int, limit: GroupLimit | None
) -> tuple[list[float], list[float], float, float]:
    """All questions at once: right, seconds of each, seconds of all, groups at once."""
    chance = random.Random(seed)
    groups = [Group(f"q{i}", samples=traces) for i in range(options.questions)]
    asked = [draw_traces(chance, traces, options.scale, group) for group in groups]
    requests = [trace for question in asked for trace in question]
    simulator = Simulator(
        options.pool // options.scale,
        1,
        StepConfig("simulated"),
        reserve=Reserve(40_000 // options.scale),
        limit=limit,
    )
    simulator.run(list(requests), max_steps=10**7)
    cost = CostModel(
        options.scale * WEIGHTS_MS / 1e3,
        options.scale * 1e-5,
        options.scale**2 * KV_BYTES / BANDWIDTH,
        0.0,
    )

    def seconds(steps: int) -> float:
        return cost.seconds(until(simulator.history, steps))

    latencies = [seconds(max(t.ended for t in question)) for question in asked]
    began = [
        seconds(min(t.started for t in question if t.started is not None)) for question in asked
    ]
    busy = sum(latency - start for latency, start in zip(latencies, began, strict=True))
    return list(map(vote, asked)), latencies, max(latencies), busy / max(latencies)


def describe(options: argparse.Namespace) -> str:
    """What the drawn traces are like."""
    chance = random.Random(0)
    questions = [draw_traces(chance, 64, options.scale, Group(f"q{i}")) for i in range(40)]
    traces = [trace for question in questions for trace in question]
    for trace in traces:
        trace.fate, trace.num_steps = "finished", len(trace.steps or ())
        trace.score_sum = sum(step.score for step in trace.steps or ())

    def auc(value: str) -> float:
        found = []
        for question in questions:
            good = [t for t in question if t.answer == 0]
            bad = [t for t in question if t.answer != 0]
            key = (lambda t: -t.length) if value == "length" else _mean_score
            found += [float(key(g) > key(b)) for g in good[:16] for b in bad[:16]]
        return statistics.mean(found)

    return (
        f"single trace right {statistics.mean(t.answer == 0 for t in traces):.2f}, weighted vote "
        f"of 64 {statistics.mean(map(vote, questions)):.2f}, mean length "
        f"{options.scale * statistics.mean(t.length for t in traces):.0f}, AUC within a question: "
        f"length {auc('length'):.2f}, score {auc('score'):.2f}"
    )


def _mean_score(trace: Trace) -> float:
    return trace.score_sum / max(1, trace.num_steps)


def main() -> None:
    """Run the simulations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=8, help="at once")
    parser.add_argument("--traces", type=int, nargs="+", default=[64])
    parser.add_argument("--pool", type=int, default=360_000, help="KV tokens")
    parser.add_argument("--scale", type=int, default=80)
    parser.add_argument("--bursts", type=int, default=12)
    parser.add_argument("--limits", nargs="+", default=["off", "4", "2", "1"])
    parser.add_argument("--keep", type=int, nargs="+", default=[2, 4, 8, 16], help="of auto")
    options = parser.parse_args()

    print(f"simulated: {' '.join(sys.argv)}")
    print(describe(options))
    limits: dict[str, GroupLimit | None] = {
        name: None if name == "off" else GroupLimit(int(name)) for name in options.limits
    }
    limits |= {f"auto, keep {keep}": GroupLimit(keep=keep) for keep in options.keep}
    print(f"{'limit':>14}{'traces':>8}{'right':>8}{'s mean':>9}{'s all':>8}{'at once':>9}")
    for traces in options.traces:
        for name, limit in limits.items():
            found = [burst(seed, options, traces, limit) for seed in range(options.bursts)]
            right = [value for values, _, _, _ in found for value in values]
            seconds = [value for _, values, _, _ in found for value in values]
            print(
                f"{name:>14}{traces:8}{statistics.mean(right):8.3f}{statistics.mean(seconds):9.0f}"
                f"{statistics.mean(total for _, _, total, _ in found):8.0f}"
                f"{statistics.mean(once for _, _, _, once in found):9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
