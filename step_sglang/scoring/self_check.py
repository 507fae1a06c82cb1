"""Proves the op on the device that will run it, at every start. Owns the sample and the verdict."""

from __future__ import annotations

from typing import Any

import torch

from step_sglang.errors import StepError
from step_sglang.scoring import reference
from step_sglang.scoring.op import SCORE_SUM, cpu_isa, library, step_score_, workspace_size
from step_sglang.scoring.slots import SlotReset, SlotState, packed_resets

TOLERANCE = 1e-4  # of scores, which are in (0, 1); float32 sums in another order differ by 1e-6
_SCORED, _PADDING, _TOO_EARLY, _NOT_THINKING, _NO_STEP, _THINK_END = range(6)


def check_op(slots: SlotState, hidden_dtype: torch.dtype) -> None:
    """Run a batch with every kind of row through the op and compare it with the reference.

    Nothing that a request will use changes: the sample has its own slots and its own workspace, as
    the server's may have fewer rows. It uses the server's scorer and boundary tokens, and hidden
    states of the model's dtype. Waits for the device.

    Raises:
        StepError: a result is not the reference's, in float32 on the CPU.
    """
    args = _sample(slots, hidden_dtype)
    # Cloned: `.cpu()` of what is on the CPU is the same tensor.
    on_host: list[Any] = [v.cpu().clone() if isinstance(v, torch.Tensor) else v for v in args]
    step_score_(*args)
    reference.step_score_(*on_host)
    found, expected = _results(*args[7:9]), _results(*on_host[7:9])
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE, equal_nan=True):
        worst = (found - expected).abs().nan_to_num(torch.inf).max()
        raise StepError(
            f"STEP's op computes wrong scores on this machine ({describe_op(slots)}): the largest "
            f"difference from torch is {worst:.3g}. Rebuild it for this device "
            "(`pip install --no-build-isolation --force-reinstall --no-deps step-sglang`), and "
            "report it"
        )
    if int(args[9][0]) != 0:
        raise StepError(
            f"STEP's op left its workspace dirty on this machine ({describe_op(slots)}): the next "
            "call would not end. Report it"
        )


def describe_op(slots: SlotState) -> str:
    """The device, its architecture and the library that runs there, for the log."""
    device = slots.out.device
    path, digest = library(device.type)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    else:
        where = f"{device.type}, {cpu_isa()}"
    return f"device {where}, library {path} (sha256 {digest[:12]})"


def _sample(slots: SlotState, hidden_dtype: torch.dtype) -> list[Any]:
    """The arguments of one call, on the device of `slots`."""
    device, width = slots.out.device, slots.w1.shape[1]
    boundary = _first_boundary(slots.boundary)
    kinds = [_SCORED] * 5 + [_PADDING, _TOO_EARLY, _NOT_THINKING, _NO_STEP, _SCORED]
    if slots.think_end_id >= 0:
        kinds.append(_THINK_END)
    ids = {_NO_STEP: -1, _THINK_END: slots.think_end_id}
    resets = [
        SlotReset(i, score_from=8 if kind == _TOO_EARLY else 7, thinking=kind != _NOT_THINKING)
        for i, kind in enumerate(kinds)
    ]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(kinds), width, generator=generator).to(hidden_dtype)
    slot_ids = [-1 if kind == _PADDING else i for i, kind in enumerate(kinds)]
    input_ids = [ids.get(kind, boundary) for kind in kinds]
    workspace = torch.zeros(workspace_size(len(kinds)), dtype=torch.int32, device=device)
    return [
        hidden.to(device),
        None,
        torch.tensor(slot_ids).to(device),
        torch.tensor(input_ids).to(device),
        torch.full((len(kinds),), 7).to(device),
        slots.boundary,
        slots.think_end_id,
        packed_resets(resets)[1:].contiguous().to(device),
        torch.full((len(kinds), 2), -1.0, dtype=torch.float32).to(device),
        workspace,
        slots.w1,
        slots.head,
    ]


def _first_boundary(bitmap: torch.Tensor) -> int:
    words: list[int] = bitmap.tolist()
    word = next(i for i, bits in enumerate(words) if bits)
    bits = words[word] & 0xFFFFFFFF
    return 32 * word + (bits & -bits).bit_length() - 1


def _results(table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    table, out = table.cpu(), out.cpu()
    sums = table[SCORE_SUM].view(torch.float32)
    rest = torch.cat([table[:SCORE_SUM], table[SCORE_SUM + 1 :]])
    return torch.cat([rest.flatten().double(), sums.double(), out.flatten().double()])
