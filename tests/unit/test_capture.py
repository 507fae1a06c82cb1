"""Hidden states on their way to the client."""

from __future__ import annotations

import json

import pytest
import torch

from step_sglang.scoring.capture import Capture, boundary_positions, decode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_round_trip_through_json(dtype: torch.dtype, rows: int) -> None:
    hidden = torch.randn(rows, 24).to(dtype)
    capture = Capture(24, dtype, rows=list(hidden))
    decoded = decode(json.loads(json.dumps(capture.encode())))
    assert decoded.dtype == dtype and torch.equal(decoded, hidden)


def test_bytes_that_do_not_fit() -> None:
    value = Capture(8, torch.float32, rows=[torch.zeros(8)]).encode()
    for wrong in ({"shape": [2, 8]}, {"dtype": "float64"}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match="cannot have 32 bytes"):
            decode({**value, **wrong})


def test_boundaries_of_a_finished_trace() -> None:
    tokens = [5, 1, 5, 2, 5, 9, 5]
    assert boundary_positions(tokens, 1, frozenset({5}), None) == (2, 4, 6)
    assert boundary_positions(tokens, 1, frozenset({5}), 9) == (2, 4)
    assert boundary_positions(tokens, 7, frozenset({5}), 9) == ()


def test_prefilled_rows_are_kept_once_and_in_order() -> None:
    capture = Capture(1, torch.float32, prompt_tokens=2, wanted=(3, 5))
    for position in (3, 3, 5, 3, 5):  # a retraction starts the prefill again
        capture.keep_prefilled(position, torch.tensor([float(position)]))
    assert torch.stack(capture.rows).flatten().tolist() == [3.0, 5.0]
