"""The CUDA code, run thread by thread on the CPU, against the float64 reference."""

import itertools
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.op_samples import (
    DTYPES,
    Sample,
    active_rows,
    assert_matches,
    make_sample,
    run_reference,
)
from tests.simt import emulator
from tests.simt.emulator import ASCENDING, DESCENDING, RANDOM, Schedule, emulate

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation is x86-64")

UNITS_PER_BLOCK = 4


@pytest.fixture(scope="module")
def plain() -> Path:
    return emulator.build("plain")


@pytest.fixture(scope="module")
def tsan() -> Path:
    return emulator.build("tsan")


@pytest.fixture(scope="module")
def asan() -> Path:
    return emulator.build("asan")


def in_order(sample: Sample, thread_order: int = ASCENDING, seed: int = 0) -> Schedule:
    return Schedule(range(sample.units // UNITS_PER_BLOCK), thread_order, seed)


def check(program: Path, sample: Sample, schedules: list[Schedule]) -> None:
    """Right under every schedule, with the same bits, and the arrival counter back at 0."""
    want = run_reference(sample)
    first, *others = emulate(program, sample, schedules)
    assert_matches(first, want)
    assert first.workspace[0] == 0
    for other in others:
        for name in ("thinking", "score_sum", "num_steps", "out", "workspace"):
            a, b = getattr(first, name), getattr(other, name)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


samples = st.builds(
    lambda *, dim, dtypes, units, **others: make_sample(
        dim=8 * dim,
        hidden_dtype=dtypes[0],
        w1_dtype=dtypes[1],
        units=UNITS_PER_BLOCK * units,
        **others,
    ),
    seed=st.integers(0, 2**31),
    rows=st.one_of(st.integers(0, 40), st.sampled_from((255, 256, 257, 600))),
    dim=st.one_of(st.integers(1, 40), st.sampled_from((255, 256, 257, 320))),
    dtypes=st.sampled_from(DTYPES),
    extra_stride=st.sampled_from((0, 1, 3, 8, 16)),
    offset=st.sampled_from((0, 1, 4, 8)),
    boundary_share=st.sampled_from((0.0, 0.1, 0.9)),
    think_end=st.booleans(),
    units=st.integers(1, 12),
    not_finite=st.sampled_from((0.0, 0.0, 0.3)),
    row_index=st.booleans(),
)
quick = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quick
@given(sample=samples, seed=st.integers(0, 2**31), random=st.randoms(use_true_random=False))
def test_random_shapes_and_schedules(plain: Path, sample: Sample, seed: int, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(range(sample.units // UNITS_PER_BLOCK))
    random.shuffle(shuffled)
    check(
        plain,
        sample,
        [
            in_order(sample),
            in_order(sample, DESCENDING),
            Schedule(shuffled, RANDOM, seed),
            Schedule(shuffled[::-1], RANDOM, seed + 1),
            Schedule(None, RANDOM, seed),
        ],
    )


@settings(quick, max_examples=25)
@given(sample=samples)
def test_addresses(asan: Path, sample: Sample) -> None:
    """No access outside an argument or a shared array, none misaligned."""
    check(asan, sample, [in_order(sample), in_order(sample, RANDOM, 1)])


@pytest.mark.parametrize("rows", [1, 6, 300])
def test_races(tsan: Path, rows: int) -> None:
    """Blocks really at once, tiles of every size, and a batch of more than one scan."""
    sample = make_sample(
        rows, rows=rows, dim=72, units=16, boundary_share=0.9 if rows < 300 else 0.1
    )
    if rows == 1:
        sample = active_rows(1, dim=72, units=12)
    check(tsan, sample, [Schedule(None), Schedule(None, RANDOM, rows)])


@pytest.mark.slow
@settings(quick, max_examples=30)
@given(sample=samples.filter(lambda s: s.units <= 16))
def test_races_at_random_shapes(tsan: Path, sample: Sample) -> None:
    check(tsan, sample, [Schedule(None), Schedule(None, DESCENDING), Schedule(None, RANDOM, 3)])


def test_every_block_order(plain: Path) -> None:
    sample = active_rows(5, dim=64, units=20)
    orders = itertools.permutations(range(5))
    check(plain, sample, [Schedule(order, RANDOM, i) for i, order in enumerate(orders)])


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: f"{d[0]}-{d[1]}".replace("torch.", ""))
def test_full_width(plain: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sample = make_sample(
        7, rows=16, dim=2560, hidden_dtype=dtypes[0], w1_dtype=dtypes[1], boundary_share=0.9
    )
    check(plain, sample, [in_order(sample)])


def test_score_does_not_depend_on_the_batch(plain: Path) -> None:
    """Tiles of 8, 4, 2 and 1 rows give the same bits for the same row."""
    sample = active_rows(15, dim=328, units=8)
    (together,) = emulate(plain, sample, [in_order(sample)])
    for i in range(15):
        alone = make_alone(sample, i)
        (result,) = emulate(plain, alone, [in_order(sample)])
        assert torch.equal(result.out[0], together.out[i])


def make_alone(sample: Sample, i: int) -> Sample:
    return replace(
        sample,
        row_index=sample.row_index[i : i + 1],
        slot_ids=sample.slot_ids[i : i + 1],
        out=sample.out[i : i + 1],
    )


def test_launches_follow_each_other(plain: Path) -> None:
    """The workspace is zeroed once: three calls on one workspace, no reset between them."""
    sample = active_rows(3, dim=64, units=16)
    (result,) = emulate(plain, sample, [in_order(sample)], launches=3)
    assert torch.equal(result.num_steps, sample.num_steps + 3 * (torch.arange(6) < 3))
    assert result.workspace[0] == 0


def test_nothing_is_computed_without_a_step(plain: Path) -> None:
    """No row ends a step: the workspace, where every share would land, stays untouched."""
    sample = make_sample(3, rows=20, dim=64, units=16, boundary_share=0.0)
    poisoned = sample.workspace.clone()
    poisoned[1:] = -5
    (result,) = emulate(plain, replace(sample, workspace=poisoned), [in_order(sample)])
    assert torch.equal(result.workspace, poisoned)
    assert_matches(result, run_reference(sample))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_hidden_state_that_is_not_finite(plain: Path, value: float) -> None:
    sample = active_rows(3, dim=64, units=16)
    sample.hidden[sample.row_index[1], 5] = value
    check(plain, sample, [in_order(sample)])
    (result,) = emulate(plain, sample, [in_order(sample)])
    assert result.out[:, 0].isfinite().tolist() == [True, False, True]
    assert result.out[1].tolist() == [torch.inf, sample.score_sum[1].item()]
