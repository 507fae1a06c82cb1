"""Step scores of a server without a scorer: how certain the model was of its own tokens.

A step's score is the probability of the likeliest next token where the model was least certain in
that step. It needs no training, lies in (0, 1] as a scorer's does, and a trace's running mean of it
is its trace score. Which of several such signals ranks best was measured: docs/training.md.
Knows nothing of SGLang or torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CANDIDATES = 1  # of the token confidence: minus the log-probability of the likeliest token


@dataclass(slots=True)
class Certainty:
    """The tokens of one trace since its last step boundary."""

    _doubt: float = -1.0  # the largest confidence value, which is that of the least certain token

    def add(self, confidence: float) -> None:
        """Take over an output token.

        Args:
            confidence: over :data:`CANDIDATES` candidates, nats; NaN where the logits were not
                finite, which counts as nothing.
        """
        self._doubt = max(self._doubt, confidence)

    def end_step(self) -> float | None:
        """The score of the step whose last token was added; None if no token of it was."""
        doubt, self._doubt = self._doubt, -1.0
        return None if doubt < 0 else math.exp(-doubt)
