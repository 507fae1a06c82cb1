"""Labels by vote: traces of questions whose answers nobody knows, labelled by each other.

In use nobody knows the right answer, but where most traces of a question agree, what they agree on
is probably right. Such questions can train a scorer; the others are left out.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np

from step_sglang.scoring.calibration import LABELS
from step_sglang.training.errors import TrainError
from step_sglang.training.reader import Reader
from step_sglang.training.stored import StoredTrace, StoreMeta
from step_sglang.training.table import answer_classes

LABELS_BY = "labels"  # in a store's settings, where they are not by true answers
AGREEMENT = "agreement"  # likewise, the least that was asked for
DEFAULT_AGREEMENT = 0.5  # measured: docs/training.md


@dataclass(frozen=True)
class Labels:
    """Where the labels of the training questions come from."""

    source: str = "answers"
    agreement: float = DEFAULT_AGREEMENT  # with vote: the least share of all traces of a question

    def __post_init__(self) -> None:
        if self.source not in LABELS:
            raise TrainError(f"--labels must be one of {', '.join(LABELS)}, not {self.source!r}")
        if not 0 < self.agreement <= 1:
            raise TrainError(
                f"--agreement must be a share above 0 and at most 1, not {self.agreement}"
            )

    def reader(self, folder: str | os.PathLike[str], skip_bad: bool = False) -> Reader:
        """Read a store with these labels.

        Raises:
            StoreError: as for :class:`Reader`.
            TrainError: no question's traces agree so far.
        """
        if self.source == "answers":
            return Reader(folder, skip_bad)
        return VotedReader(folder, self.agreement, skip_bad)


def labels_of(meta: StoreMeta) -> Labels:
    """Where the labels that a store holds come from."""
    source = meta.sampling.get(LABELS_BY, "answers")
    return Labels(source, meta.sampling.get(AGREEMENT, DEFAULT_AGREEMENT))


class VotedReader(Reader):
    """A store's questions whose traces agree, a trace being "correct" if it has their answer."""

    def __init__(
        self, folder: str | os.PathLike[str], agreement: float, skip_bad: bool = False
    ) -> None:
        super().__init__(folder, skip_bad)
        every = len(self._shards)
        voted = {shard: relabelled(traces, agreement) for shard, traces in self._shards.items()}
        self._shards = {shard: traces for shard, traces in voted.items() if traces is not None}
        if not self._shards:
            raise TrainError(
                f"{every} questions are in {self.folder}, and of none a share of {agreement:g} of "
                "the traces agrees on an answer: lower --agreement, or collect more"
            )


def relabelled(traces: tuple[StoredTrace, ...], agreement: float) -> tuple[StoredTrace, ...] | None:
    """The traces of one question labelled by their vote; None where too few agree.

    Args:
        traces: all of one question; those without an answer count as disagreeing.
        agreement: the least share of them that must give the leading answer.
    """
    classes = answer_classes([trace.extracted for trace in traces])
    answered = classes[classes >= 0]
    if not len(answered):
        return None
    counts = np.bincount(answered)
    if counts.max() < agreement * len(traces):
        return None
    winner = int(counts.argmax())
    return tuple(
        replace(trace, correct=bool(c == winner)) for trace, c in zip(traces, classes, strict=True)
    )
