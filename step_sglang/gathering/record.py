"""A kept group as a line of JSON, and how its traces voted.

question    the prompt as text, as it was rendered for the model
prompt      its token ids
group       the group's id; clients may give several groups the same
voted       the answer that most of its traces gave
agreement   the share of all of its traces that gave it
traces      a list, in each of them:
  text        of the trace
  tokens      its token ids
  finish      stop or length
  score       the trace score; null without a step
  extracted   its answer; null without one, or when it was cut off
  agrees      whether it gave the answer of most
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from step_sglang.voting.answers import MAX_LENGTH, Extractor
from step_sglang.voting.classes import Steps, numbered

QUESTION, PROMPT, GROUP, TEXT, TOKENS, FINISH, SCORE = (
    "question", "prompt", "group", "text", "tokens", "finish", "score"
)  # fmt: skip
EXTRACTED, VOTED, AGREEMENT, AGREES = "extracted", "voted", "agreement", "agrees"
TRACES = "traces"


@dataclass(frozen=True)
class KeptTrace:
    """One trace that ended by itself, or at its limit of tokens."""

    rid: str
    text: str
    tokens: array[int]  # a list would take ten times the memory
    finish: str
    score: float | None


@dataclass(eq=False)
class GroupInProgress:
    """One chosen group of ``n`` traces. Whoever drops it before it is complete loses nothing."""

    group: str
    n: int
    prompt: array[int]
    extract: Extractor
    traces: list[KeptTrace] = field(default_factory=list)
    question: str = ""  # the prompt as text, known at its end

    def add(self, trace: KeptTrace) -> bool:
        """A trace ended; whether all have now."""
        self.traces.append(trace)
        return len(self.traces) == self.n

    @property
    def least_bytes(self) -> int:
        """Which its line has at least: a token id is a digit, a comma and a space."""
        ids = len(self.prompt) + sum(len(trace.tokens) for trace in self.traces)
        return len(self.question) + sum(len(trace.text) for trace in self.traces) + 3 * ids


@dataclass(frozen=True)
class Vote:
    """What the traces of a group agree on."""

    extracted: tuple[str | None, ...]  # of each trace
    winner: str
    agreement: float
    agrees: tuple[bool, ...]


def voting(group: GroupInProgress) -> Steps[Vote | None]:
    """The majority's answer, in steps that may take long; None where nobody has an answer."""
    answers = [
        None if trace.finish != "stop" else _short(group.extract(trace.text))
        for trace in group.traces
    ]
    classes = yield from numbered(answers)
    counts = Counter(number for number in classes if number >= 0)
    if not counts:
        return None
    winner = max(counts, key=lambda number: (counts[number], -number))
    name = answers[classes.index(winner)]
    assert name is not None
    agrees = tuple(number == winner for number in classes)
    return Vote(tuple(answers), name, counts[winner] / len(answers), agrees)


def line(group: GroupInProgress, vote: Vote) -> Iterator[bytes]:
    """The group's line, in pieces: the interpreter is shared with those who serve."""
    order: Sequence[int] = sorted(
        # Ids are drawn at random: the order in which traces end would tell short from long ones.
        range(len(group.traces)),
        key=lambda i: group.traces[i].rid,
    )
    common = {
        QUESTION: group.question,
        PROMPT: group.prompt.tolist(),
        GROUP: group.group,
        VOTED: vote.winner,
        AGREEMENT: round(vote.agreement, 6),
    }
    yield _json(common)[:-1] + f', "{TRACES}": ['.encode()
    for place, i in enumerate(order):
        trace = group.traces[i]
        record = {
            TEXT: trace.text,
            TOKENS: trace.tokens.tolist(),
            FINISH: trace.finish,
            SCORE: trace.score,
            EXTRACTED: vote.extracted[i],
            AGREES: vote.agrees[i],
        }
        yield (b", " if place else b"") + _json(record)
    yield b"]}\n"


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _short(answer: str | None) -> str | None:
    return None if answer is None or len(answer) > MAX_LENGTH else answer.strip()
