"""The op on a real CUDA device: the samples of the CPU tests, graphs, and bits that repeat."""

from dataclasses import replace

import pytest
import torch

from step_sglang.scoring import op
from tests.op_samples import DTYPES, Sample, active_rows, assert_matches, make_sample, run_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]


def run_cuda(sample: Sample) -> Sample:
    result = sample.to("cuda")
    op.step_score_(*result.args())  # type: ignore[arg-type]
    torch.cuda.synchronize()
    assert result.workspace[0] == 0
    return result.to("cpu")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [8, 64, 1032, 2560, 4096, 5120, 16384])
@pytest.mark.parametrize(("rows", "share"), [(0, 0.5), (1, 1.0), (64, 0.0), (64, 0.1), (300, 0.9)])
def test_samples(
    dtypes: tuple[torch.dtype, torch.dtype], dim: int, rows: int, share: float
) -> None:
    sample = make_sample(
        dim + rows,
        rows=rows,
        dim=dim,
        hidden_dtype=dtypes[0],
        w1_dtype=dtypes[1],
        boundary_share=share,
    )
    assert_matches(run_cuda(sample), run_reference(sample))


@pytest.mark.parametrize("seed", range(50))
def test_random_strides(seed: int) -> None:
    sample = make_sample(
        seed,
        rows=1 + 7 * seed % 90,
        dim=8 * (1 + 13 * seed % 80),
        hidden_dtype=DTYPES[seed % 6][0],
        w1_dtype=DTYPES[seed % 6][1],
        extra_stride=(0, 1, 3, 8, 16)[seed % 5],
        offset=(0, 1, 4, 8)[seed % 4],
        boundary_share=(0.1, 0.5, 0.9)[seed % 3],
        think_end=seed % 2 == 0,
        not_finite=(0.0, 0.3)[seed // 2 % 2],
        row_index=seed % 3 > 0,
    )
    assert_matches(run_cuda(sample), run_reference(sample))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_hidden_state_that_is_not_finite(value: float) -> None:
    sample = active_rows(15, dim=2560, units=op.HIDDEN_UNITS)
    clean = run_cuda(sample)
    sample.hidden[sample.row_index[7], 5] = value
    result = run_cuda(sample)
    assert result.out[7].tolist() == [torch.inf, sample.score_sum[7].item()]
    assert result.num_steps[7] == sample.num_steps[7]
    others = [i for i in range(15) if i != 7]
    assert torch.equal(result.out[others], clean.out[others])


def test_largest_batch() -> None:
    sample = make_sample(1, rows=op.MAX_ROWS, dim=512, hidden_dtype=torch.bfloat16)
    assert_matches(run_cuda(sample), run_reference(sample))


def test_same_bits_every_time() -> None:
    sample = make_sample(2, rows=64, dim=2560, boundary_share=0.9)
    first = run_cuda(sample)
    for _ in range(200):
        again = run_cuda(sample)
        assert torch.equal(again.out.view(torch.int32), first.out.view(torch.int32))


def test_score_does_not_depend_on_the_batch() -> None:
    sample = active_rows(15, dim=2560, units=op.HIDDEN_UNITS)
    together = run_cuda(sample)
    for i in range(15):
        alone = replace(
            sample,
            row_index=sample.row_index[i : i + 1],
            slot_ids=sample.slot_ids[i : i + 1],
            out=sample.out[i : i + 1],
        )
        assert torch.equal(run_cuda(alone).out[0], together.out[i])


def test_graph_capture_and_replay() -> None:
    """Captured once, replayed on new inputs in place: every replay scores what is there then."""
    captured = make_sample(0, rows=32, dim=2560, hidden_dtype=torch.bfloat16, row_index=False)
    captured = captured.to("cuda")
    op.step_score_(*captured.clone().args())  # type: ignore[arg-type]  # loads the kernel
    state = captured.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.step_score_(*captured.args())  # type: ignore[arg-type]
    assert torch.equal(captured.num_steps, state.num_steps), "capture must not run the op"

    for seed in range(20):
        share = 0.0 if seed % 3 == 0 else 0.6
        fresh = make_sample(
            seed,
            rows=32,
            dim=2560,
            hidden_dtype=torch.bfloat16,
            boundary_share=share,
            row_index=False,
        )
        tokens = captured.hidden.shape[0]
        fresh = replace(
            fresh,
            hidden=torch.randn(tokens, 2560).bfloat16(),
            input_ids=fresh.input_ids[torch.arange(tokens) % fresh.input_ids.numel()],
            positions=fresh.positions[torch.arange(tokens) % fresh.positions.numel()],
            out=captured.out.cpu(),
            think_end_id=captured.think_end_id,
        )
        for name in vars(fresh):
            value = getattr(captured, name)
            if isinstance(value, torch.Tensor):
                value.copy_(getattr(fresh, name))
        graph.replay()
        torch.cuda.synchronize()
        assert_matches(captured.to("cpu"), run_reference(fresh))
        assert captured.workspace[0] == 0


def test_no_allocation_and_no_synchronisation() -> None:
    sample = make_sample(3, rows=64, dim=2560).to("cuda")
    op.step_score_(*sample.args())  # type: ignore[arg-type]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.step_score_(*sample.args())  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_opcheck() -> None:
    sample = make_sample(4, rows=8, dim=64).to("cuda")
    torch.library.opcheck(torch.ops.step_sglang.step_score_.default, sample.args())


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("w1", lambda s: s.w1.cpu(), "device of hidden"),
        ("workspace", lambda s: s.workspace[:5], "at least 129 elements for 1 rows.*found 5"),
        ("workspace", lambda s: s.workspace.long(), "int32"),
        (
            "w1",
            lambda s: torch.zeros(512 * 64 + 1, device="cuda")[1:].view(512, 64),
            "multiple of 16 bytes",
        ),
    ],
)
def test_bad_argument(name: str, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    sample = make_sample(0, rows=1).to("cuda")
    with pytest.raises(RuntimeError, match=f"(?s){name}.*{message}"):
        op.step_score_(*replace(sample, **{name: spoil(sample)}).args())  # type: ignore[arg-type]
