"""Tokens a second of a CPU server: this package's attention, and SGLang's own request by request.

Both servers stand side by side and take turns, so that whatever else the machine does hits them
alike. Prints tokens per second, and per second of CPU time of the scheduler, which other work
disturbs less.

    python bench/cpu_attention.py --traces 64 --tokens 200
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from step_sglang.reasoner import model_path, scorer_path  # noqa: E402
from tests.server.amended import amend  # noqa: E402
from tests.server.launch import COLD, Server, serve  # noqa: E402

PROMPT = list(range(20, 60))


def keep_sglangs_own(module: ModuleType) -> None:
    """For ``step_sglang.patches.platform``: attention stays as SGLang brings it."""
    module.StepCpuPlatform.init_backend = lambda self: None


def cpu_seconds(server: Server) -> float:
    """Seconds that the scheduler has computed."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    times = [p.cpu_times() for p in children if "scheduler" in " ".join(p.cmdline())]
    assert len(times) == 1
    return float(times[0].user + times[0].system)


def send(server: Server, traces: int, tokens: int) -> tuple[float, float]:
    """Tokens a second, and a CPU second, of one group that fits."""
    params = {"n": traces, "max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    began, computed = time.monotonic(), cpu_seconds(server)
    answers = server.generate(
        input_ids=PROMPT, sampling_params={**params, "custom_params": {"step": True}}
    )
    made = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    assert made == traces * tokens, "some were pruned"
    return made / (time.monotonic() - began), made / (cpu_seconds(server) - computed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ[COLD] = "1"  # the warm parent of the tests has this package's attention
    flags = (
        *("--enable-step", "--step-scorer", str(scorer_path())),
        *("--max-total-tokens", str(args.traces * (args.tokens + 40) + 1000)),
        *("--max-running-requests", str(args.traces)),
    )
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        where = f"{Path(__file__).stem}:{keep_sglangs_own.__name__}"
        environments = {
            "request by request": amend(
                folder, ("step_sglang.patches.platform", where), paths=(Path(__file__).parent,)
            ),
            "the batch at once": {},
        }
        servers = {
            kind: stack.enter_context(
                serve(model_path(), *flags, log=folder / f"{len(env)}.log", **env)
            )
            for kind, env in environments.items()
        }
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in servers}
        for number in range(args.rounds + 1):
            for kind, server in servers.items():
                measured = send(server, args.traces, args.tokens)
                if number:  # the first warms up
                    found[kind].append(measured)
        print(f"{args.traces} traces of {args.tokens} tokens, medians of {args.rounds} rounds")
        print(f"{'attention':20}{'tokens/s':>10}{'tokens per CPU s':>18}")
        for kind, rounds in found.items():
            each = [statistics.median(values) for values in zip(*rounds, strict=True)]
            print(f"{kind:20}{each[0]:10.0f}{each[1]:18.0f}")


if __name__ == "__main__":
    main()
