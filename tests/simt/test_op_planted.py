"""The proof can fail: defects planted in the device code must be found."""

import platform
from dataclasses import dataclass, replace

import pytest

from tests.op_samples import active_rows, assert_matches, run_reference
from tests.simt import emulator
from tests.simt.emulator import DESCENDING, EmulationError, Schedule, emulate

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation is x86-64")


@dataclass(frozen=True)
class Defect:
    """Each edit (before, after) is made at the only place in step_score.cu where `before` is."""

    name: str
    variant: str
    edits: tuple[tuple[str, str], ...]
    report: str  # must be in what is reported
    extra_stride: int = 0
    mark: str = ""  # of the run that it is left to


RACE, HEAP = "data race", "heap-buffer-overflow"
SUM_BARRIER = "warp_sum[warp][lane / kLanesPerSum] = total;\n    __syncthreads();"
SHARE_BARRIER = "= share;\n        }\n    }\n    __syncthreads();"
COUNT_FENCE = "__threadfence();\n        // Wraps"
DEFECTS = [
    Defect(
        "sums of warps read before the barrier",
        "tsan",
        ((SUM_BARRIER, SUM_BARRIER.replace("__syncthreads();", "")),),
        RACE,
    ),
    Defect(
        "share published without a fence",
        "tsan",
        ((COUNT_FENCE, "// Wraps"),),
        RACE,
        mark="full",
    ),
    Defect(
        "fence before the barrier instead of after it",
        "tsan",
        (
            (COUNT_FENCE, "// Wraps"),
            (SHARE_BARRIER, SHARE_BARRIER.replace("__sync", "__threadfence();\n    __sync")),
        ),
        RACE,
        mark="slow",
    ),
    Defect(
        "shares read without a fence",
        "tsan",
        (("__threadfence();  // before the other", "// before the other"),),
        RACE,
        mark="slow",
    ),
    Defect(
        "every block finishes",
        "tsan",
        (("if (arrive(p, shared)) finish", "arrive(p, shared);\n    finish"),),
        RACE,
        mark="slow",
    ),
    Defect(
        "hidden and W1 read past the end",
        "asan",
        (("k < p.dim; k +=", "k < p.dim + kVector; k +="),),
        HEAP,
    ),
    Defect(
        "shared list written past the end",
        "asan",
        (
            (
                "shared.active[total + before + rank]",
                "shared.active[total + before + rank + kMaxRows]",
            ),
        ),
        "out of bounds",
        mark="slow",
    ),
    Defect(
        "16-byte loads of rows that are not aligned",
        "asan",
        (("p.hidden_stride * bytes % 16 == 0", "true"),),
        "misaligned",
        extra_stride=1,
        mark="slow",
    ),
    Defect(
        "barrier that a warp skips",
        "plain",
        ((SUM_BARRIER, SUM_BARRIER.replace("__sync", "if (warp != 3) __sync")),),
        "simt:",
    ),
]


def plant(defect: Defect) -> str:
    source = (emulator.CSRC / "step_score.cu").read_text()
    for before, after in defect.edits:
        assert source.count(before) == 1, f"plant {defect.name!r} elsewhere: the code has changed"
        source = source.replace(before, after)
    return source


@pytest.mark.parametrize(
    "defect",
    [
        pytest.param(d, marks=[getattr(pytest.mark, d.mark)] if d.mark else [], id=d.name)
        for d in DEFECTS
    ],
)
def test_planted_defect_is_found(defect: Defect) -> None:
    program = emulator.build(defect.variant, plant(defect))
    sample = active_rows(4, dim=72, units=8, extra_stride=defect.extra_stride)
    at_once = defect.variant == "tsan"
    schedule = Schedule(None if at_once else range(2), DESCENDING)
    with pytest.raises(EmulationError, match=defect.report):
        emulate(program, sample, [schedule])


@pytest.mark.slow
def test_order_of_arrival_in_the_sum_is_found() -> None:
    """A sum in order of arrival is right to rounding, so only the comparison of bits can see it."""
    source = (emulator.CSRC / "step_score.cu").read_text()
    before = "shares[row * gridDim.x + blockIdx.x] = share;"
    assert source.count(before) == 1
    after = "shares[row * gridDim.x] += share;"
    program = emulator.build("plain", source.replace(before, after))
    sample = active_rows(3, dim=72, units=64)
    results = emulate(program, sample, [Schedule(range(16)), Schedule(range(15, -1, -1))])
    for result in results:
        assert_matches(result, run_reference(sample))
    assert not results[0].out.equal(results[1].out)


@pytest.mark.full
def test_a_think_end_row_that_reads_what_another_block_clears_is_found() -> None:
    """Rows without a step are stored while other blocks still classify."""
    rows = (emulator.CSRC / "rows.h").read_text()
    kernel = (emulator.CSRC / "step_score.cu").read_text()
    before, include = "!has_think_end || ends_thinking || p.thinking", '#include "rows.h"'
    assert rows.count(before) == kernel.count(include) == 1
    rows = rows.replace(before, "!has_think_end || p.thinking").replace("#pragma once", "")
    sample = active_rows(4, dim=72, units=8)
    sample = replace(sample, think_end_id=int(sample.input_ids[sample.row_index[1]]))
    for source, wrong in ((kernel, False), (kernel.replace(include, rows), True)):
        program = emulator.build("tsan", source)
        if not wrong:
            (result,) = emulate(program, sample, [Schedule(None, DESCENDING)])
            assert_matches(result, run_reference(sample))
            continue
        with pytest.raises(EmulationError, match=RACE):
            emulate(program, sample, [Schedule(None, DESCENDING)])


def test_the_same_code_without_a_defect_is_clean() -> None:
    sample = active_rows(3, dim=72, units=8)
    for variant in ("tsan", "asan"):
        schedule = Schedule(None if variant == "tsan" else range(2), DESCENDING)
        (result,) = emulate(emulator.build(variant), sample, [schedule])
        assert_matches(result, run_reference(sample))
