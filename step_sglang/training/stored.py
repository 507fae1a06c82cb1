"""What a store holds, as values: how it was collected, its questions and their traces.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class StoreMeta:
    """How a store was collected. A folder takes traces of equal settings only."""

    model: str
    hidden_size: int
    n: int  # traces per question
    source: str
    sampling: Mapping[str, Any] = field(default_factory=dict)  # JSON values only
    delimiters: tuple[str, ...] = ("\n\n",)
    think_end: str | None = "</think>"  # None: steps after the thinking are kept too
    dtype: str = "float16"  # of the hidden states on disk
    confidence_window: int = 2048  # tokens of a DeepConf group
    revision: str | None = None  # the model's commit, where it is known
    version: int = VERSION

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "delimiters": list(self.delimiters)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StoreMeta:
        """The inverse of :meth:`as_json`; raises KeyError, TypeError or ValueError."""
        known = {option.name for option in fields(cls)}
        if not set(value) <= known:
            raise ValueError(f"unknown members {sorted(set(value) - known)}")
        meta = cls(**{**value, "delimiters": tuple(value["delimiters"])})
        if meta.version != VERSION:
            raise ValueError(f"version {meta.version}; this reads version {VERSION}")
        if meta.dtype not in DTYPES or meta.hidden_size < 1 or meta.n < 1:
            raise ValueError("dtype, hidden_size or n is out of range")
        return meta


@dataclass(frozen=True, eq=False)
class Steps:
    """One trace's steps, in order. S = number of steps; all arrays are [S].

    Log-probabilities are natural; a confidence is in nats too (arXiv 2508.15260, section 3).
    """

    positions: NDArray[np.int32]  # output token index of each boundary token
    mean_logprob: NDArray[np.float32]  # of all tokens up to and including the boundary
    lowest_confidence: NDArray[np.float32]  # lowest group confidence so far; NaN if not measured

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class StoredTrace:
    """One trace: a line of the index."""

    question_id: str
    sample: int  # 0 to n - 1
    question: str
    answer: str  # the gold answer
    extracted: str | None  # the trace's answer; None when it did not finish or boxed nothing
    correct: bool
    num_tokens: int
    finish: str  # SGLang's finish reason type: stop or length
    shard: int
    first_row: int  # of `hidden` in the shard; the trace's rows follow each other
    steps: Steps
    mean_logprob: float | None  # over the whole trace
    lowest_confidence: float | None
    text: str | None = None
    tokens: tuple[int, ...] | None = None  # the output's; kept with the text

    @property
    def num_steps(self) -> int:
        """Rows this trace has in its shard."""
        return len(self.steps)

    def as_json(self) -> dict[str, Any]:
        """JSON values; floats keep the precision of fp32."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "steps"}
        return {
            **plain,
            "num_steps": self.num_steps,
            "positions": self.steps.positions.tolist(),
            "step_mean_logprob": _rounded(self.steps.mean_logprob),
            "step_lowest_confidence": _rounded(self.steps.lowest_confidence),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], with_text: bool = False) -> StoredTrace:
        """The inverse of :meth:`as_json`; raises KeyError, TypeError or ValueError."""
        steps = Steps(
            np.asarray(value["positions"], np.int32),
            _floats(value["step_mean_logprob"]),
            _floats(value["step_lowest_confidence"]),
        )
        lengths = {len(steps.positions), len(steps.mean_logprob), len(steps.lowest_confidence)}
        if lengths != {value["num_steps"]}:
            raise ValueError(f"per-step lists of lengths {sorted(lengths)}")
        optional = ("steps", "text", "tokens")
        plain = {f.name: value[f.name] for f in fields(cls) if f.name not in optional}
        if not with_text:
            return cls(**plain, steps=steps)
        tokens = value.get("tokens")
        kept = None if tokens is None else tuple(tokens)
        return cls(**plain, steps=steps, text=value.get("text"), tokens=kept)


@dataclass(frozen=True, eq=False)
class StoredQuestion:
    """All n traces of one question, which are written together.

    The store sets ``shard`` and ``first_row`` of the traces.
    """

    traces: tuple[StoredTrace, ...]
    hidden: torch.Tensor  # [sum of num_steps, d], rows in the order of the traces


def _rounded(values: NDArray[np.float32]) -> list[float | None]:
    # NaN is not JSON: an unmeasured value is null.
    return [None if np.isnan(v) else float(f"{v:.7g}") for v in values]


def _floats(values: list[float | None]) -> NDArray[np.float32]:
    return np.asarray([np.nan if v is None else v for v in values], np.float32)
