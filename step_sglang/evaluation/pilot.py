"""Finds a KV pool that is small enough to matter, by a look at how long the traces are."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from pathlib import Path

from step_sglang.answers import extract_boxed
from step_sglang.client.sources import UrlSource
from step_sglang.evaluation.asking import Session
from step_sglang.evaluation.methods import Settings
from step_sglang.evaluation.profiles import Profile
from step_sglang.evaluation.serving import Memory, Model, Serving, served
from step_sglang.judge import Judge
from step_sglang.toolchain.sources import Job
from step_sglang.toolchain.wire import Sampling

_QUESTIONS, _TRACES = 4, 8
_FILE = "pool.txt"


def quarter_pool(
    n: int,
    profile: Profile,
    model: Model,
    jobs: Sequence[Job],
    sampling: Sampling,
    suffix: str,
    folder: Path,
) -> int:
    """KV tokens that a quarter of n traces needs at their mean length, and one prompt.

    Traces of a question share their prompt. Where the mean is not known, a few traces of the first
    questions are sampled, and the pool is remembered in ``folder``, so that a later run has the
    same. Only lengths are looked at.
    """
    if profile.mean_tokens is not None:
        return _quarter(n, profile.mean_tokens, profile.prompt_tokens)
    known = folder / _FILE
    if known.exists():
        return int(known.read_text())
    with served(Serving(None, Memory()), model, 256, folder / "server.log") as live:
        tokens = asyncio.run(_sample(live.url, jobs[:_QUESTIONS], sampling, suffix))
    pool = _quarter(n, *tokens)
    known.write_text(f"{pool}\n")
    return pool


def _quarter(n: int, mean_tokens: float, prompt_tokens: float) -> int:
    return max(1, round(n / 4 * mean_tokens + prompt_tokens))


async def _sample(
    url: str, jobs: Sequence[Job], sampling: Sampling, suffix: str
) -> tuple[float, float]:
    source, judge = UrlSource(url, 3600.0, None), Judge()
    lengths: list[int] = []
    prompts: list[int] = []
    try:
        for job in jobs:
            prompt = await source.render([{"role": "user", "content": job.question + suffix}])
            session = Session(source, prompt, sampling, Settings(), extract_boxed, judge)
            part = await session.ask(_TRACES, False)
            lengths += [trace.tokens for trace in part.traces]
            prompts.append(len(prompt))
    finally:
        judge.close()
        await source.close()
    return statistics.mean(lengths), statistics.mean(prompts)
