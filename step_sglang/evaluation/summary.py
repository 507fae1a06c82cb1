"""Summarizes results: one row of figures per method, n and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from step_sglang.evaluation.methods import METHODS, RECORD, REFERENCE
from step_sglang.evaluation.stats import Mean, Paired, compare, mean_of
from step_sglang.evaluation.trial_result import TrialResult

Value = Callable[[TrialResult], float]


@dataclass(frozen=True)
class Summary:
    """One method with n traces, in one size of KV pool."""

    method: str
    title: str
    n: int
    memory: str
    questions: int
    runs: int
    accuracy: Mean
    tokens: Mean  # of all traces of a question
    latency: Mean  # seconds
    wait: float | None  # seconds per trace, mean; None without the server's time stamps
    prefill: float | None
    decode: float | None
    longest_wait: float | None
    pruned: float  # traces per question
    retracted: float  # retractions per question
    cancelled: float  # traces per question whose group's early end cut them short
    ended: float  # these, and those that a shrinking vote ended
    aborted: int  # traces, in all, that the server ended for no reason of the method
    usage: float | None  # share of the pool in use, mean over time
    peak_usage: float | None
    accuracy_gap: Paired | None  # against the reference with as many traces, in the same memory
    latency_gap: Paired | None


def summarize(results: Sequence[TrialResult], reference: str = REFERENCE) -> list[Summary]:
    """All summaries, by memory, then n, then in the order of the methods.

    Args:
        results: of all methods.
        reference: the method that the others are compared with.
    """
    cells: dict[tuple[str, int, str], list[TrialResult]] = defaultdict(list)
    for result in results:
        if result.method != RECORD.name:
            cells[result.memory, result.n, result.method].append(result)
    order = list(METHODS)
    return [
        _summary(cells[cell], cells.get((cell[0], cell[1], reference), []), reference)
        for cell in sorted(
            cells, key=lambda c: (_by_size(c[0]), c[1], order.index(c[2]) if c[2] in order else 99)
        )
    ]


def in_common(
    results: Sequence[TrialResult],
) -> tuple[tuple[TrialResult, ...], tuple[str, ...]]:
    """The results on questions that every method has, and a line on what that leaves out.

    Of each memory on its own. Methods without a common question keep theirs, and that is said.
    What was recorded is no method.
    """
    left: set[tuple[str, str]] = set()  # memory and question
    told = []
    for memory in sorted({r.memory for r in results if r.method != RECORD.name}, key=_by_size):
        cells: dict[tuple[str, int], set[str]] = defaultdict(set)
        for result in results:
            if result.memory == memory and result.method != RECORD.name:
                cells[result.method, result.n].add(result.question)
        every, common = set().union(*cells.values()), set.intersection(*cells.values())
        if every == common:
            continue
        have = ", ".join(f"{name} n={n} {len(theirs)}" for (name, n), theirs in cells.items())
        if not common:
            told.append(f"{memory}: no question is one of all methods, so rows differ in theirs")
            continue
        left |= {(memory, question) for question in every - common}
        told.append(
            f"{memory}: {len(every - common)} of {len(every)} questions are left out, as not every "
            f"method has them ({have})"
        )
    kept = tuple(r for r in results if (r.memory, r.question) not in left)
    return kept, tuple(told)


def _summary(
    results: Sequence[TrialResult], reference: Sequence[TrialResult], name: str
) -> Summary:
    first = results[0]
    method = METHODS.get(first.method)
    shares = [moment.share for result in results for moment in result.usage]
    waits = [wait for result in results for wait in result.waits]
    compared = bool(reference) and first.method != name
    accuracy, latency = _values(results, _correct), _values(results, _latency)
    return Summary(
        method=first.method,
        title=method.title if method else first.method,
        n=first.n,
        memory=first.memory,
        questions=len(accuracy),
        runs=len(results),
        accuracy=mean_of(accuracy),
        tokens=mean_of(_values(results, lambda result: float(result.tokens))),
        latency=mean_of(latency),
        wait=_trace_mean(results, "wait"),
        prefill=_trace_mean(results, "prefill"),
        decode=_trace_mean(results, "decode"),
        longest_wait=max(waits, default=None),
        pruned=sum(result.pruned for result in results) / len(results),
        retracted=sum(result.retracted for result in results) / len(results),
        cancelled=sum(result.cancelled for result in results) / len(results),
        ended=sum(result.ended for result in results) / len(results),
        aborted=sum(result.num("aborted") for result in results),
        usage=sum(shares) / len(shares) if shares else None,
        peak_usage=max(shares, default=None),
        accuracy_gap=compare(accuracy, _values(reference, _correct)) if compared else None,
        latency_gap=compare(latency, _values(reference, _latency)) if compared else None,
    )


def _correct(result: TrialResult) -> float:
    return float(result.correct)


def _latency(result: TrialResult) -> float:
    return result.latency


def _values(results: Sequence[TrialResult], value: Value) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for result in results:
        found[result.question].append(value(result))
    return dict(found)


def _trace_mean(results: Sequence[TrialResult], name: str) -> float | None:
    """Mean over runs of the mean over their traces."""
    values = [v for result in results if (v := result.mean(name)) is not None]
    return sum(values) / len(values) if values else None


def _by_size(memory: str) -> tuple[float, str]:
    number = memory.split(" ", 1)[0]
    return (float(number) if number.replace(".", "", 1).isdigit() else -1.0, memory)
