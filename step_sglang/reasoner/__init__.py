"""The embedded reasoner: a small trained model on which STEP can be tried without a download."""

from __future__ import annotations

from pathlib import Path

from step_sglang.reasoner.task import Question, questions

__all__ = ["Question", "model_path", "questions", "scorer_path"]


def model_path() -> Path:
    """The folder of the shipped model, ready for `--model-path`."""
    return Path(__file__).parent / "model"


def scorer_path() -> Path:
    """The scorer trained for the shipped model, ready for `--step-scorer`."""
    return Path(__file__).parent / "scorer.safetensors"
