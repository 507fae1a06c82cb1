"""Many groups on one real CPU server, against stock SGLang: step time, waiting, ordinary traffic.

Two servers, stock and with STEP, stand side by side and take turns within one run, so that
whatever else the machine does hits them alike. Three measurements:

- step: milliseconds per decode step of all traces together, in a pool that holds them; with a
  small model this is mostly the scheduler;
- waiting: seconds that traces spend in the queue, in a pool that holds a part of them;
- ordinary: latency of single requests that arrive at fixed times among groups, in the same pool.

    python bench/groups.py --groups 16 --traces 64
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.models import build_model, build_scorer  # noqa: E402
from tests.server.launch import Server, serve  # noqa: E402

PROMPT = list(range(40, 72))


def send_group(server: Server, number: int, traces: int, tokens: int) -> list[float]:
    """One group; returns the seconds that each trace waited."""
    answers = server.generate(
        input_ids=[*PROMPT, 40 + number],
        sampling_params={
            "n": traces,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
        },
    )
    return [answer["meta_info"]["queue_time"] for answer in answers]


def send_groups(server: Server, args: argparse.Namespace, tokens: int) -> tuple[float, list[float]]:
    """All groups at once; returns the seconds until the last ended, and the waiting times."""
    with ThreadPoolExecutor(args.groups) as threads:
        started = time.perf_counter()
        futures = [
            threads.submit(send_group, server, i, args.traces, tokens) for i in range(args.groups)
        ]
        waits = [wait for future in futures for wait in future.result()]
        return time.perf_counter() - started, waits


def send_ordinary(server: Server, number: int, tokens: int) -> float:
    """One request, sampled alone; returns its latency in seconds."""
    started = time.perf_counter()
    server.generate(
        input_ids=[60 + number % 100, *PROMPT],
        sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    )
    return time.perf_counter() - started


def mixed_load(server: Server, args: argparse.Namespace) -> list[float]:
    """Groups one after the other, and ordinary requests at fixed times; their latencies."""
    with ThreadPoolExecutor(args.groups + args.ordinary) as threads:
        futures = []
        for i in range(args.ordinary):
            if i % 4 == 0:
                threads.submit(send_group, server, i, args.traces, args.tokens)
            futures.append(threads.submit(send_ordinary, server, i, 40))
            time.sleep(args.interval)
        return [future.result() for future in futures]


def summary(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max": ordered[-1],
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--traces", type=int, default=64, help="per group")
    parser.add_argument("--tokens", type=int, default=60, help="per trace")
    parser.add_argument("--share", type=float, default=0.25, help="of the demand that the pool has")
    parser.add_argument("--ordinary", type=int, default=40, help="ordinary requests per round")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    demand = args.groups * (args.traces * args.tokens + len(PROMPT) + 1)
    results: dict[str, Any] = {"machine": platform.processor(), **vars(args)}
    results["json"] = str(args.json)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model, scorer = build_model(root / "model"), build_scorer(root / "scorer.safetensors")
        step = ("--enable-step", "--step-scorer", str(scorer))
        kinds = {"stock": (), "step": step}
        for phase, pool in (("step", 2 * demand), ("full", int(demand * args.share))):
            with ExitStack() as stack:
                servers = {
                    kind: stack.enter_context(
                        serve(
                            model,
                            *flags,
                            *("--max-total-tokens", str(pool), "--enable-metrics"),
                            *("--max-running-requests", str(args.groups * args.traces)),
                            log=root / f"{phase}-{kind}.log",
                            SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY="0",
                        )
                    )
                    for kind, flags in kinds.items()
                }
                for kind, server in servers.items():  # warm up
                    send_group(server, 0, 4, 4)
                    results.setdefault(kind, {"step_ms": [], "waits": [], "ordinary": []})
                for _ in range(args.rounds):
                    for kind, server in servers.items():
                        seconds, waits = send_groups(server, args, args.tokens)
                        if phase == "step":
                            results[kind]["step_ms"].append(seconds / args.tokens * 1e3)
                            continue
                        results[kind]["waits"] += waits
                        results[kind]["ordinary"] += mixed_load(server, args)

    print(f"{args.groups} groups of {args.traces} traces, {args.tokens} tokens each")
    print(f"{'':8}{'ms/step':>10}{'waiting s (p50 p99 max)':>30}{'ordinary s (p50 p99 max)':>30}")
    for kind in kinds:
        step_ms = statistics.median(results[kind]["step_ms"])
        columns = [
            " ".join(f"{value:8.3f}" for value in summary(results[kind][name]).values())
            for name in ("waits", "ordinary")
        ]
        print(f"{kind:8}{step_ms:10.2f}{columns[0]:>30}{columns[1]:>30}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
