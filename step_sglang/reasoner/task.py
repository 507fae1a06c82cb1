"""The embedded reasoner's task: questions, answers, and the careless writer of example traces.

A question is a chain of labelled operations modulo 13, `12;A+9;B*6;C-4`. A trace works it line by
line, `A:12+9=21-13=8`, re-checks lines now and then (`check,` the last, `wait,` an earlier one,
restated with a verdict, `?ok` or `?no`), and redoes the chain from a line it finds wrong. The
writer slips on purpose and looks back more often while a slip is outstanding, so predicting its
re-checks needs a belief about correctness. No label is written down. Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MODULUS = 13
LABELS = "ABCDEFGHIJKLMNOP"
MAX_OPERATIONS = len(LABELS)
BOUNDARY = "\n\n"
THINK_END = "</think>"
BOXED = "\\boxed{"
LOOK_BACK = "wait,"  # re-check an earlier line
CHECK_LAST = "check,"  # re-check the line just written

# Split of a question = hash of its text, so no question can be in two splits. Shares of 20.
SPLITS = {
    "train": range(0, 14),
    "scorer-train": range(14, 16),
    "scorer-validation": range(16, 18),
    "test": range(18, 20),
}
MULTIPLY_SHARES = (0.2, 0.35, 0.5)  # one is drawn per question: easy to hard

_WRITTEN = re.compile(r"(?:(?:wait|check),)?([A-P]):(\d+)([+*-])(\d+)=.*=(\d+)(\?ok|\?no)?")
_OPERATION = re.compile(r"([A-P])(\+[1-9]|-[1-9]|\*[2-6])")
_ANSWER = re.compile(r"\\boxed\{(\d+)\}")


@dataclass(frozen=True)
class Operation:
    """Add, subtract or multiply by a small operand."""

    sign: str  # one of + - *
    operand: int

    def raw(self, value: int) -> int:
        """Return the result before it is reduced."""
        if self.sign == "+":
            return value + self.operand
        if self.sign == "-":
            return value - self.operand
        return value * self.operand


@dataclass(frozen=True)
class Question:
    """A start value and a chain of operations, labelled A, B, C and so on."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def question(self) -> str:
        """The text a user sends."""
        chain = (
            f"{label}{op.sign}{op.operand}"
            for label, op in zip(LABELS, self.operations, strict=False)
        )
        return ";".join([str(self.start), *chain])

    @property
    def answer(self) -> str:
        """The chain's true value modulo 13."""
        value = self.start
        for op in self.operations:
            value = op.raw(value) % MODULUS
        return str(value)

    @property
    def split(self) -> str:
        """The split this question belongs to."""
        return split_of(self.question)

    def as_dict(self) -> dict[str, str]:
        """A line of a question file."""
        return {"question": self.question, "answer": self.answer}


def parse_question(text: str) -> Question:
    """Inverse of `Question.question`; ValueError when the text is not a question."""
    start, *rest = text.strip().split(";")
    operations = []
    for label, part in zip(LABELS, rest, strict=False):
        match = _OPERATION.fullmatch(part)
        if match is None or match[1] != label:
            raise ValueError(f"not an operation labelled {label}: {part!r}")
        operations.append(Operation(match[2][0], int(match[2][1])))
    if not start.isdecimal() or int(start) >= MODULUS or not 1 <= len(rest) <= MAX_OPERATIONS:
        raise ValueError(f"not a question: {text!r}")
    return Question(int(start), tuple(operations))


def split_of(question: str) -> str:
    """The split of a question text, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 20
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def question_stream(
    split: str, seed: int, min_operations: int = 8, max_operations: int = MAX_OPERATIONS
) -> Iterator[Question]:
    """Endless questions of one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    while True:
        count = rng.randint(min_operations, max_operations)
        share = rng.choice(MULTIPLY_SHARES)
        operations = tuple(
            Operation("*", rng.randint(2, 6))
            # products come early: a slip there is decisive for the rest of the trace
            if rng.random() < 2 * share * (1 - i / count)
            else Operation(rng.choice("+-"), rng.randint(1, 9))
            for i in range(count)
        )
        question = Question(rng.randrange(MODULUS), operations)
        if question.split == split:
            yield question


def questions(split: str, n: int, seed: int = 0) -> list[Question]:
    """n different questions of 8 to 16 operations."""
    found: dict[str, Question] = {}
    for question in question_stream(split, seed):
        if len(found) == n:
            break
        found.setdefault(question.question, question)
    return list(found.values())


def final_answer(text: str) -> str | None:
    """The last boxed number, or None."""
    found = _ANSWER.findall(text)
    return str(int(found[-1])) if found else None


def is_correct(question: Question, text: str) -> bool:
    """Whether the last boxed number is the answer."""
    return final_answer(text) == question.answer


def progress(question: str, text: str) -> list[bool]:
    """Of every step of a trace, whether the chain as it stands then is right so far.

    A step that is no line of the chain leaves it as it was.
    """
    asked = parse_question(question)
    values = [asked.start]
    for operation in asked.operations:
        values.append(operation.raw(values[-1]) % MODULUS)
    chain: list[bool] = []  # of every line that stands, whether its value is the true one
    found = []
    for step in text.split(THINK_END, maxsplit=1)[0].split(BOUNDARY):
        line = _WRITTEN.match(step)
        if line is not None:
            label = LABELS.index(line[1])
            if line[6] == "?no":
                del chain[label:]
            elif line[6] is None:
                right = label == len(chain) < len(asked.operations)
                right = right and int(line[5]) == values[label + 1]
                chain[label:] = [right]
        found.append(all(chain))
    return found


@dataclass(frozen=True)
class Habits:
    """How careless the writer is and how it re-checks."""

    # chance of taking a multiple of 12 instead of 13, by raw // 13, and of adding 12
    wrong_multiple: tuple[float, ...] = (0.005, 0.06, 0.25, 0.45, 0.7, 0.85)
    wrong_when_negative: float = 0.25
    off_by_some: float = 0.1  # share of slips that are off by 1 to 3 instead
    redo_factor: float = 0.15  # a line found wrong is redone with more care
    # chance of looking back, and of re-checking the last line, at every boundary
    look_back: tuple[float, float] = (0.02, 0.33)  # while no slip is outstanding, while one is
    check_last: tuple[float, float] = (0.25, 0.03)
    look_back_at_first_slip: float = 0.08
    look_back_window: int = 4
    notices_slip: float = 0.5
    false_alarm: float = 0.02
    max_checks: int = 16
    # It heeds the state for this many boundaries in a row, from a random one on, and re-checks at
    # random elsewhere: its earlier doubts tell nothing, so a model must look at the lines.
    heed_span: int = 5


# A writer that sees a slip as well but seldom finds it: it looks back on and on, so its wrong
# traces tend to be the longer ones, as those of large models are.
DWELLING = Habits(look_back=(0.02, 0.5), check_last=(0.1, 0.03), notices_slip=0.1, max_checks=30)


@dataclass(frozen=True)
class Line:
    """One worked operation: the value before, and the reduced value written after."""

    label: int
    before: int
    operation: Operation
    multiple: int  # what is taken from the raw result, or added when that is negative
    after: int

    @property
    def slipped(self) -> bool:
        """Whether the written value does not follow from the value before."""
        return self.after != self.operation.raw(self.before) % MODULUS

    @property
    def text(self) -> str:
        """As written, `A:12+9=21-13=8`."""
        op = self.operation
        raw = op.raw(self.before)
        reduction = f"{raw}{'+' if raw < 0 else '-'}{self.multiple}={self.after}"
        return f"{LABELS[self.label]}:{self.before}{op.sign}{op.operand}={reduction}"


@dataclass
class WrittenTrace:
    """A finished trace of the writer. `steps` are texts without their boundary."""

    steps: list[str] = field(default_factory=list)
    clean: list[bool] = field(default_factory=list)  # per step: no slip outstanding after it
    heeded: list[bool] = field(default_factory=list)  # per boundary: what follows it is no whim
    answer: str = ""

    @property
    def text(self) -> str:
        """What follows the prompt, without the end token."""
        body = "".join(step + BOUNDARY for step in self.steps)
        return f"{body}{THINK_END}{BOXED}{self.answer}}}"


def write_trace(question: Question, rng: random.Random, habits: Habits) -> WrittenTrace:
    """Work a question carelessly, line by line, with re-checks and redone lines."""
    trace = WrittenTrace()
    lines: list[Line] = []  # the chain as it stands; a redo cuts it
    checks = 0
    heed_from = rng.randrange(1 - habits.heed_span // 2, 2 * len(question.operations))
    careful = False  # the next line redoes one that was found wrong
    while True:
        slips = [line.label for line in lines if line.slipped]
        heeded = careful or heed_from <= len(trace.steps) < heed_from + habits.heed_span
        if trace.steps:
            trace.heeded.append(heeded)
        free = bool(lines) and not careful and checks < habits.max_checks
        word = _urge(bool(slips) if heeded else rng.random() < 0.5, rng, habits) if free else ""
        if word:
            checks += 1
            line = lines[_aim(len(lines), slips, rng, habits) if word == LOOK_BACK else -1]
            chance = habits.notices_slip if line.slipped else habits.false_alarm
            found_wrong = rng.random() < chance
            trace.steps.append(f"{word}{line.text}?{'no' if found_wrong else 'ok'}")
            if found_wrong:
                del lines[line.label :]
                careful = True
        elif len(lines) == len(question.operations):
            break
        else:
            line = _write_line(question, lines, careful, rng, habits)
            lines.append(line)
            trace.steps.append(line.text)
            careful = False
        trace.clean.append(not any(line.slipped for line in lines))
    trace.answer = str(lines[-1].after)
    return trace


def _urge(suspicious: bool, rng: random.Random, habits: Habits) -> str:
    """The word that opens a re-check, or nothing: go on."""
    draw = rng.random()
    look_back = habits.look_back[suspicious]
    if draw < look_back:
        return LOOK_BACK
    return CHECK_LAST if draw < look_back + habits.check_last[suspicious] else ""


def _aim(count: int, slips: list[int], rng: random.Random, habits: Habits) -> int:
    if slips and rng.random() < habits.look_back_at_first_slip:
        return slips[0]
    return rng.randrange(max(0, count - habits.look_back_window), count)


def _write_line(
    question: Question, lines: list[Line], careful: bool, rng: random.Random, habits: Habits
) -> Line:
    before = lines[-1].after if lines else question.start
    operation = question.operations[len(lines)]
    raw = operation.raw(before)
    after = raw % MODULUS
    chance = habits.wrong_when_negative if raw < 0 else habits.wrong_multiple[raw // MODULUS]
    if careful:
        chance *= habits.redo_factor
    slips = rng.random() < chance
    if slips and raw // MODULUS and rng.random() >= habits.off_by_some:
        after = raw % (MODULUS - 1)
    multiple = abs(raw - after)
    if slips and multiple % MODULUS == 0:
        after = (after + rng.choice((-3, -2, -1, 1, 2, 3))) % MODULUS
    return Line(len(lines), before, operation, multiple, after)
