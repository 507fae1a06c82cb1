"""Hidden states at a trace's step boundaries, kept for training a scorer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True, eq=False)
class Capture:
    """The hidden states that one trace captures.

    ``prompt_tokens`` None: its own generated steps. P: those of the trace that its input holds
    from token P on, taken while the input is prefilled, at the positions ``wanted``.
    """

    width: int  # D of the model
    dtype: torch.dtype
    prompt_tokens: int | None = None
    wanted: tuple[int, ...] = ()
    rows: list[torch.Tensor] = field(default_factory=list)  # each [D], on the host

    def keep_prefilled(self, position: int, hidden: torch.Tensor) -> None:
        """Keep the [D] hidden state of the boundary token at ``position`` of the input.

        A retracted request is prefilled again; what it has already is not kept twice.
        """
        done = len(self.rows)
        if done < len(self.wanted) and position == self.wanted[done]:
            self.rows.append(hidden)

    def encode(self) -> dict[str, Any]:
        """JSON form: dtype, shape [num_steps, D], and the raw little-endian bytes as base64."""
        stacked = (
            torch.stack(self.rows) if self.rows else torch.empty(0, self.width, dtype=self.dtype)
        )
        # numpy has no bf16: the bytes go out through a type of the same size.
        raw = stacked.contiguous().view(torch.uint8).numpy().tobytes()
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(stacked.shape),
            "data": base64.b64encode(raw).decode("ascii"),
        }


def decode(value: dict[str, Any]) -> torch.Tensor:
    """[num_steps, D] tensor from its JSON form.

    Raises:
        ValueError: the bytes do not fit the dtype and shape.
    """
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(
        value["dtype"]
    )
    raw = base64.b64decode(value["data"], validate=True)
    rows, width = value["shape"]
    if dtype is None or len(raw) != rows * width * dtype.itemsize:
        raise ValueError(
            f"hidden states of dtype {value['dtype']!r} and shape {value['shape']} cannot have "
            f"{len(raw)} bytes"
        )
    if rows == 0:
        return torch.empty(0, width, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(rows, width)


def boundary_positions(
    tokens: Sequence[int], start: int, boundaries: frozenset[int], think_end_id: int | None
) -> tuple[int, ...]:
    """Positions of the boundary tokens of a finished trace that begins at ``start``.

    Up to its first think-end token, as the op scores a trace that is being generated.
    """
    positions = []
    for position in range(start, len(tokens)):
        if tokens[position] == think_end_id:
            break
        if tokens[position] in boundaries:
            positions.append(position)
    return tuple(positions)
