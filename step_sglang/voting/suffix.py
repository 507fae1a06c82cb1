"""What a question ends with unless the caller says otherwise, so that every trace boxes its answer.

The same words in `ask`, `solve`, one-choice answers, `bench` and `collect`: a scorer is trained on
the prompts that it will see.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "reasoner"  # not imported: it is a room above
_REASONERS = {"reasoner": _FOLDER / "model", "reasoner-dwelling": _FOLDER / "dwelling"}
BOXED_SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def reasoner_name(model: str) -> str | None:
    """The name of the embedded reasoner whose name or path this is; None for another model."""
    if model in _REASONERS:
        return model
    path = Path(model).resolve()
    return next((name for name, folder in _REASONERS.items() if folder.resolve() == path), None)


def is_reasoner(model: str) -> bool:
    """Whether a model's name or path is an embedded reasoner's."""
    return reasoner_name(model) is not None


def default_suffix(model: str, extract: object = "boxed") -> str:
    """What to append to a question of this model.

    Nothing for the embedded reasoner, which knows its own questions alone, and nothing where the
    answer is not read from a box.
    """
    return BOXED_SUFFIX if extract == "boxed" and not is_reasoner(model) else ""


def needs_suffix(texts: Iterable[str]) -> bool:
    """Whether none of a chat's texts asks for a box already."""
    return not any("\\boxed" in text for text in texts)
