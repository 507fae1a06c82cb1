"""The paper's benchmarks by name: where each is, and how multiple choice becomes a question.

GPQA's authors ask that its questions are not published in plain text, so no file of it belongs in a
repository; it comes from Hugging Face (after its terms were accepted there) or from a local file.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_CORRECT = "Correct Answer"
_INCORRECT = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_SEED = 0  # of the letters
_ASK = "Answer with the letter of the correct choice."


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. ``file``: its JSON lines of question and answer, in a folder of such files."""

    file: str
    hub: str  # name on Hugging Face
    config: str | None = None
    split: str = "train"
    question: str = "problem"
    answer: str = "answer"
    choices: bool = False


BENCHMARKS = {
    "aime-25": Benchmark("aime_2025.jsonl", "MathArena/aime_2025"),
    "hmmt-24": Benchmark("hmmt_2024.jsonl", "MathArena/hmmt_feb_2024"),
    "hmmt-25": Benchmark("hmmt_2025.jsonl", "MathArena/hmmt_feb_2025"),
    "gpqa-diamond": Benchmark(
        "gpqa_diamond.jsonl", "Idavidrein/gpqa", config="gpqa_diamond", choices=True
    ),
}


def with_choices(row: Any) -> Any:
    """The row with its choices listed in the question, and a letter as the answer.

    The order is shuffled by a fixed seed and the question's text, so it is the same in every run,
    for every method, on every machine. Takes GPQA's own columns; a row that has the choices in its
    question and a letter as its answer stays as it is.
    """
    if not isinstance(row, Mapping) or _CORRECT not in row:
        return row
    texts = [row.get(name) for name in (_CORRECT, *_INCORRECT)]
    question = row.get("Question", row.get("question"))
    if not isinstance(question, str) or not all(isinstance(t, str) and t.strip() for t in texts):
        return None
    order = list(range(len(texts)))
    random.Random(f"{_SEED}/{question}").shuffle(order)
    lines = [f"{'ABCD'[at]}) {str(texts[index]).strip()}" for at, index in enumerate(order)]
    return {
        "question": "\n".join([question.strip(), "", *lines, "", _ASK]),
        "answer": "ABCD"[order.index(0)],
    }
