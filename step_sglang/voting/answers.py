r"""Extracts a trace's answer from its text and tells whether two answers are the same."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache

from step_sglang.errors import VoteError, safe_repr
from step_sglang.protocol import EXTRACTORS

Extractor = Callable[[str], str | None]
MAX_LENGTH = 1000  # characters; a longer answer equals only its own text
_BOX = r"\boxed{"
_STYLE = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Z])[.):]?")
# Each run of spaces is matched in one way only: the text is a model's, of any length.
_STATED_CHOICE = re.compile(
    r"(?:answer|choice|option)\s*(?:(?:is|:)\s*)?(?::\s*)?(?:\*+\s*)?\(?([A-Z])\)?(?![A-Za-z])",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\boxed\{|[{}]")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, braces balanced, or None."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    last = _closed_box(text[start : start + len(_BOX) + 4 * MAX_LENGTH])
    if last is None:  # seldom; a pass over the whole text, for it may hold thousands of open boxes
        last = _closed_box(text)
    return last.strip() or None if last is not None else None


def _closed_box(text: str) -> str | None:
    """The content of the last box that is closed, within a bounded length; linear in the text."""
    opened: list[int | None] = []  # where the content of each open brace begins, None: no box
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if match[0] == _BOX else None)
        elif opened:
            begin, end = opened.pop(), match.start()
            if begin is not None and end - begin < 4 * MAX_LENGTH:
                last = max(last or (0, 0), (begin, end))
    return None if last is None else text[last[0] : last[1]]


def extract_choice(text: str) -> str | None:
    r"""The letter of a multiple-choice answer: a boxed one, else the last "answer is (B)"."""
    boxed = extract_boxed(text)
    letter = None if boxed is None else choice_letter(boxed)
    if letter is not None:
        return letter
    stated = [letter for letter in _STATED_CHOICE.findall(text) if letter.isupper()]
    return stated[-1] if stated else None


def extract_number(text: str) -> str | None:
    """The boxed answer, else the last number of the text, without thousands separators."""
    boxed = extract_boxed(text)
    if boxed is not None:
        return boxed
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


_EXTRACTORS: dict[str, Extractor] = dict(
    zip(EXTRACTORS, (extract_boxed, extract_choice, extract_number), strict=True)
)


def extractor_named(name: object) -> Extractor:
    """The built-in extractor of that name; raises VoteError."""
    if not isinstance(name, str) or name not in EXTRACTORS:
        raise VoteError(
            f"unknown answer extractor {safe_repr(name)}; it must be one of {', '.join(EXTRACTORS)}"
        )
    return _EXTRACTORS[name]


def choice_letter(answer: str) -> str | None:
    r"""The letter of ``B``, ``(B)``, ``B.``, ``(b)``, ``\text{B}``; None for anything else."""
    bare = _STYLE.sub(r"\1", answer).strip()
    match = _CHOICE.fullmatch(bare)
    return (match[1] or match[2]).upper() if match else None


def quickly_equivalent(one: str, other: str) -> bool | None:
    """Whether two answers mean the same, where that is plain; None: only math-verify can tell."""
    one, other = one.strip(), other.strip()
    if one == other:
        return True
    if max(len(one), len(other)) > MAX_LENGTH:
        return False
    letters = choice_letter(one), choice_letter(other)
    if None not in letters:
        return letters[0] == letters[1]
    numbers = plain_number(one), plain_number(other)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return None


def equivalent(one: str, other: str) -> bool:
    """Whether two answers mean the same, by text or by math-verify (``1/2`` and ``0.5``).

    Without a time limit: for answers of unknown origin see
    :class:`step_sglang.voting.verifier.AnswerVerifier`.
    """
    quick = quickly_equivalent(one, other)
    if quick is not None:
        return quick
    from math_verify import verify

    try:
        a, b = parsed(one.strip()), parsed(other.strip())
    except Exception:  # math-verify meets arbitrary text
        return False
    # verify() is not symmetric in what it accepts; an answer must match either way.
    return bool(verify(a, b, timeout_seconds=None) or verify(b, a, timeout_seconds=None))


def plain_number(answer: str) -> Decimal | None:
    """The value of ``12``, ``-0.5`` and the like, None for anything else."""
    if not re.fullmatch(r"[+-]?\d{1,30}(?:\.\d{1,30})?", answer, re.ASCII):
        return None
    return Decimal(answer)


@lru_cache(maxsize=1024)
def parsed(answer: str) -> list[object]:
    """What math-verify makes of an answer: an expression, its normal text, both or neither.

    Imported here, because the parent of a child that compares never parses. What math-verify raises
    passes.
    """
    from math_verify import parse

    # It warns whenever it runs without its own timer, a signal, which only a main thread may set.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    found: list[object] = parse(f"${answer}$", parsing_timeout=None, raise_on_error=True)
    return found
