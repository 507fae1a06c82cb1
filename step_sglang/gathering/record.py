"""A kept group as lines of JSON, one for each trace, and how its traces voted.

question    the prompt as text, as it was rendered for the model
prompt      its token ids
group       the group's id
text        of the trace
tokens      its token ids
finish      stop or length
score       the trace score; null without a step
extracted   its answer; null without one, or when it was cut off
voted       the answer that most of the group's traces gave
agreement   the share of all of its traces that gave it
agrees      whether this trace did
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


def lines(group: GroupInProgress, vote: Vote) -> Iterator[bytes]:
    """The group's lines."""
    order: Sequence[int] = sorted(
        # Ids are drawn at random: the order in which traces end would tell short from long ones.
        range(len(group.traces)),
        key=lambda i: group.traces[i].rid,
    )
    prompt = group.prompt.tolist()
    for i in order:
        trace = group.traces[i]
        record = {
            QUESTION: group.question,
            PROMPT: prompt,
            GROUP: group.group,
            TEXT: trace.text,
            TOKENS: trace.tokens.tolist(),
            FINISH: trace.finish,
            SCORE: trace.score,
            EXTRACTED: vote.extracted[i],
            VOTED: vote.winner,
            AGREEMENT: round(vote.agreement, 6),
            AGREES: vote.agrees[i],
        }
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _short(answer: str | None) -> str | None:
    return None if answer is None or len(answer) > MAX_LENGTH else answer.strip()
