"""What a question ends with unless the caller says otherwise, so that every trace boxes its answer.

The same words in `ask`, `solve`, one-choice answers, `bench` and `collect`: a scorer is trained on
the prompts that it will see.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_REASONER = Path(__file__).parents[1] / "reasoner" / "model"  # not imported: it is a room above
BOXED_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def is_reasoner(model: str) -> bool:
    """Whether a model's name or path is the embedded reasoner's."""
    return model == "reasoner" or Path(model).resolve() == _REASONER.resolve()


def default_suffix(model: str, extract: object = "boxed") -> str:
    """What to append to a question of this model.

    Nothing for the embedded reasoner, which knows its own questions alone, and nothing where the
    answer is not read from a box.
    """
    return BOXED_SUFFIX if extract == "boxed" and not is_reasoner(model) else ""


def needs_suffix(texts: Iterable[str]) -> bool:
    """Whether none of a chat's texts asks for a box already."""
    return not any("\\boxed" in text for text in texts)
