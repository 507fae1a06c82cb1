"""What pruning costs the scheduler of a real CPU server, under heavy pruning.

Groups come in a pool that holds a part of them, so that most decode steps prune. A timer is put
around the hook that prunes, from outside (the product has none), and around SGLang's two functions
that it calls for its victims. Prints, over all steps in which something was pruned: victims, time
per victim, and how often the batch was filtered and answers were sent. `--against FOLDER` runs the
package of another checkout beside this one, taking turns; its op must be built.

    python bench/pruning_cost.py --traces 256 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.models import build_model, build_scorer  # noqa: E402
from tests.server.launch import Server, serve  # noqa: E402

PROMPT = list(range(40, 72))
# Runs in every process of the server, before anything else.
TIMER = """
import importlib.abc, json, os, sys, time

MODULE = "step_sglang.patches.pruning"


def watch(module):
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    counts = {}

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        setattr(owner, name, call)

    counted(module, "_prune")
    counted(ScheduleBatch, "filter_batch")
    original = module.update_running_batch
    sink = open(os.environ["PRUNING_TIMES"], "a", buffering=1)
    streamers = set()

    def update_running_batch(scheduler, batch):
        kind = type(scheduler.output_streamer)
        if kind not in streamers:
            streamers.add(kind)
            counted(kind, "stream_output")
        counts.clear()
        started = time.perf_counter()
        original(scheduler, batch)
        seconds = time.perf_counter() - started
        if counts.get("_prune"):
            line = {"rows": batch.batch_size(), "seconds": seconds, **counts}
            sink.write(json.dumps(line) + "\\n")

    module.update_running_batch = update_running_batch


class Watcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)))
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            watch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Watcher())
"""


def environment(folder: Path, name: str, checkout: Path) -> dict[str, str]:
    """Of a server that is timed: its times go to ``folder/name.jsonl``."""
    code = folder / name
    code.mkdir()
    (code / "sitecustomize.py").write_text(TIMER)
    return {
        "PYTHONPATH": os.pathsep.join((str(code), str(checkout))),
        "PRUNING_TIMES": str(folder / f"{name}.jsonl"),
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "0",
    }


def send_group(server: Server, traces: int, tokens: int) -> int:
    """One group; returns how many of its traces were pruned."""
    answers = server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": traces,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
        },
    )
    return sum(answer["meta_info"]["step"]["pruned"] for answer in answers)


def describe(name: str, lines: list[dict[str, float]]) -> str:
    """One row of the table."""
    victims = sum(line["_prune"] for line in lines)
    per_victim = [1e6 * line["seconds"] / line["_prune"] for line in lines]
    return (
        f"{name:10}{len(lines):8}{victims:9.0f}{victims / len(lines):11.2f}"
        f"{1e6 * sum(line['seconds'] for line in lines) / victims:16.0f}"
        f"{statistics.median(per_victim):9.0f}"
        f"{sum(line.get('filter_batch', 0) for line in lines) / victims:10.2f}"
        f"{sum(line.get('stream_output', 0) for line in lines) / victims:8.2f}"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100, help="per trace")
    parser.add_argument("--share", type=float, default=0.2, help="of the demand that the pool has")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout")
    args = parser.parse_args()

    checkouts = {"this": ROOT} | ({"other": args.against.absolute()} if args.against else {})
    pool = int(args.traces * args.tokens * args.share) + len(PROMPT)
    pruned = dict.fromkeys(checkouts, 0)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model, scorer = build_model(folder / "model"), build_scorer(folder / "scorer.safetensors")
        servers = {
            kind: stack.enter_context(
                serve(
                    model,
                    *("--enable-step", "--step-scorer", str(scorer)),
                    *("--max-total-tokens", str(pool)),
                    *("--max-running-requests", str(args.traces)),
                    log=folder / f"{kind}.log",
                    **environment(folder, kind, checkout),
                )
            )
            for kind, checkout in checkouts.items()
        }
        for _ in range(args.rounds):
            for kind, server in servers.items():
                pruned[kind] += send_group(server, args.traces, args.tokens)
        print(
            f"{args.rounds} groups of {args.traces} traces of {args.tokens} tokens, pool {pool}; "
            f"pruned {pruned}"
        )
        print(
            f"{'checkout':10}{'rounds':>8}{'victims':>9}{'per round':>11}{'us/victim mean':>16}"
            f"{'median':>9}{'filters':>10}{'streams':>8}"
        )
        for kind in checkouts:
            lines = (folder / f"{kind}.jsonl").read_text().splitlines()
            print(describe(kind, [json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
