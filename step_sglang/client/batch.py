"""Asks many questions, some at a time, and keeps every result: a run that stopped goes on."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from step_sglang.client.errors import ClientError, NoStepError
from step_sglang.client.result import Result, SolveProgress
from step_sglang.client.solve import asolve
from step_sglang.data.questions import Job
from step_sglang.errors import RequestRefused, ServerError
from step_sglang.files import Lines
from step_sglang.voting.session import TraceFate
from step_sglang.voting.verifier import AnswerVerifier

_PAUSE = 2.0  # seconds before a question is asked again; doubled every time
_OURS = re.compile(rb'\{"id": ".*", "status": "')  # how a result's line begins
_IN_VAIN = 5  # questions that failed while no server did its work: no more are asked then


@dataclass(frozen=True)
class Progress:
    """A question that was answered, refused or given up."""

    job: Job
    result: Result | None
    problem: str  # "" with a result


class ResultFile:
    """JSON lines, one per question, in the order in which they were answered.

    Each line holds ``id``, ``question``, ``status``, the voted ``answer`` and its ``share``,
    ``answers`` with their weights and traces, every trace's fate, answer, score, steps and tokens,
    the winning ``text``, and the ``settings`` that it was asked with. Where the question's own
    answer is known, ``expected`` and ``correct`` too.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open it, and read what it holds.

        Raises:
            ClientError: it holds something else, or was made with other settings, or another
                process writes to it.
        """
        self._settings = json.loads(json.dumps(settings))
        self.done: dict[str, dict[str, Any]] = {}
        try:
            self._lines = Lines(path, lock=True, check=partial(self._read, path))
        except BlockingIOError as error:
            raise ClientError(f"{path} is being written by another process") from error
        except OSError as error:
            raise ClientError(f"cannot write to {path}: {error}") from error

    def _read(self, path: Path, data: bytes) -> None:
        # Texts hold U+2028 and its like as they are, at which `splitlines` would end a line.
        *lines, torn = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            if line:
                self._read_line(path, number, line)
        # Not ours, as far as anybody can tell: it must stay.
        if torn and not self.done and not _OURS.match(torn):
            raise _foreign(path, len(lines) + 1)

    def _read_line(self, path: Path, number: int, line: bytes) -> None:
        try:
            found = json.loads(line)
            theirs, name = dict(found["settings"]), str(found["id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _foreign(path, number) from error
        if theirs != self._settings:
            keys = sorted({*theirs, *self._settings})
            differ = [k for k in keys if theirs.get(k) != self._settings.get(k)]
            was = ", ".join(f"{k} {theirs.get(k)!r}, now {self._settings.get(k)!r}" for k in differ)
            raise ClientError(f"{path} holds results of other settings ({was}): name another file")
        self.done[name] = found

    def add(self, job: Job, result: Result, correct: bool | None) -> None:
        """Keep a result; raises ClientError when the disk is full or fails."""
        line = _line(job, result, correct) | {"settings": self._settings}
        self._append(job, line)

    def add_refused(self, job: Job, problem: str) -> None:
        """Keep that a question was refused, which asking again would not change."""
        line = {"id": job.id, "question": job.question, "status": "refused", "message": problem}
        self._append(job, line | {"settings": self._settings})

    def _append(self, job: Job, line: dict[str, Any]) -> None:
        try:
            text = json.dumps(line, ensure_ascii=False) + "\n"
            # A lone surrogate, which UTF-8 has not, becomes the escape that JSON has for it.
            self._lines.append(text.encode(errors="backslashreplace"))
        except OSError as error:
            raise ClientError(
                f"a result cannot be written: {error.strerror}; what is there stays, and the same "
                "command goes on with the rest"
            ) from error
        self.done[job.id] = line

    def close(self) -> None:
        """Let the next writer in."""
        self._lines.close()


async def ask_all(
    jobs: Sequence[Job],
    n: int,
    results: ResultFile,
    *,
    concurrency: int,
    retries: int,
    on_result: Callable[[Progress], None],
    **options: Any,
) -> int:
    """Ask the questions that have no result yet.

    Args:
        jobs: the questions.
        n: traces of each.
        results: where the results go.
        concurrency: questions at a time.
        retries: how often a question is asked again when a server does not answer, or takes no
            more requests.
        on_result: called for every question that comes to an end.
        options: of :func:`asolve`, among them ``url``, one server or several.

    Returns:
        How many questions have no result: their server failed, or aborted traces of theirs.

    Raises:
        ClientError: an option is wrong, or the disk is full.
        NoStepError: a server runs without STEP.
        ServerError: question after question failed, and nothing came meanwhile.
    """
    if concurrency < 1:
        raise ClientError(f"the concurrency must be at least 1, not {concurrency}")
    if retries < 0:
        raise ClientError(f"the retries must be at least 0, not {retries}")
    turns = asyncio.Semaphore(concurrency)
    verifier = AnswerVerifier()
    heard = -inf  # when a server last did its work, on any question
    in_vain = 0  # questions since then during which none did

    def hear() -> None:
        nonlocal heard, in_vain
        heard, in_vain = time.monotonic(), 0

    def grew(progress: SolveProgress) -> None:
        if progress.tokens:
            hear()

    async def one(job: Job) -> bool:
        nonlocal in_vain
        async with turns:
            began = time.monotonic()
            try:
                result = await _ask(job, n, retries, {**options, "on_progress": grew})
            except RequestRefused as error:
                hear()
                results.add_refused(job, str(error))
                on_result(Progress(job, None, str(error)))
                return True
            except ServerError as error:
                in_vain += heard < began
                if isinstance(error, NoStepError) or in_vain >= _IN_VAIN:
                    raise  # nobody answers any more: the rest would only fail too
                on_result(Progress(job, None, str(error)))
                return False
            hear()
            correct = None
            if job.answer:
                correct = result.answer is not None and await asyncio.to_thread(
                    verifier.same, result.answer, job.answer
                )
            results.add(job, result, correct)
            on_result(Progress(job, result, ""))
            return True

    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(one(job)) for job in jobs if job.id not in results.done]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        verifier.close()
    return sum(not task.result() for task in asked)


def grades(jobs: Sequence[Job], results: ResultFile) -> tuple[list[bool], int]:
    """Whether each result is right whose question has an answer of its own, as it is now.

    Returns:
        Also how many of them the file grades by another answer, or by none.
    """
    right, anew = [], 0
    verifier = AnswerVerifier()
    try:
        for job in jobs:
            line = results.done.get(job.id, {})
            if not job.answer or "answer" not in line:
                continue
            if line.get("expected") == job.answer:
                right.append(line["correct"])
                continue
            anew += 1
            given = line["answer"]
            right.append(given is not None and verifier.same(given, job.answer))
    finally:
        verifier.close()
    return right, anew


async def _ask(job: Job, n: int, retries: int, options: Mapping[str, Any]) -> Result:
    read = {} if job.extract == "boxed" else {"extract": job.extract}  # as its set wants
    attempt = 0
    while True:
        try:
            result = await asolve(job.question, n, **{**options, **read})
            if not result.turned_away:
                return result
            # A vote of the others is not the one that was asked for.
            lost = sum(trace.fate is TraceFate.ABORTED for trace in result.traces)
            raise ServerError(f"the server aborted {lost} of {n} traces: {result.turned_away}")
        except ServerError as error:
            if attempt == retries or isinstance(error, NoStepError | RequestRefused):
                raise
        await asyncio.sleep(_PAUSE * 2**attempt)
        attempt += 1


def _foreign(path: Path, number: int) -> ClientError:
    return ClientError(f"{path}, line {number}, is no result of an earlier run: name another file")


def _line(job: Job, result: Result, correct: bool | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": job.id,
        "question": job.question,
        "status": result.status.value,
        "answer": result.answer,
        "share": result.share,
        "message": result.message,
    }
    if correct is not None:
        found |= {"expected": job.answer, "correct": correct}
    return found | {
        "answers": [
            {"answer": a.answer, "weight": a.weight, "traces": list(a.traces)}
            for a in result.answers
        ],
        "traces": [
            {
                "fate": t.fate.value,
                "answer": t.answer,
                "score": t.score,
                "num_steps": t.num_steps,
                "tokens": t.tokens,
            }
            for t in result.traces
        ],
        "text": "" if result.best is None else result.best.text,
        "early": result.early,
        "seconds": result.timing.total,
    }
