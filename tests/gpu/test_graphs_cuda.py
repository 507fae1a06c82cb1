"""The op in CUDA graphs: what the engine does to it, and what hardware may do to its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from step_sglang.reasoner import scorer_path
from step_sglang.scoring import op
from step_sglang.scoring.boundary import bitmap
from step_sglang.scoring.scorer import load_scorer
from step_sglang.scoring.self_check import check_op, describe_op
from step_sglang.scoring.slots import SlotState
from tests.op_samples import Sample, assert_matches, make_sample, run_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA"),
]


def call(sample: Sample) -> None:
    op.step_score_(*sample.args())  # type: ignore[arg-type]


def capture(*samples: Sample) -> torch.cuda.CUDAGraph:
    for sample in samples:  # loads the kernel, which must not happen in a capture
        call(sample.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for sample in samples:
            call(sample)
    return graph


def decode(seed: int, rows: int = 64, share: float = 0.3, device: str = "cuda") -> Sample:
    return make_sample(
        seed,
        rows=rows,
        dim=4096,
        hidden_dtype=torch.bfloat16,
        boundary_share=share,
        row_index=False,
    ).to(device)


def test_warm_up_before_capture() -> None:
    """As the engine captures: two passes outside the graph, on the stream that captures."""
    sample = decode(0)
    begun = sample.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(sample)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call(sample)
        graph.replay()
    torch.cuda.synchronize()
    expected = begun.to("cpu")
    for _ in range(3):  # what capture records does not run
        expected = run_reference(replace(expected, out=expected.out.float()))
    assert_matches(sample.to("cpu"), expected)


def test_two_graphs_share_a_workspace() -> None:
    """One per batch size, as the engine has them, replayed in any order."""
    small, large = decode(1, rows=8), decode(2, rows=64)
    workspace = torch.zeros(op.workspace_size(64), dtype=torch.int32, device="cuda")
    small, large = (replace(sample, workspace=workspace) for sample in (small, large))
    begun = {8: small.clone(), 64: large.clone()}
    graphs = {8: capture(small), 64: capture(large)}
    for rows in (8, 64, 64, 8, 8, 64):
        graphs[rows].replay()
    torch.cuda.synchronize()
    assert workspace[0] == 0
    for rows, sample in ((8, small), (64, large)):
        expected = begun[rows].to("cpu")
        for _ in range(3):
            expected = run_reference(replace(expected, out=expected.out.float()))
        assert_matches(sample.to("cpu"), expected)


@pytest.mark.slow
def test_bits_repeat_under_memory_traffic() -> None:
    """100,000 replays while another stream keeps the memory busy: one order of additions."""
    sample = decode(3, share=0.9)
    begun = sample.clone()
    call(sample)
    torch.cuda.synchronize()
    first_out, first_slots = sample.out.clone(), sample.slots.clone()
    assert first_out[:, 0].isfinite().any()

    busy = torch.cuda.Stream()
    source = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    compare = torch.cuda.CUDAGraph()
    with torch.cuda.graph(compare):
        sample.slots.copy_(begun.slots)
        call(sample)
        different += (sample.out.view(torch.int32) != first_out.view(torch.int32)).sum()
        different += (sample.slots != first_slots).sum()
    for _ in range(1000):
        with torch.cuda.stream(busy):
            for _ in range(4):
                target.copy_(source)
        for _ in range(100):
            compare.replay()
        torch.cuda.synchronize()
    assert different.item() == 0


def slots_on(device: str) -> SlotState:
    return SlotState(8, load_scorer(scorer_path()), bitmap([31, 77]), 9, torch.device(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_check_at_every_start(dtype: torch.dtype) -> None:
    slots = slots_on("cuda")
    check_op(slots, dtype)
    assert "sm_" in describe_op(slots)


if torch.cuda.device_count() > 1:  # elsewhere there is nothing to skip

    def test_another_device_than_the_current_one() -> None:
        check_op(slots_on("cuda:1"), torch.bfloat16)
        sample = decode(4, device="cuda:1")
        expected = run_reference(sample.to("cpu"))
        call(sample)
        torch.cuda.synchronize("cuda:1")
        assert torch.cuda.current_device() == 0
        assert_matches(sample.to("cpu"), expected)
