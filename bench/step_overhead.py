"""Decode-step time of a real CPU server: STEP off, on but unused, and on with every trace scored.

The servers stand side by side and take turns within one run, in both orders, so that whatever
else the machine does hits them alike. Prints medians and ratios, of the time and of the CPU
time of all processes of the server, which other work disturbs less; and JSON with --json.

    python bench/step_overhead.py --hidden 1024 --layers 4 --batch 16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.models import build_scorer, build_tokenizer  # noqa: E402
from tests.server.launch import CUDA_PLATFORM, ON_CUDA, Server, serve  # noqa: E402

PROMPT = list(range(40, 72))


def build_model(folder: Path, hidden: int, layers: int) -> Path:
    """A random Qwen3 of the given width and depth."""
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 4),
        num_key_value_heads=max(hidden // 128, 2),
        head_dim=64 if hidden >= 256 else 16,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def cpu_time(server: Server) -> float:
    """Seconds that all processes of a server have computed."""
    root = psutil.Process(server.process.pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def step_time(server: Server, batch: int, tokens: int, step: Any) -> tuple[float, float]:
    """Milliseconds per decode step, and of CPU time, of a batch that decodes together.

    Its short prefill is included.
    """
    params = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
    body = {
        "input_ids": [PROMPT] * batch,
        "sampling_params": {**params, "custom_params": {"step": step}},
    }
    computed, started = cpu_time(server), time.perf_counter()
    answers = server.generate(**body)
    elapsed = time.perf_counter() - started
    assert all(a["meta_info"]["completion_tokens"] == tokens for a in answers)
    return elapsed / tokens * 1e3, (cpu_time(server) - computed) / tokens * 1e3


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=100, help="decode steps per measurement")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = build_model(folder / "model", options.hidden, options.layers)
        scorer = build_scorer(folder / "scorer.safetensors", hidden=options.hidden)
        flags = ("--enable-step", "--step-scorer", str(scorer))
        quiet = ("--disable-radix-cache", "--max-total-tokens", "16384")
        environment = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "0"}
        if options.device == "cuda":
            quiet += ON_CUDA
            environment |= CUDA_PLATFORM
        off = stack.enter_context(
            serve(
                model,
                *quiet,
                log=folder / "off.log",
                **environment,
            )
        )
        on = stack.enter_context(
            serve(
                model, *quiet, *flags, log=folder / "on.log", **environment,
            )
        )  # fmt: skip
        cases: dict[str, tuple[Server, Any]] = {
            "off": (off, None),
            "on, unused": (on, None),
            "on, all scored": (on, True),
        }
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for round_number in range(options.rounds + 1):
            order = list(cases.items())
            for case, (server, step) in order if round_number % 2 else reversed(order):
                measured = step_time(server, options.batch, options.tokens, step)
                if round_number:  # the first round warms up
                    times[case].append(measured)
    report(options, times)


def report(options: argparse.Namespace, times: dict[str, list[tuple[float, float]]]) -> None:
    """Print medians, the median of the per-round ratios to `off`, and the ratio of the sums."""
    rows = {}
    print(f"\n$ python {' '.join(sys.argv)}")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(f"{'':16}{'ms/step':>10}{'ratio':>9}{'quartiles':>18}{'cpu ms/step':>13}{'ratio':>9}")
    base = [wall for wall, _ in times["off"]]
    base_cpu = statistics.mean(cpu for _, cpu in times["off"])
    for case, values in times.items():
        ratios = [wall / other for (wall, _), other in zip(values, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if case != "off" else (1, 1, 1)
        wall = statistics.median(wall for wall, _ in values)
        # Ticks of 10 ms: only many measurements together say something.
        cpu = statistics.mean(cpu for _, cpu in values)
        rows[case] = {"ms": wall, "ratio": middle, "low": low, "high": high, "cpu_ms": cpu}
        between = f"{low:.3f} to {high:.3f}"
        print(
            f"{case:16}{wall:>10.3f}{middle:>9.3f}{between:>18}{cpu:>13.3f}{cpu / base_cpu:>9.3f}"
        )
    if options.json:
        shown = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": shown, "rows": rows, "raw": times}))


if __name__ == "__main__":
    main()
