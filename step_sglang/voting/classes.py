"""Sorts answers into classes of equals. Asks for what takes long, and never waits for it.

Written as generators that yield questions and are sent the replies, so that the same code runs in
this process, in a thread that waits for a child process, and on an event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from step_sglang.voting.answers import MAX_LENGTH, choice_letter, equivalent
from step_sglang.voting.forms import Form, decide, form_of, plain_form

T = TypeVar("T")
Same = Callable[[str, str], bool]


@dataclass(frozen=True)
class FormQuestion:
    """What is the form of this answer?"""

    answer: str


@dataclass(frozen=True)
class PairQuestion:
    """Are these answers the same, says math-verify?"""

    one: str
    other: str


Question = FormQuestion | PairQuestion
# None: that cannot be told, or not in time.
Reply = Form | bool | None
Steps = Generator[Question, Reply, T]


class AnswerClasses:
    """Classes of equal answers, each named by the first of its answers.

    An answer joins the first class whose name it equals. It is parsed once, and compared by
    math-verify only with the few that its form allows. One whose form cannot be told equals only
    its own text.
    """

    def __init__(self) -> None:
        self._class_of: dict[str, str] = {}  # every answer -> its class
        self._classes: list[tuple[str, Form]] = []
        self._listed: dict[str, list[int]] = {}  # key -> classes, in their order
        self._letters: dict[str, str] = {}  # choice letter -> its class
        # Letters and plain numbers need no parser until anything else comes.
        self._simple = True
        self._unparsed: list[int] = []  # classes of letters
        self._text_only: set[str] = set()

    @property
    def text_only(self) -> int:
        """How many answers were compared as text alone, at least with some others."""
        return len(self._text_only)

    def find(self, answer: str) -> Steps[str]:
        """The class of an answer, a new one if it equals none."""
        if answer not in self._class_of:
            self._class_of[answer] = yield from self._sort(answer)
        return self._class_of[answer]

    def _sort(self, answer: str) -> Steps[str]:
        if len(answer) > MAX_LENGTH:
            return self._add(answer, Form())
        letter = choice_letter(answer)
        if letter is not None:
            if letter in self._letters:
                return self._letters[letter]
            if self._simple:
                self._unparsed.append(len(self._classes))
                self._letters[letter] = self._add(answer, Form())
                return answer
        form = plain_form(answer)
        if form is None:
            yield from self._parse_letters()
            form = yield from self._form(answer)
        found = yield from self._equal(answer, form)
        if found is None:
            found = self._add(answer, form)
        if letter is not None:
            self._letters[letter] = found
        return found

    def _parse_letters(self) -> Steps[None]:
        self._simple = False
        while self._unparsed:
            place = self._unparsed.pop()
            name = self._classes[place][0]
            form = yield from self._form(name)
            self._set_form(place, name, form)

    def _add(self, name: str, form: Form) -> str:
        self._classes.append((name, form))
        self._set_form(len(self._classes) - 1, name, form)
        return name

    def _set_form(self, place: int, name: str, form: Form) -> None:
        self._classes[place] = (name, form)
        for key in form.listed:
            self._listed.setdefault(key, []).append(place)

    def _equal(self, answer: str, form: Form) -> Steps[str | None]:
        for place in sorted({i for key in form.sought for i in self._listed.get(key, ())}):
            name, known = self._classes[place]
            verdict: Reply = decide(known, form)
            if verdict is None:
                verdict = yield PairQuestion(name, answer)
                if verdict is None:
                    self._text_only.add(answer)
            if verdict:
                return name
        return None

    def _form(self, answer: str) -> Steps[Form]:
        reply = yield FormQuestion(answer)
        if isinstance(reply, Form):
            return reply
        self._text_only.add(answer)
        return Form()


def numbered(answers: Sequence[str | None]) -> Steps[list[int]]:
    """Number equal answers alike, from 0 in order of first appearance; -1 for none."""
    classes = AnswerClasses()
    numbers: dict[str, int] = {}
    found = []
    for answer in answers:
        if answer is None:
            found.append(-1)
            continue
        name = yield from classes.find(answer.strip())
        found.append(numbers.setdefault(name, len(numbers)))
    return found


class PairwiseClasses:
    """Classes by a comparison of the caller's: each answer against the name of every class."""

    text_only = 0

    def __init__(self, same: Same) -> None:
        self._same = same
        self._class_of: dict[str, str] = {}
        self._names: list[str] = []

    def find(self, answer: str) -> Steps[str]:
        """The class of an answer, a new one if it equals none."""
        yield from ()
        if answer not in self._class_of:
            name = next((name for name in self._names if self._same(name, answer)), None)
            if name is None:
                self._names.append(answer)
            self._class_of[answer] = answer if name is None else name
        return self._class_of[answer]


def reply_to(question: Question) -> Form | bool:
    """Compute the reply, in this process and without a limit; what math-verify raises passes."""
    if isinstance(question, FormQuestion):
        return form_of(question.answer)
    return equivalent(question.one, question.other)


def run_here(steps: Steps[T]) -> T:
    """Go through all steps in this process: for answers that are known to be harmless."""
    reply: Reply = None
    try:
        question = next(steps)
        while True:
            try:
                reply = reply_to(question)
            except Exception:  # math-verify meets arbitrary text
                reply = None
            question = steps.send(reply)
    except StopIteration as end:
        result: T = end.value
        return result
