"""Canonical forms sort answers as math-verify does, pair by pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.voting import classes
from step_sglang.voting.answers import equivalent
from step_sglang.voting.classes import (
    AnswerClasses,
    FormQuestion,
    PairQuestion,
    PairwiseClasses,
    Question,
    Reply,
    reply_to,
    run_here,
)
from step_sglang.voting.forms import Form, form_of

# As models write them; answers of one line mean the same.
EQUALS = r"""
B | (B) | B. | \text{(b)} | \textbf{B}
C | \mathrm{C}
12 | 12.0 | \frac{24}{2} | x=12 | 12\text{ cm} | +12 | 3\cdot 4 | 144^{1/2}
1000 | 1{,}000 | 10^3
1/2 | 0.5 | \frac{1}{2} | \dfrac12 | 2/4 | 0.50
1/3 | \frac{1}{3} | 0.333333
-\frac{13}{96} | -13/96
0.25 | 25\%
\sqrt{4} | 2 | \{2\}
2\sqrt{3} | \sqrt{12} | \frac{6}{\sqrt{3}}
\sqrt{23}-2\sqrt{3} | -2\sqrt{3}+\sqrt{23}
1-\frac{2}{\pi} | \frac{\pi-2}{\pi}
2^{25}\cdot 26! | 26!\cdot 2^{25}
\frac{-1+\sqrt{17}}{2},\frac{-1-\sqrt{17}}{2} | \frac{-1\pm\sqrt{17}}{2}
0,i\sqrt{6},-i\sqrt{6} | -i\sqrt{6},0,i\sqrt{6}
x+1 | 1+x | \frac{2x+2}{2}
\sin^2(x)+\cos^2(x) | 1 | x=1
x^2-1 | (x-1)(x+1)
(1,3) | \left(1,3\right)
[1,3) | \left[1, 3\right)
(-\infty,3] | x\in(-\infty,3]
\{1,5\} | 1,5 | \{5,1\}
(1,2,7) | \left(1,2,7\right)
1<x<4
x\le 7 | 7\ge x
2x+y=4 | y+2x=4
\text{Tuesday} | \text{tuesday}
\text{blue}
f(x)=x^3 | x^3
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\\frac{4}{2}\end{pmatrix}
\infty
\emptyset
\frac{1}{0}
7:9 | \frac{7}{9}
123456789012 | 123456789012.0
0.1234567
0.1234568
no answer at all
\frac{1}{
"""
LINES = [line.split(" | ") for line in EQUALS.strip().splitlines()]
SPELLINGS = [answer for line in LINES for answer in line]


def partition(answers: Sequence[str], sorter: AnswerClasses | PairwiseClasses) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for answer in answers:
        found.setdefault(run_here(sorter.find(answer)), []).append(answer)
    return list(found.values())


def pairwise(answers: Sequence[str]) -> list[list[str]]:
    """The specification: math-verify for every answer and every class before it."""
    return partition(answers, PairwiseClasses(known))


_known: dict[tuple[str, str], bool] = {}


def known(one: str, other: str) -> bool:
    if (one, other) not in _known:
        _known[one, other] = equivalent(one, other)
    return _known[one, other]


@pytest.mark.timeout(900)
def test_no_form_contradicts_math_verify() -> None:
    """All pairs of a line, and every fifth pair of different lines: the comparisons take long."""
    wrong = []
    for place, line in enumerate(LINES):
        pairs = [(one, other) for i, one in enumerate(line) for other in line[i + 1 :]]
        others = [other for before in LINES[:place] for other in before]
        pairs += [(one, other) for i, one in enumerate(line) for other in others[i + place :: 5]]
        for one, other in pairs:
            same = len(partition([other, one], AnswerClasses())) == 1
            if same != known(other, one):
                wrong.append((other, one, same))
    assert not wrong


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(SPELLINGS), max_size=12))
def test_the_classes_are_those_of_the_comparison_of_all_pairs(answers: list[str]) -> None:
    assert partition(answers, AnswerClasses()) == pairwise(answers)


NUMBERS = st.one_of(
    st.integers(-30, 30).map(str),
    st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda p: f"\\frac{{{p[0]}}}{{{p[1]}}}"),
    st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda p: f"{p[0]}/{p[1]}"),
    st.decimals(-9, 9, places=2).map(str),
    st.integers(0, 12).map(lambda n: f"\\sqrt{{{n}}}"),
    st.tuples(st.integers(1, 4), st.integers(1, 12)).map(lambda p: f"{p[0]}\\sqrt{{{p[1]}}}"),
    st.integers(0, 300).map(lambda n: f"{n}\\%"),
)
ANSWERS = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, min_size=1, max_size=3).map(", ".join),
    st.tuples(NUMBERS, NUMBERS).map(lambda p: f"({p[0]}, {p[1]})"),
    st.tuples(NUMBERS, NUMBERS).map(lambda p: f"[{p[0]}, {p[1]}]"),
    NUMBERS.map(lambda n: f"x = {n}"),
    NUMBERS.map(lambda n: f"{n} + x"),
    NUMBERS.map(lambda n: f"x + {n}"),
    st.sampled_from(["A", "(A)", "b", "\\text{yes}", "\\text{no}", "x < 3", "3 > x"]),
)


@pytest.mark.timeout(900)
@settings(max_examples=40, deadline=None)
@given(st.lists(ANSWERS, max_size=6))
def test_random_answers_too(answers: list[str]) -> None:
    assert partition(answers, AnswerClasses()) == pairwise(answers)


def counted(answers: Sequence[str]) -> tuple[int, Counter[type]]:
    """Classes, and how many questions of each kind it took."""
    asked: Counter[type] = Counter()
    sorter = AnswerClasses()
    names = set()
    for answer in answers:
        steps = sorter.find(answer)
        reply: Reply = None
        try:
            while True:
                question = steps.send(reply)
                asked[type(question)] += 1
                reply = reply_to(question)
        except StopIteration as end:
            names.add(end.value)
    return len(names), asked


@pytest.mark.parametrize(
    ("spell", "pairs"),
    [
        (lambda i: f"\\frac{{{i}}}{{257}}", 0),
        (lambda i: f"\\sqrt{{{i}}}+\\pi", 0),
        (lambda i: f"x+{i}", 0),
        (lambda i: f"({i},{i + 1})", 0),
        (lambda i: f"\\text{{name {'abcdefghijklmnop'[i % 16] * (i // 16 + 1)}}}", 0),
    ],
)
def test_distinct_answers_are_parsed_once_and_not_compared(spell, pairs: int) -> None:  # type: ignore[no-untyped-def]
    answers = [spell(i) for i in range(1, 257)]
    number, asked = counted(answers)
    assert number == 256
    assert asked[FormQuestion] == 256 and asked[PairQuestion] <= pairs


def test_equal_answers_take_one_comparison_each_at_most() -> None:
    answers = [f"\\frac{{{i}\\sqrt{{2}}}}{{{i}}}" for i in range(1, 65)]
    number, asked = counted(answers)
    assert number == 1 and asked[FormQuestion] == 64 and asked[PairQuestion] <= 63


def test_plain_numbers_and_letters_are_not_parsed() -> None:
    for answers in ([str(i) for i in range(256)], ["A", "(B)", "B.", "C", "12", "0.5"]):
        assert counted(answers)[1][FormQuestion] == 0


def test_what_cannot_be_told_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(question: Question) -> Form | bool | None:
        if isinstance(question, PairQuestion):
            return None
        return None if "9^" in question.answer else form_of(question.answer)

    monkeypatch.setattr(classes, "reply_to", none)
    sorter = AnswerClasses()
    assert partition(["9^{9^{9}}", "1/3", "9^{9^{9}}", "\\frac13"], sorter) == [
        ["9^{9^{9}}", "9^{9^{9}}"], ["1/3", "\\frac13"],
    ]  # fmt: skip
    assert sorter.text_only == 1
    assert len(partition(["\\sqrt{12}", "2\\sqrt{3}"], sorter)) == 2 and sorter.text_only == 2
