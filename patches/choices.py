"""Chat and text completions that leave pruned choices out; ``/generate`` always returns all."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.patches.parsed import parse_prompts, pruned_mode
from step_sglang.pruning.choices import (
    ChoiceProgress,
    LeftOut,
    leave_out,
    leave_out_of_stream,
)

# On the request object that an OpenAI endpoint made.
_LEFT_OUT = "step_left_out"
PROGRESS = "step_progress"


def for_openai(obj: Any) -> None:
    """Mark a request as one whose answer is a list of choices."""
    setattr(obj, _LEFT_OUT, LeftOut())


def leaves_out(obj: Any, config: StepConfig) -> bool:
    """Whether the answer to a request, which is not voted, may leave choices out."""
    if not hasattr(obj, _LEFT_OUT) or not isinstance(obj.sampling_params, dict):
        return False
    if obj.sampling_params.get("n", 1) in (1, None):
        return False
    (parsed,) = parse_prompts(obj, config)
    return pruned_mode(parsed.trace, config) == protocol.PRUNED_OMIT and not parsed.declined


async def without_pruned(
    chunks: AsyncGenerator[Any, None], obj: Any, incremental: bool
) -> AsyncGenerator[Any, None]:
    """The answer to such a request. Of several prompts all choices stay: place tells the prompt."""
    if obj.stream:
        progress = ChoiceProgress()
        setattr(obj, PROGRESS, progress)
        chunks = progress.watch(chunks)
    async with aclosing(chunks):
        try:
            first = await anext(chunks)
        except StopAsyncIteration:
            return
        if obj.batch_size > 1:
            rest: AsyncGenerator[Any, None] = _after(first, chunks)
        elif obj.stream:
            rest = leave_out_of_stream(_after(first, chunks), incremental=incremental)
        else:
            yield leave_out(first, getattr(obj, _LEFT_OUT))
            return
        async with aclosing(rest):
            async for chunk in rest:
                yield chunk


async def _after(first: Any, chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    yield first
    async for chunk in chunks:
        yield chunk


def add_usage(response: Any, obj: Any) -> None:
    """Count what was left out in the usage of a response that is not streamed."""
    usage = getattr(response, "usage", None)
    left_out: LeftOut = getattr(obj, _LEFT_OUT)
    if usage is None or not left_out.completion_tokens:
        return
    usage.completion_tokens += left_out.completion_tokens
    usage.total_tokens += left_out.completion_tokens
    if left_out.reasoning_tokens:
        usage.reasoning_tokens = (usage.reasoning_tokens or 0) + left_out.reasoning_tokens
        details = usage.completion_tokens_details
        if details is not None:
            details.reasoning_tokens = usage.reasoning_tokens
