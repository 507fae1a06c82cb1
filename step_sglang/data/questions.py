"""Reads questions, or existing traces, from files and data sets."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from step_sglang.data.benchmarks import BENCHMARKS, Benchmark, with_choices
from step_sglang.errors import SourceError, first_line, nearest
from step_sglang.gathering.record import (
    AGREEMENT,
    AGREES,
    EXTRACTED,
    FINISH,
    PROMPT,
    TRACES,
    VOTED,
)
from step_sglang.voting.answers import extract_boxed

REASONER = "reasoner"
# Half of a surrogate pair. JSON may hold one without the other, which no request can.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class GivenTrace:
    """An existing trace.

    ``tokens`` None: its text is tokenized, which may give other tokens than were sampled.
    ``agrees``: whether it gave the answer that its group's vote chose, where that is its label; its
    own answer is then ``extracted``.
    """

    text: str
    tokens: tuple[int, ...] | None = None
    finish: str = "stop"
    extracted: str | None = None
    agrees: bool | None = None


@dataclass(frozen=True)
class Job:
    """One question to ask, or whose existing traces to read."""

    id: str
    question: str
    answer: str
    traces: tuple[GivenTrace, ...] = ()
    extract: str = "boxed"  # how a trace's answer is read, see `step_sglang.voting.answers`
    prompt: tuple[int, ...] | None = None  # token ids; None: the question as one user message


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


def load_traces(
    file: Path,
    n: int | None = None,
    fields: Fields = Fields(),
    agreement: float | None = None,
    asked: Callable[[str], str] = str,
) -> QuestionSet:
    """Existing traces: JSON lines of question, answer and text, n lines per question.

    A line may also hold the trace's token ids, the prompt's not among them. Of a folder every
    ``*.jsonl`` file is read, by name; a question's lines may lie in several of them. A line of a
    server with ``--step-sample`` (`step_sglang.gathering.record`) holds a whole group, and also
    says which prompt it was, as token ids, and how the group voted.

    ``n`` None takes the most common count. A question with more traces keeps its first n; one with
    fewer is left out.

    Args:
        file: or a folder.
        n: traces of a question.
        fields: the members' names.
        agreement: the votes are the labels, of groups of which at least this share agrees; all
            others are left out.
        asked: what a question asks, by which it has its id; such as a rendered prompt's message.

    Raises:
        SourceError: the file is missing, the folder has none, or no question has n traces.
    """
    groups: dict[tuple[str, str, str], _GivenGroup] = {}
    problems: list[str] = []
    files = sorted(file.glob("*.jsonl")) if file.is_dir() else [file]
    if not files:
        raise SourceError(f"the folder {file} holds no *.jsonl file of traces")
    voted = agreement is not None
    for where, row, group in (found for name in files for found in _trace_rows(name)):
        pair = _voted_pair(row, fields) if voted else _pair(row, fields)
        trace = _given(row, fields, voted)
        if pair is not None and trace is not None:
            key = (pair[0].strip(), pair[1], group)
            if key not in groups:
                share = row.get(AGREEMENT)
                share = share if isinstance(share, int | float) else 0.0
                groups[key] = _GivenGroup(*pair, _tokens(row.get(PROMPT)), share)
            groups[key].traces.append(trace)
        elif not voted and pair is None and trace is not None and _is_kept(row):
            problem = (
                f"{where} is a group that --step-sample kept, with a vote instead of an answer: "
                "give --labels vote"
            )
            if problem not in problems[-1:]:  # one for all of its traces
                problems.append(problem)
        elif voted:
            problems.append(f"{where} has no recorded vote, or unusable tokens")
        else:
            problems.append(f"{where} has no question, answer or text, or unusable tokens")
    kept = list(groups.values())
    if agreement is not None:
        kept = [group for group in kept if group.agreement >= agreement]
        if len(kept) < len(groups):
            problems.append(
                f"{len(groups) - len(kept)} of {len(groups)} groups, of which less than "
                f"{agreement:g} agrees"
            )
    counts = Counter(len(group.traces) for group in kept)
    wanted = n or counts.most_common(1)[0][0] if kept else 0
    jobs = _jobs_of_groups(kept, wanted, problems, asked)
    members = f"{fields.wanted} and {fields.text!r}"
    if voted:
        members = f"a recorded vote of which at least {agreement:g} agrees"
    return _source(str(file), jobs, problems, members)


@dataclass
class _GivenGroup:
    """Traces that were read, of one question asked once."""

    question: str
    answer: str
    prompt: tuple[int, ...] | None
    agreement: float
    traces: list[GivenTrace] = field(default_factory=list)


def _trace_rows(file: Path) -> Iterator[tuple[str, Any, str]]:
    """Each trace with the place of its line, and with what tells a kept group from all others."""
    for where, row in _lines(file):
        traces = row.get(TRACES) if isinstance(row, Mapping) else None
        if not isinstance(traces, list):
            yield where, row, ""
            continue
        common = {name: value for name, value in row.items() if name != TRACES}
        for trace in traces:
            whole = {**common, **trace} if isinstance(trace, Mapping) else None
            yield where, whole, f"{file} {where}"


def _jobs_of_groups(
    groups: Sequence[_GivenGroup],
    wanted: int,
    problems: list[str],
    asked: Callable[[str], str],
) -> list[Job]:
    jobs: dict[str, Job] = {}
    repeated = 0
    # A question that was asked again counts once: its parts would lie on both sides of a split.
    for group in sorted(groups, key=lambda group: -group.agreement):
        question, found = group.question, group.traces
        text = asked(question)
        name = question_id(text if group.prompt is None else text.strip())
        if len(found) < wanted:
            problems.append(f"a question has {len(found)} traces, not {wanted}: {question[:60]!r}")
            continue
        if name in jobs:
            repeated += group.prompt is not None
            if group.prompt is None:
                problems.append(f"a question has two different answers: {question[:60]!r}")
            continue
        if len(found) > wanted:
            problems.append(f"{len(found) - wanted} traces too many of {question[:60]!r}")
        jobs[name] = Job(name, question, group.answer, tuple(found[:wanted]), prompt=group.prompt)
    if repeated:
        problems.append(f"{repeated} groups whose question another group asks too")
    return list(jobs.values())


def question_id(question: str) -> str:
    """A question's id in a store.

    Of the text as it stands, so that results of earlier versions stay what they are; whoever reads
    questions takes texts that differ in blanks at their ends for the same question.
    """
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
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                if _HALF.search(line):
                    json.dumps(row, ensure_ascii=False).encode()
                yield f"line {number}", row
            except json.JSONDecodeError:
                yield f"line {number} is not JSON and so", None
            except (ValueError, RecursionError) as error:
                yield f"line {number} cannot be read ({first_line(error)}) and so", None


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


def _is_kept(row: Mapping[str, Any]) -> bool:
    return {VOTED, AGREES} <= set(row)


def _voted_pair(row: Any, fields: Fields) -> tuple[str, str] | None:
    """The question and the answer that its group chose."""
    pair = _pair(row, replace(fields, answer=None))
    voted = row.get(VOTED) if pair is not None else None
    if pair is None or not isinstance(voted, str) or type(row.get(AGREES)) is not bool:
        return None
    return pair[0], voted


def _given(row: Any, fields: Fields, voted: bool) -> GivenTrace | None:
    if not isinstance(row, Mapping):
        return None
    text, tokens = row.get(fields.text), row.get(fields.tokens)
    if not isinstance(text, str) or not (text or tokens):
        return None
    found = GivenTrace(text, finish="length" if row.get(FINISH) == "length" else "stop")
    if voted:
        extracted = row.get(EXTRACTED)
        extracted = extracted if isinstance(extracted, str) else None
        found = replace(found, extracted=extracted, agrees=row.get(AGREES) is True)
    if tokens is None:
        return found
    ids = _tokens(tokens)
    return None if ids is None else replace(found, tokens=ids)


def _tokens(ids: Any) -> tuple[int, ...] | None:
    if not isinstance(ids, list) or not ids or not all(type(t) is int for t in ids):
        return None
    return tuple(ids)


def _jobs(
    rows: Iterable[tuple[str, Any]], fields: Fields, limit: int | None
) -> tuple[list[Job], list[str]]:
    jobs: dict[str, Job] = {}  # by the question's text without blanks at its ends
    problems: list[str] = []
    for where, row in rows:
        if limit is not None and len(jobs) == limit:
            break
        pair = _pair(row, fields)
        if pair is None:
            problems.append(f"{where} has no question or no answer")
        elif pair[0].strip() in jobs:
            problems.append(f"{where} repeats a question")
        else:
            jobs[pair[0].strip()] = Job(question_id(pair[0]), *pair)
    return list(jobs.values()), problems
