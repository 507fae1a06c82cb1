"""Random calls of the op, shared by the CPU, CUDA and emulation tests."""

import itertools
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from step_sglang.scoring import op, reference
from step_sglang.scoring.op import NUM_STEPS, SCORE_FROM, SCORE_SUM, THINKING

NEVER = 2**31 - 1
DTYPES = list(
    itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
    )
)


@dataclass(frozen=True)
class Sample:
    """The arguments of one call, in the op's order."""

    hidden: Tensor
    row_index: Tensor | None
    slot_ids: Tensor
    input_ids: Tensor
    positions: Tensor
    boundary: Tensor
    think_end_id: int
    slots: Tensor
    out: Tensor
    workspace: Tensor
    w1: Tensor
    head: Tensor

    @property
    def units(self) -> int:
        """Width of the scorer's hidden layer, which only the emulation may change."""
        return self.w1.shape[0]

    @property
    def score_from(self) -> Tensor:
        return self.slots[SCORE_FROM]

    @property
    def thinking(self) -> Tensor:
        return self.slots[THINKING]

    @property
    def score_sum(self) -> Tensor:
        return self.slots[SCORE_SUM].view(torch.float32)

    @property
    def num_steps(self) -> Tensor:
        return self.slots[NUM_STEPS]

    def args(self) -> tuple[Tensor | int | None, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def clone(self) -> "Sample":
        """Own copy of everything the op writes; inputs are shared."""
        written = ("slots", "out", "workspace")
        return replace(self, **{name: getattr(self, name).clone() for name in written})

    def to(self, device: str) -> "Sample":
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "hidden":
                # .to() would drop the row stride, and with it what the sample is about.
                base = value.as_strided(
                    (value.untyped_storage().nbytes() // value.itemsize,), (1,), 0
                )
                moved[f.name] = base.to(device).as_strided(
                    value.shape, value.stride(), value.storage_offset()
                )
            elif isinstance(value, Tensor):
                moved[f.name] = value.to(device)
        return replace(self, **moved)


def make_slots(
    score_from: Tensor, thinking: Tensor, score_sum: Tensor, num_steps: Tensor
) -> Tensor:
    """[4, S] int32 as the op takes it."""
    bits = score_sum.float().view(torch.int32)
    return torch.stack([score_from.int(), thinking.int(), bits, num_steps.int()])


def make_bitmap(ids: list[int], vocab: int) -> Tensor:
    words = [0] * ((vocab + 31) // 32)
    for i in ids:
        words[i >> 5] |= 1 << (i & 31)
    return torch.tensor([w - 2**32 if w >= 2**31 else w for w in words], dtype=torch.int32)


def make_sample(
    seed: int,
    *,
    rows: int = 8,
    dim: int = 64,
    hidden_dtype: torch.dtype = torch.float32,
    w1_dtype: torch.dtype = torch.float32,
    extra_stride: int = 0,
    offset: int = 0,
    boundary_share: float = 0.5,
    vocab: int = 100,
    think_end: bool = True,
    units: int = op.HIDDEN_UNITS,
    not_finite: float = 0.0,
    row_index: bool = True,
) -> Sample:
    """A call with every kind of row: padding, prompt, think-end, odd ids, steps.

    ``not_finite``: the share of tokens with one NaN or infinity in their hidden state.
    ``row_index``: whether there is one; without, row i is token i.
    """
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=g)

    tokens = rows + int(integers(0, 5, 1))
    slots = rows + 3
    stride = dim + extra_stride
    base = torch.randn(offset + max(tokens, 1) * stride, generator=g).to(hidden_dtype)
    hidden = base.as_strided((tokens, dim), (stride, 1), offset)

    boundary_ids = integers(0, vocab, max(1, vocab // 10)).unique().tolist()
    other = [i for i in range(vocab) if i not in boundary_ids]
    think_end_id = other[0] if think_end else -1
    kind = torch.rand(tokens, generator=g)
    input_ids = torch.tensor(other)[integers(0, len(other), tokens)]
    stepping = torch.tensor(boundary_ids)[integers(0, len(boundary_ids), tokens)]
    input_ids = torch.where(kind < boundary_share, stepping, input_ids)
    odd = torch.tensor([think_end_id if think_end else other[0], -1, -32, vocab + 31, 2**40])
    input_ids = torch.where(kind > 0.9, odd[integers(0, len(odd), tokens)], input_ids)

    slot_ids = torch.randperm(slots, generator=g)[:rows]
    slot_ids[torch.rand(rows, generator=g) < 0.1] = -1
    score_from = integers(0, 6, slots).to(torch.int32)
    score_from[torch.rand(slots, generator=g) < 0.1] = NEVER
    for token in (torch.rand(tokens, generator=g) < not_finite).nonzero().flatten().tolist():
        hidden[token, int(integers(0, dim, 1))] = (torch.nan, torch.inf, -torch.inf)[token % 3]
    return Sample(
        hidden=hidden,
        row_index=torch.randperm(tokens, generator=g)[:rows] if row_index else None,
        slot_ids=slot_ids,
        input_ids=input_ids,
        positions=integers(2, 40, tokens),
        boundary=make_bitmap(boundary_ids, vocab),
        think_end_id=think_end_id,
        slots=make_slots(
            score_from,
            thinking=torch.rand(slots, generator=g) < 0.85,
            score_sum=torch.rand(slots, generator=g) * 5,
            num_steps=integers(0, 9, slots),
        ),
        out=torch.full((rows + seed % 3, 2), -7.0),  # what is beyond the rows must stay
        workspace=torch.zeros(op.workspace_size(rows), dtype=torch.int32),
        w1=(torch.randn(units, dim, generator=g) / dim**0.5).to(w1_dtype),
        head=op.pack_head(
            torch.randn(units, generator=g) * 0.1,
            torch.randn(1, units, generator=g) / units**0.5 * 3,
            torch.randn(1, generator=g) * 0.1,
        ),
    )


def run_reference(sample: Sample) -> Sample:
    """The float64 oracle's state and out after the call."""
    result = replace(sample.clone(), out=sample.out.double())
    reference.step_score_(*result.args(), dtype=torch.float64)
    return result


def assert_matches(got: Sample, want: Sample, tolerance: float = 2e-5) -> None:
    """State and out equal the oracle's: integers exactly, scores within `tolerance`."""
    assert torch.equal(got.score_from, want.score_from)
    assert torch.equal(got.thinking, want.thinking)
    assert torch.equal(got.num_steps, want.num_steps)
    torch.testing.assert_close(got.score_sum, want.score_sum, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        got.out.double(), want.out, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def active_rows(count: int, *, dim: int, units: int, extra_stride: int = 0) -> Sample:
    """A batch in which every row ends a scored step."""
    sample = make_sample(
        0, rows=count, dim=dim, units=units, extra_stride=extra_stride, think_end=False
    )
    sample.slot_ids.copy_(torch.arange(count))
    sample.score_from.zero_()
    sample.input_ids.fill_(
        int(sample.boundary[0]).bit_length() - 1 if sample.boundary[0] > 0 else 31
    )
    return sample
