"""Leaves pruned traces out of an answer that has several choices. Knows nothing of SGLang.

Answers and chunks are those of ``/generate``. One choice always remains: where all traces of a
prompt were pruned, the one with the highest trace score.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol

Answer = dict[str, Any]


@dataclass
class LeftOut:
    """Tokens that the traces left out had generated: they are no choice, but were paid for."""

    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, answer: Answer, sign: int = 1) -> None:
        """Count one answer."""
        info = answer["meta_info"]
        self.completion_tokens += sign * int(info.get("completion_tokens") or 0)
        self.reasoning_tokens += sign * int(info.get("reasoning_tokens") or 0)


def is_pruned(answer: Answer) -> bool:
    """Whether the trace was pruned, whatever its finish reason says."""
    step = answer["meta_info"].get(protocol.META_KEY)
    return bool(step and step.get(protocol.META_PRUNED))


def _rank(answer: Answer) -> tuple[float, int]:
    info = answer["meta_info"]
    score = info[protocol.META_KEY][protocol.META_SCORE]
    return (-1.0 if score is None else score, int(info.get("completion_tokens") or 0))


def leave_out(answers: Iterable[Answer], left_out: LeftOut) -> list[Answer]:
    """The answers to keep, in their order; what the others generated is added to ``left_out``."""
    answers = list(answers)
    kept = [answer for answer in answers if not is_pruned(answer)]
    if answers and not kept:
        kept = [max(answers, key=_rank)]
    for answer in answers:
        if not any(answer is one for one in kept):
            left_out.add(answer)
    return kept


async def leave_out_of_stream(
    chunks: AsyncGenerator[Answer, None], *, incremental: bool
) -> AsyncGenerator[Answer, None]:
    """The streamed traces that were not pruned, each when it ends, numbered in that order.

    A trace's text is held until it is known that it stays, and its number is its place among those
    that stay: clients append choices in the order in which their numbers first appear. The first
    one's end comes last, with the tokens of what was left out.

    Args:
        chunks: of all traces of one prompt.
        incremental: a chunk holds what is new, not all of the trace so far.
    """
    held: dict[int, list[Answer]] = {}
    left_out = LeftOut()
    best: list[Answer] = []  # of the pruned traces
    end: Answer | None = None  # of the first trace that stays
    number = 0
    async with aclosing(chunks):
        async for chunk in chunks:
            reason = chunk["meta_info"].get("finish_reason")
            trace = held.setdefault(chunk.get("index", 0), [])
            if not incremental:
                trace.clear()
            trace.append(chunk)
            if reason is None:
                continue
            del held[chunk.get("index", 0)]
            if reason.get("status_code") is not None:
                yield chunk  # an error, which ends the stream
                continue
            if is_pruned(chunk):
                left_out.add(chunk)
                if not best or _rank(chunk) > _rank(best[-1]):
                    best = trace
                continue
            if end is None:
                trace, end = _without_end(trace, incremental)
            for part in trace:
                yield {**part, "index": number}
            number += 1
    if end is None and best:
        left_out.add(best[-1], sign=-1)
        best, end = _without_end(best, incremental)
        for part in best:
            yield {**part, "index": 0}
    if end is not None:
        left_out.add(end)
        info = {
            **end["meta_info"],
            "completion_tokens": left_out.completion_tokens,
            "reasoning_tokens": left_out.reasoning_tokens,
        }
        yield {**end, "meta_info": info, "index": 0}


def _without_end(trace: list[Answer], incremental: bool) -> tuple[list[Answer], Answer]:
    """A trace's chunks as if it went on, and the chunk that ends it, which adds no text."""
    *before, last = trace
    going_on = {**last, "meta_info": {**last["meta_info"], "finish_reason": None}}
    end = {**last, "text": "", "output_ids": []} if incremental else last
    return [*before, going_on], end


@dataclass
class ChoiceProgress:
    """How the traces of a stream stand, for whoever keeps its connection alive."""

    running: frozenset[int] = frozenset()
    finished: int = 0
    pruned: int = 0

    async def watch(self, chunks: AsyncGenerator[Answer, None]) -> AsyncGenerator[Answer, None]:
        """The same chunks, counted."""
        async with aclosing(chunks):
            async for chunk in chunks:
                index = chunk.get("index", 0)
                self.running |= {index}
                if chunk["meta_info"].get("finish_reason") is not None:
                    self.running -= {index}
                    self.pruned += is_pruned(chunk)
                    self.finished += not is_pruned(chunk)
                yield chunk

    def comment(self) -> str | None:
        """A server-sent-events comment; None before the first chunk, when all can still fail."""
        if not (self.running or self.finished or self.pruned):
            return None
        running = len(self.running)
        return f": step {running} running, {self.finished} finished, {self.pruned} pruned\n\n"
