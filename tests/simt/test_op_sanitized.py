"""The CPU op under AddressSanitizer and UBSan, with every instruction set of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.op_samples import DTYPES, Sample, assert_matches, make_sample, run_reference
from tests.simt import emulator, sanitized
from tests.simt.emulator import EmulationError, Schedule, emulate

HAS = {
    "avx512_bf16": "avx512_bf16",
    "avx512": "avx512bw",
    "avx2": "avx2",
}


def instruction_sets() -> list[str]:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return ["plain", *(name for name, flag in HAS.items() if f" {flag}" in flags)]


def samples() -> list[Sample]:
    """Odd widths, strides and starts; one with enough work to be split; an empty batch."""
    made = [
        make_sample(
            seed,
            rows=(1, 2, 3, 5, 9, 70)[seed % 6],
            dim=8 * (1, 3, 4, 9, 33)[seed % 5],
            hidden_dtype=DTYPES[seed % 6][0],
            w1_dtype=DTYPES[seed % 6][1],
            extra_stride=(0, 1, 3, 8)[seed % 4],
            offset=(0, 1, 3)[seed % 3],
            boundary_share=0.9,
            think_end=seed % 2 == 0,
            not_finite=0.1,
            row_index=seed % 4 > 0,
        )
        for seed in range(12)
    ]
    large = make_sample(3, rows=11, dim=1096, boundary_share=1.0, hidden_dtype=torch.bfloat16)
    return [*made, large, make_sample(0, rows=0)]


@pytest.mark.parametrize("isa", instruction_sets())
def test_no_access_outside_and_nothing_undefined(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP_CPU_ISA", isa)
    program = sanitized.build()
    for sample in samples():
        (result,) = emulate(program, sample, [Schedule(None)], launches=1)
        assert_matches(result, run_reference(sample))


DEFECTS = {
    "reads past a row": (
        "cpu_dot.inl", "for (; k < end; k += 8) {", "for (; k < end + 8; k += 8) {",
        "heap-buffer-overflow",
    ),
    "reads past the bitmap": (
        "rows.h", "(id >> 5) >= p.num_words", "(id >> 5) > p.num_words + 1", "heap-buffer-overflow",
    ),
    "shifts too far": ("rows.h", ">> (id & 31)) & 1u", ">> (id & 63)) & 1u", "shift exponent"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [n if n == "reads past a row" else pytest.param(n, marks=pytest.mark.slow) for n in DEFECTS],
)
def test_planted_defect_is_found(name: str) -> None:
    file, before, after, report = DEFECTS[name]
    source = (emulator.CSRC / file).read_text()
    assert source.count(before) == 1, f"plant {name!r} elsewhere: the code has changed"
    program = sanitized.build({file: source.replace(before, after)})
    with pytest.raises(EmulationError, match=report):
        for sample in samples():
            emulate(program, sample, [Schedule(None)])
