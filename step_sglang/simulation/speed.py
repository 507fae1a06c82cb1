"""How long the engine's passes take where its tokens are units of several real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from step_sglang.simulation.gpu import StepTime


@dataclass(frozen=True)
class Speed:
    """Seconds of the engine's passes. A token of it stands for ``unit`` real ones.

    So a decode step stands for ``unit`` steps, in which all rows attend to ``unit`` times as many
    tokens; a prefill is one pass all the same. ``overhead``: seconds of a question outside its
    passes, which no clock of the engine has.
    """

    time: StepTime
    unit: int = 1
    overhead: float = 0.0

    def decode(self, rows: int, attended: float) -> float:
        """A decode step of so many rows, which attend to so many of the engine's tokens."""
        return self.unit * self.time.decode(rows, attended * self.unit)

    def prefill(self, new: Sequence[int], total: Sequence[int]) -> float:
        """A pass that computes ``new`` of the ``total`` tokens of each request."""
        pairs = sum(n * (t - n / 2) for n, t in zip(new, total, strict=True))
        return self.time.prefill(len(new), sum(new) * self.unit, pairs * self.unit**2)

    def write(self, file: Path) -> None:
        """Put it where the engine's processes find it."""
        file.write_text(json.dumps({"unit": self.unit, "time": self.time.as_json()}))

    @classmethod
    def read(cls, file: Path) -> Speed:
        """What :meth:`write` wrote."""
        value = json.loads(file.read_text())
        return cls(StepTime(**value["time"]), value["unit"])
