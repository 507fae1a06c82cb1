"""From a trace score to the probability that the trace is right, and what that weighs in a vote.

A trace score is a mean of sigmoids, and a mean is timid: traces of .8 are nearly always right, and
those of .2 nearly never. A logistic regression of its logit on held-out questions (Platt scaling,
1999) turns it into a probability p. It keeps the order of scores, so what bounds a trace's score
bounds its probability and its weight too.

In a vote a trace weighs its odds, p / (1 - p). Being right is a draw with the mean p and the
variance p (1 - p), and a sum of noisy readings stands out most from its noise where each is weighed
by its mean over its variance, which is about that (it is also p squared over the variance: a
trace's signal-to-noise ratio). The odds are cut off at 9 to 1, because some dozens of questions
cannot tell .9 from .99, and because votes with bounded weights can be settled early; and divided by
that, so that weights are in (0, 1] as trace scores are. Which weight was better on training
questions: docs/training.md.
Knows nothing of torch, files or servers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from step_sglang.errors import ScorerError, safe_repr

VERSION = 1
ANSWERS, VOTE = LABELS = ("answers", "vote")  # where the label of a trace comes from
MOST = 0.9  # probability beyond which a trace weighs no more
_EDGE = 1e-4  # scores are kept so far from 0 and 1, where the logit ends
UNSCORED = 0.5  # of a trace without a step: the sigmoid's value at no evidence


def logit(score: float) -> float:
    """Of a score in [0, 1], which is kept off both ends."""
    kept = min(max(score, _EDGE), 1 - _EDGE)
    return math.log(kept / (1 - kept))


@dataclass(frozen=True)
class TraceCalibration:
    """P(right) = sigmoid(slope * logit(trace score) + bias).

    Raises:
        ScorerError: the slope is negative, or a number is not finite.
    """

    slope: float  # at least 0; 0: the score says nothing
    bias: float
    questions: int | None = None  # that it was fitted on
    traces: int | None = None
    labels: str | None = None  # whence theirs came, answers or vote; None in older files
    held_out: bool = False  # it is known that none of the questions trained the scorer

    def __post_init__(self) -> None:
        for name, value in (("slope", self.slope), ("bias", self.bias)):
            if not _is_number(value):
                raise ScorerError(
                    f"a calibration's {name} must be a finite number, not {safe_repr(value)}"
                )
        if self.slope < 0:
            raise ScorerError(f"a calibration's slope must not be negative, as {self.slope} is")

    def probability(self, score: float | None) -> float:
        """That a finished trace of this score is right, above 0 and below 1; never falls with it.

        Args:
            score: of the trace; None: it has no step.
        """
        z = self.slope * logit(UNSCORED if score is None else score) + self.bias
        # By the sign, so that no exponential overflows.
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))

    def weight(self, score: float | None) -> float:
        """Its capped odds, as a share of the cap's; in (0, 1], and never falls with the score."""
        p = min(self.probability(score), MOST)
        return min(1.0, p / (1 - p) * (1 - MOST) / MOST)

    def as_json(self) -> dict[str, Any]:
        """As a scorer file states it."""
        value: dict[str, Any] = {"version": VERSION, "slope": self.slope, "bias": self.bias}
        for name in ("questions", "traces"):
            if (count := getattr(self, name)) is not None:
                value[name] = count
        if self.labels is not None:
            value["labels"] = self.labels
        if self.held_out:
            value["held_out"] = True
        return value

    @property
    def pair(self) -> tuple[float, float]:
        """As a response states it, see :func:`calibration_of`."""
        return self.slope, self.bias


def calibration_from_json(value: object) -> TraceCalibration:
    """The inverse of :meth:`TraceCalibration.as_json`.

    Raises:
        ScorerError: it is none, or of a later version.
    """
    if not isinstance(value, dict) or value.get("version") != VERSION:
        found = value.get("version") if isinstance(value, dict) else value
        raise ScorerError(f"a calibration of version {safe_repr(found)}; this reads {VERSION}")
    counts = [value.get(name) for name in ("questions", "traces")]
    if not all(c is None or (type(c) is int and c >= 0) for c in counts):
        raise ScorerError("a calibration's questions and traces must be counts")
    labels, held_out = value.get("labels"), value.get("held_out", False)
    if labels not in (None, *LABELS) or not isinstance(held_out, bool):
        raise ScorerError(
            f"a calibration's labels must be one of {', '.join(LABELS)}, and held_out true or false"
        )
    questions, traces = counts
    return TraceCalibration(
        value.get("slope"), value.get("bias"), questions, traces, labels, held_out  # type: ignore[arg-type]
    )  # fmt: skip


def calibration_of(pair: Sequence[float] | None) -> TraceCalibration | None:
    """Of the slope and bias that a response or a record holds; None without them.

    Raises:
        ScorerError, TypeError: they are no such pair.
    """
    if pair is None:
        return None
    slope, bias = pair
    return TraceCalibration(slope, bias)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
