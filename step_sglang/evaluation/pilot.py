"""Chooses a KV pool small enough to matter, from the length of a few traces."""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from step_sglang import files
from step_sglang.client.http import AsyncClient
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Job
from step_sglang.errors import RequestRefused
from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.methods import MethodSettings
from step_sglang.evaluation.profiles import Profile
from step_sglang.evaluation.sampler import ServerSampler
from step_sglang.evaluation.serving import Model, PoolSize, Serving, served
from step_sglang.voting.answers import extract_boxed
from step_sglang.voting.verifier import AnswerVerifier

_QUESTIONS, _TRACES = 4, 8
PILOT = "pilot.json"


@dataclass(frozen=True)
class Lengths:
    """Mean lengths, in tokens."""

    trace: float
    prompt: float

    def quarter(self, n: int) -> int:
        """KV tokens of a quarter of n traces, plus the prompt that they share."""
        return max(1, round(n / 4 * self.trace + self.prompt))


def known_lengths(profile: Profile) -> Lengths | None:
    """The lengths that the model's profile states, if it does."""
    if profile.mean_tokens is None:
        return None
    return Lengths(profile.mean_tokens, profile.prompt_tokens)


def measured_lengths(
    model: Model, jobs: Sequence[Job], sampling: Sampling, suffix: str, folder: Path
) -> Lengths:
    """Sample a few traces of the first questions and average their lengths.

    The means are stored in ``folder``, so that a later run uses the same pool. Call this only after
    the folder's settings were checked.

    Raises:
        BenchError: the stored means are unusable, or the disk fails.
        ServerError: the server does not start or fails, or refuses all of these questions.
    """
    file = folder / PILOT
    if file.exists():
        try:
            return Lengths(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BenchError(f"{file} is unusable ({error}): remove it") from error
    with served(Serving(None, PoolSize()), model, 256, folder / "server.log") as live:
        found = asyncio.run(_sample(live.url, jobs[:_QUESTIONS], sampling, suffix))
    try:
        files.write(file, (json.dumps(asdict(found)) + "\n").encode())
    except OSError as error:
        raise BenchError(f"writing to {folder} failed: {error.strerror}") from error
    return found


async def _sample(url: str, jobs: Sequence[Job], sampling: Sampling, suffix: str) -> Lengths:
    source, verifier = AsyncClient(url, 3600.0), AnswerVerifier()
    lengths: list[int] = []
    prompts: list[int] = []
    refused: RequestRefused | None = None
    try:
        for job in jobs:
            try:
                prompt = await source.render([{"role": "user", "content": job.question + suffix}])
                sampler = ServerSampler(
                    source, prompt, sampling, MethodSettings(), extract_boxed, verifier
                )
                part = await sampler.ask(_TRACES, False)
            except RequestRefused as error:  # too long for the model, for one
                refused = error
                continue
            lengths += [trace.tokens for trace in part.traces]
            prompts.append(len(prompt))
    finally:
        verifier.close()
        await source.close()
    if refused is not None and not lengths:
        raise refused
    return Lengths(statistics.mean(lengths), statistics.mean(prompts))
