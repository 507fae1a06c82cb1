"""Reads questions, or existing traces, from files and data sets."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step_sglang.data.benchmarks import BENCHMARKS, Benchmark, with_choices
from step_sglang.errors import SourceError, first_line, nearest
from step_sglang.voting.answers import extract_boxed

REASONER = "reasoner"


@dataclass(frozen=True)
class GivenTrace:
    """An existing trace. ``tokens`` None: its text is tokenized, which may give other tokens than
    were sampled."""

    text: str
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Job:
    """One question to ask, or whose existing traces to read."""

    id: str
    question: str
    answer: str
    traces: tuple[GivenTrace, ...] = ()
    extract: str = "boxed"  # how a trace's answer is read, see `step_sglang.voting.answers`


@dataclass(frozen=True)
class QuestionSet:
    """The questions that were read, and a line for each that was left out."""

    name: str
    jobs: tuple[Job, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Fields:
    """Names of the members of a line or of a row.

    ``answer`` None: nobody knows the answers. ``optional``: where a line has none, it is "".
    """

    question: str = "question"
    answer: str | None = "answer"
    text: str = "text"
    tokens: str = "tokens"
    optional: bool = False

    @property
    def wanted(self) -> str:
        """The members that every line must have, in words."""
        needless = self.answer is None or self.optional
        answer = "" if needless else f" and {self.answer!r}"
        return f"{self.question!r}{answer}"


def load_questions(
    name: str,
    limit: int | None = None,
    split: str = "train",
    config: str | None = None,
    fields: Fields = Fields(),
    seed: int = 0,
    data_dir: Path | None = None,
) -> QuestionSet:
    """Questions by name.

    Args:
        name: ``reasoner:SPLIT`` (the embedded reasoner's own), one of the paper's benchmarks
            (``aime-25``, see `benchmarks`), a JSON-lines file, or a Hugging Face data set.
        limit: at most so many questions; 100 by default for the reasoner, whose supply is endless.
        split: of a data set.
        config: of a data set.
        fields: the members that hold question and answer.
        seed: of the embedded reasoner's questions.
        data_dir: folder of the named sets' JSON-lines files; without such a file they come from
            Hugging Face.

    Raises:
        SourceError: nothing is there, or no line has both a question and an answer.
    """
    if limit is not None and limit < 1:
        raise SourceError(f"the number of questions must be at least 1, not {limit}")
    rows: Iterable[tuple[str, Any]]
    if name.startswith(f"{REASONER}:"):
        return _reasoner(name, limit or 100, seed)
    if name in BENCHMARKS:
        return _named(BENCHMARKS[name], limit, data_dir)
    if Path(name).exists() or name.endswith((".jsonl", ".json")):
        rows = _lines(Path(name))
    else:
        near = nearest(name, BENCHMARKS, 0.8)
        if near:
            raise SourceError(
                f"there is no data set {name!r}{near}; the known ones are "
                f"{', '.join(BENCHMARKS)}, and the reasoner's own, such as reasoner:test"
            )
        rows = _data_set(name, config, split)
    jobs, problems = _jobs(rows, fields, limit)
    return _source(name, jobs, problems, fields.wanted)


def load_traces(file: Path, n: int | None = None, fields: Fields = Fields()) -> QuestionSet:
    """Existing traces: JSON lines of question, answer and text, n lines per question.

    A line may also hold the trace's token ids, the prompt's not among them. Of a folder every
    ``*.jsonl`` file is read, by name; a question's lines may lie in several of them.

    ``n`` None takes the most common count. A question with more traces keeps its first n; one with
    fewer is left out.

    Raises:
        SourceError: the file is missing, the folder has none, or no question has n traces.
    """
    traces: dict[tuple[str, str], list[GivenTrace]] = {}
    problems: list[str] = []
    files = sorted(file.glob("*.jsonl")) if file.is_dir() else [file]
    if not files:
        raise SourceError(f"the folder {file} holds no *.jsonl file of traces")
    for where, row in (line for found_file in files for line in _lines(found_file)):
        pair, trace = _pair(row, fields), _given(row, fields)
        if pair is None or trace is None:
            problems.append(f"{where} has no question, answer or text, or unusable tokens")
        else:
            traces.setdefault(pair, []).append(trace)
    counts = Counter(len(found) for found in traces.values())
    wanted = n or counts.most_common(1)[0][0] if traces else 0
    jobs: dict[str, Job] = {}
    for (question, answer), found in traces.items():
        name = question_id(question)
        if len(found) < wanted:
            problems.append(f"a question has {len(found)} traces, not {wanted}: {question[:60]!r}")
        elif name in jobs:
            problems.append(f"a question has two different answers: {question[:60]!r}")
        else:
            if len(found) > wanted:
                problems.append(f"{len(found) - wanted} traces too many of {question[:60]!r}")
            jobs[name] = Job(name, question, answer, tuple(found[:wanted]))
    members = f"{fields.wanted} and {fields.text!r}"
    return _source(str(file), list(jobs.values()), problems, members)


def question_id(question: str) -> str:
    """A question's id in a store; equal texts are the same question."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def gold_answer(answer: Any) -> str | None:
    r"""The bare answer: the content of ``\boxed{}``, what follows ``####``, or the text itself."""
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return None
    text = str(answer)
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed
    return text.rsplit("####", 1)[-1].strip() or None


def _source(name: str, jobs: list[Job], problems: list[str], members: str) -> QuestionSet:
    if not jobs:
        shown = f" ({problems[0]})" if problems else ""
        raise SourceError(f"{name} holds nothing with {members}{shown}")
    return QuestionSet(name, tuple(jobs), tuple(problems))


def _named(known: Benchmark, limit: int | None, data_dir: Path | None) -> QuestionSet:
    file = None if data_dir is None else data_dir / known.file
    rows: Iterable[tuple[str, Any]]
    if file is not None and file.exists():
        name, fields, rows = str(file), Fields(), _lines(file)
    else:
        name, fields = known.hub, Fields(question=known.question, answer=known.answer)
        try:
            rows = list(_data_set(known.hub, known.config, known.split))
        except SourceError as error:
            wanted = known.file if file is None else file
            raise SourceError(
                f"{error}. Without a connection put its questions into {wanted} and name the "
                "folder with --data-dir"
            ) from error
    if known.choices:
        rows = [(where, with_choices(row)) for where, row in rows]
        fields = Fields()
    jobs, problems = _jobs(rows, fields, limit)
    extract = "choice" if known.choices else "boxed"
    jobs = [replace(job, extract=extract) for job in jobs]
    return _source(name, jobs, problems, f"{fields.question!r} and {fields.answer!r}")


def _reasoner(name: str, count: int, seed: int) -> QuestionSet:
    from step_sglang.reasoner import questions

    try:
        found = questions(name.removeprefix(f"{REASONER}:"), count, seed)
    except ValueError as error:
        raise SourceError(f"{name}: {error}") from error
    jobs = tuple(Job(question_id(q.question), q.question, q.answer) for q in found)
    return QuestionSet(name, jobs, ())


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError:
                yield f"line {number} is not JSON and so", None


def _data_set(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError as error:
        raise SourceError(
            f"{name!r} is no file, and reading data sets needs `pip install datasets`"
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:
        raise SourceError(
            f"{name!r} is neither a file nor a data set that can be loaded "
            f"(split {split!r}): {first_line(error)}"
        ) from error
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _pair(row: Any, fields: Fields) -> tuple[str, str] | None:
    if not isinstance(row, Mapping):
        return None
    question = row.get(fields.question)
    answer = "" if fields.answer is None else gold_answer(row.get(fields.answer))
    if answer is None and fields.optional:
        answer = ""
    if not isinstance(question, str) or not question.strip() or answer is None:
        return None
    return question, answer


def _given(row: Any, fields: Fields) -> GivenTrace | None:
    if not isinstance(row, Mapping):
        return None
    text, tokens = row.get(fields.text), row.get(fields.tokens)
    if not isinstance(text, str) or not text:
        return None
    if tokens is None:
        return GivenTrace(text)
    if not isinstance(tokens, list) or not tokens or not all(type(t) is int for t in tokens):
        return None
    return GivenTrace(text, tuple(tokens))


def _jobs(
    rows: Iterable[tuple[str, Any]], fields: Fields, limit: int | None
) -> tuple[list[Job], list[str]]:
    jobs: dict[str, Job] = {}
    problems: list[str] = []
    for where, row in rows:
        if limit is not None and len(jobs) == limit:
            break
        pair = _pair(row, fields)
        if pair is None:
            problems.append(f"{where} has no question or no answer")
        elif question_id(pair[0]) in jobs:
            problems.append(f"{where} repeats a question")
        else:
            name = question_id(pair[0])
            jobs[name] = Job(name, *pair)
    return list(jobs.values()), problems
