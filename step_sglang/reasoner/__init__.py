"""The embedded reasoners: small trained models on which STEP can be tried without a download.

`reasoner`, and `reasoner-dwelling`, whose wrong traces tend to be the longer ones.
"""

from __future__ import annotations

from pathlib import Path

from step_sglang.reasoner.task import Question, questions

__all__ = ["NAME", "NAME_DWELLING", "Question", "model_path", "questions", "scorer_path"]

NAME, NAME_DWELLING = "reasoner", "reasoner-dwelling"
_FOLDER = Path(__file__).parent
_FILES = {
    NAME: ("model", "scorer.safetensors"),
    NAME_DWELLING: ("dwelling", "dwelling_scorer.safetensors"),
}


def model_path(name: str = NAME) -> Path:
    """The folder of a shipped model, ready for `--model-path`."""
    return _FOLDER / _FILES[name][0]


def scorer_path(name: str = NAME) -> Path:
    """The scorer trained for it, ready for `--step-scorer`."""
    return _FOLDER / _FILES[name][1]
