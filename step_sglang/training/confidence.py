"""Baseline signals from a trace's log-probabilities: running mean, lowest group confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TokenSignals:
    """Per token of the output, [T] each, over all tokens up to and including it."""

    mean_logprob: NDArray[np.float64]
    lowest_confidence: NDArray[np.float64]


def token_signals(
    logprobs: Sequence[float], confidences: Sequence[float], window: int
) -> TokenSignals:
    """Running signals of one trace.

    Args:
        logprobs: [T] natural log-probability of every sampled token.
        confidences: [T] token confidence, minus the mean log-probability of the k most likely
            candidates (DeepConf, arXiv 2508.15260, eq. 2); NaN where not measured.
        window: tokens of a group. A group's confidence is the mean over its tokens; the first
            group is complete after ``window`` tokens, until then it is what there is of it.
    """
    count = np.arange(1, len(logprobs) + 1)
    mean_logprob = np.cumsum(np.asarray(logprobs, np.float64)) / count
    total = np.concatenate([[0.0], np.cumsum(np.asarray(confidences, np.float64))])
    ends = count
    starts = np.maximum(ends - window, 0)
    group = (total[ends] - total[starts]) / (ends - starts)
    lowest = group.copy()
    # Only complete groups compete: the mean of two tokens is noise, not a low point.
    if len(group) > window:
        lowest[window - 1 :] = np.minimum.accumulate(group[window - 1 :])
    return TokenSignals(mean_logprob, lowest)
