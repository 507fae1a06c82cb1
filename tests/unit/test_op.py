"""The op on the CPU against the float64 reference: every kind of row, dtype, stride and error."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.scoring import op, reference
from tests.op_samples import (
    NEVER,
    Sample,
    assert_matches,
    make_sample,
    make_slots,
    run_reference,
)

DTYPES = list(
    itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)
    )
)


def run_op(sample: Sample) -> Sample:
    result = sample.clone()
    op.step_score_(*result.args())  # type: ignore[arg-type]
    return result


def one_row(**changes: object) -> Sample:
    """A single row that ends a scored step in slot 2: position 9, prompt of 4 tokens."""
    sample = make_sample(0, rows=1, dim=16)
    state = {
        "score_from": torch.tensor([0, 0, 4, 0]),
        "thinking": torch.ones(4),
        "score_sum": torch.tensor([0.0, 0.0, 1.5, 0.0]),
        "num_steps": torch.tensor([0, 0, 3, 0]),
    }
    state.update({name: changes.pop(name) for name in state.keys() & changes})  # type: ignore[misc]
    plain = {
        "hidden": sample.hidden[:1],
        "row_index": torch.tensor([0]),
        "slot_ids": torch.tensor([2]),
        "input_ids": torch.tensor([33]),
        "positions": torch.tensor([9]),
        "boundary": torch.tensor([0, 2], dtype=torch.int32),  # token 33 alone
        "think_end_id": 40,
        "slots": make_slots(**state),
    }
    return replace(sample, **{**plain, **changes})


def was_scored(sample: Sample) -> bool:
    result = run_op(sample)
    assert_matches(result, run_reference(sample))
    scored = bool(result.out[0, 0].isfinite())
    assert scored == (result.num_steps.sum() > sample.num_steps.sum())
    return scored


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 80),
    dim=st.integers(1, 70),
    dtypes=st.sampled_from(DTYPES),
    stride=st.sampled_from((0, 1, 3, 8)),
    offset=st.sampled_from((0, 1, 3)),
    share=st.sampled_from((0.0, 0.2, 0.9)),
    think_end=st.booleans(),
    not_finite=st.sampled_from((0.0, 0.3)),
    row_index=st.booleans(),
)
def test_random_calls(  # type: ignore[no-untyped-def]
    seed, rows, dim, dtypes, stride, offset, share, think_end, not_finite, row_index
) -> None:
    sample = make_sample(
        seed,
        rows=rows,
        dim=8 * dim,
        hidden_dtype=dtypes[0],
        w1_dtype=dtypes[1],
        extra_stride=stride,
        offset=offset,
        boundary_share=share,
        think_end=think_end,
        not_finite=not_finite,
        row_index=row_index,
    )
    assert_matches(run_op(sample), run_reference(sample))


@pytest.mark.parametrize("dim", [64, 1032, 2560, 5120, 16384])
@pytest.mark.parametrize("w1_dtype", [torch.float32, torch.bfloat16])
def test_widths_of_real_models(dim: int, w1_dtype: torch.dtype) -> None:
    sample = make_sample(dim, rows=9, dim=dim, hidden_dtype=torch.bfloat16, w1_dtype=w1_dtype)
    assert_matches(run_op(sample), run_reference(sample))


def test_float32_reference_agrees_with_float64() -> None:
    sample = make_sample(1, rows=30, dim=256)
    result = sample.clone()
    reference.step_score_(*result.args())  # type: ignore[arg-type]
    assert_matches(result, run_reference(sample))


class TestRows:
    def test_boundary_row(self) -> None:
        result = run_op(one_row())
        score = result.out[0, 0]
        assert 0 < score < 1
        assert result.num_steps.tolist() == [0, 0, 4, 0]
        assert result.score_sum[2] == 1.5 + score
        assert result.out[0, 1] == result.score_sum[2]

    @pytest.mark.parametrize("slot", [-1, -(2**40), 4, 2**40])
    def test_padding_slot(self, slot: int) -> None:
        sample = one_row(slot_ids=torch.tensor([slot]))
        assert not was_scored(sample)
        assert run_op(sample).out[0, 1] == 0

    @pytest.mark.parametrize("row", [-1, 1, 2**40])
    def test_row_that_does_not_exist(self, row: int) -> None:
        assert not was_scored(one_row(row_index=torch.tensor([row])))

    def test_unscored_row_reports_the_sum(self) -> None:
        assert run_op(one_row(input_ids=torch.tensor([1]))).out[0, 1] == 1.5

    @pytest.mark.parametrize(("position", "scored"), [(3, False), (4, True), (2**33, True)])
    def test_prompt(self, position: int, scored: bool) -> None:
        assert was_scored(one_row(positions=torch.tensor([position]))) == scored

    def test_slot_that_is_never_scored(self) -> None:
        assert not was_scored(one_row(score_from=torch.full((4,), NEVER)))

    @pytest.mark.parametrize("token", [-1, -31, -(2**40), 64, 65, 2**40])
    def test_ids_outside_the_bitmap(self, token: int) -> None:
        everything = torch.full((2,), -1, dtype=torch.int32)
        assert not was_scored(one_row(input_ids=torch.tensor([token]), boundary=everything))

    @pytest.mark.parametrize("token", [0, 31, 32, 63])
    def test_edges_of_the_bitmap(self, token: int) -> None:
        words = torch.zeros(2, dtype=torch.int32)
        words[token // 32] = -(2**31) if token % 32 == 31 else 1 << token % 32
        assert was_scored(one_row(input_ids=torch.tensor([token]), boundary=words))

    def test_empty_bitmap(self) -> None:
        assert not was_scored(one_row(boundary=torch.zeros(0, dtype=torch.int32)))

    def test_think_end_stops_the_slot(self) -> None:
        ending = one_row(input_ids=torch.tensor([40]))
        result = run_op(ending)
        assert result.thinking.tolist() == [1, 1, 0, 1]
        after = replace(result, input_ids=torch.tensor([33]))
        assert not was_scored(after)

    def test_think_end_that_is_a_boundary_is_no_step(self) -> None:
        sample = one_row(think_end_id=33)
        assert not was_scored(sample)
        assert run_op(sample).thinking[2] == 0

    def test_think_end_in_the_prompt(self) -> None:
        sample = one_row(input_ids=torch.tensor([40]), positions=torch.tensor([3]))
        assert run_op(sample).thinking[2] == 1

    def test_without_think_end_everything_is_scored(self) -> None:
        assert was_scored(one_row(think_end_id=-1, thinking=torch.zeros(4)))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_hidden_state_that_is_not_finite(self, value: float) -> None:
        sample = one_row()
        hidden = sample.hidden.clone()
        hidden[0, 3] = value
        spoilt = replace(sample, hidden=hidden)
        assert not was_scored(spoilt)
        result = run_op(spoilt)
        assert result.out[0].tolist() == [
            torch.inf,
            1.5,
        ]  # a step, and the sum as before
        assert torch.equal(result.num_steps, sample.num_steps)
        # Where no step ends, the hidden state does not matter.
        inside = run_op(replace(spoilt, input_ids=torch.tensor([1])))
        assert inside.out[0, 0].isnan()

    def test_score_that_overflows(self) -> None:
        sample = one_row()
        spoilt = replace(sample, w1=sample.w1 * 1e38, hidden=sample.hidden * 1e3)
        assert run_op(spoilt).out[0].tolist() == [torch.inf, 1.5]

    def test_a_spoilt_row_spoils_no_other(self) -> None:
        """Every other row keeps its bits."""
        sample = make_sample(7, rows=13, dim=64, boundary_share=1.0, think_end=False)
        sample.slot_ids.copy_(torch.arange(13))
        sample.score_from.zero_()
        clean = run_op(sample)
        ended = clean.out[:13, 0].isfinite().nonzero().flatten().tolist()
        assert len(ended) >= 5
        for row in ended:
            hidden = sample.hidden.clone()
            hidden[sample.row_index[row], 9] = torch.nan
            got = run_op(replace(sample, hidden=hidden))
            assert got.out[row, 0].isinf() and got.num_steps[row] == sample.num_steps[row]
            others = [i for i in range(13) if i != row]
            assert torch.equal(got.score_sum[others], clean.score_sum[others])
            assert torch.equal(got.num_steps[others], clean.num_steps[others])

    def test_reused_slot(self) -> None:
        first = run_op(one_row())
        first.num_steps[2] = 0
        first.score_sum[2] = 0
        second = run_op(first)
        assert second.num_steps[2] == 1
        assert second.score_sum[2] == second.out[0, 0] == first.out[0, 0]


def test_empty_batch() -> None:
    sample = make_sample(0, rows=0)
    result = run_op(sample)
    assert result.out.shape == (0, 2)
    assert torch.equal(result.num_steps, sample.num_steps)


@pytest.mark.parametrize("row_index", [torch.tensor([0]), None])
def test_no_tokens(row_index: torch.Tensor | None) -> None:
    sample = one_row(row_index=row_index)
    empty = torch.zeros(0, dtype=torch.int64)
    result = replace(sample, hidden=sample.hidden[:0], input_ids=empty, positions=empty)
    assert not was_scored(result)


@pytest.mark.parametrize("w1_dtype", [torch.float32, torch.bfloat16])
def test_score_does_not_depend_on_the_batch_or_the_threads(w1_dtype: torch.dtype) -> None:
    sample = make_sample(5, rows=40, dim=1096, w1_dtype=w1_dtype, boundary_share=0.9)
    together = run_op(sample)
    assert (~together.out[:40, 0].isnan()).sum() > 8
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for i in range(40):
            alone = replace(
                sample,
                row_index=sample.row_index[i : i + 1],
                slot_ids=sample.slot_ids[i : i + 1],
                out=sample.out[i : i + 1],
            )
            got, want = run_op(alone).out[0], together.out[i]
            assert torch.equal(got.view(torch.int32), want.view(torch.int32))
    finally:
        torch.set_num_threads(threads)


BAD = [
    ("hidden", lambda s: s.hidden.double(), "float32, bfloat16 or float16.*float64"),
    ("hidden", lambda s: s.hidden[0], r"shape \[tokens, width\]"),
    ("hidden", lambda s: torch.zeros(1, 12), "multiple of 8.*found 12"),
    ("hidden", lambda s: torch.zeros(1, 16392), "multiple of 8 from 8 to 16384"),
    ("hidden", lambda s: torch.zeros(16, 1).T.expand(16, 16).T, "stride"),
    ("row_index", lambda s: s.row_index.int(), r"int64.*found int32 \[1\]"),
    ("row_index", lambda s: torch.zeros(2, dtype=torch.int64), r"shape \[1\], found int64 \[2\]"),
    ("slot_ids", lambda s: torch.zeros(4097, dtype=torch.int64), "at most 4096"),
    ("slot_ids", lambda s: s.slot_ids.int(), r"int64.*found int32 \[1\]"),
    ("input_ids", lambda s: s.input_ids.float(), "int64"),
    ("positions", lambda s: torch.zeros(4, dtype=torch.int64)[::2], "not contiguous"),
    ("boundary", lambda s: s.boundary.bool(), "int32.*bool"),
    ("slots", lambda s: s.slots.float(), "int32"),
    ("slots", lambda s: s.slots[:3], r"\[4, \*\], found int32 \[3, 4\]"),
    ("slots", lambda s: s.slots.T.contiguous().T, "not contiguous"),
    ("out", lambda s: s.out.T, r"\[\*, 2\], found float32 \[2, 1\]"),
    ("out", lambda s: s.out[:0], r"a row for each of the 1 slot_ids, found float32 \[0, 2\]"),
    ("w1", lambda s: s.w1.half(), "float32 or bfloat16.*float16"),
    ("w1", lambda s: s.w1[:511], r"\[512, 16\]"),
    ("w1", lambda s: s.w1.T.contiguous().T, "not contiguous"),
    ("head", lambda s: s.head.bfloat16(), "float32"),
    ("head", lambda s: s.head[:1024], r"\[1025\], found float32 \[1024\]"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD)
def test_bad_argument(name: str, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    sample = one_row()
    with pytest.raises(RuntimeError, match=f"(?s)^step_score_: .*{name}.*{message}"):
        run_op(replace(sample, **{name: spoil(sample)}))


IN_CUDA = [
    *BAD,
    ("workspace", lambda s: s.workspace[:5], "at least 129 elements for 1 rows.*found 5"),
    ("workspace", lambda s: s.workspace.long(), "int32"),
    (
        "w1",
        lambda s: torch.zeros(op.HIDDEN_UNITS * 16 + 1)[1:].view(op.HIDDEN_UNITS, 16),
        "multiple of 16 bytes",
    ),
]


@pytest.mark.skipif(not op.has_cuda(), reason="the op was built without CUDA")
@pytest.mark.parametrize(("name", "spoil", "message"), IN_CUDA)
def test_bad_argument_of_the_cuda_library(name: str, spoil, message: str) -> None:  # type: ignore[no-untyped-def]
    """It looks at arguments before it asks for a device: here at those of the CPU."""
    sample = one_row()
    args = replace(sample, **{name: spoil(sample)}).args()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=f"(?s)^step_score_: .*{name}.*{message}"):
        torch.ops.step_sglang.step_score_.default.redispatch(keys, *args)


def test_opcheck() -> None:
    for seed in range(3):
        sample = make_sample(seed, rows=5, dim=64, row_index=seed > 0)
        torch.library.opcheck(torch.ops.step_sglang.step_score_.default, sample.clone().args())


@pytest.mark.parametrize("row_index", [False, True])
def test_compiles_with_fake_tensors(row_index: bool) -> None:
    sample = make_sample(2, rows=6, row_index=row_index)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def scored(s: Sample) -> torch.Tensor:
        op.step_score_(*s.args())  # type: ignore[arg-type]
        return s.out * 1

    got = sample.clone()
    assert torch.equal(scored(got).nan_to_num(), run_op(sample).out.nan_to_num())


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, **env},
        check=False,
    )


CHECK_ISA = """
from tests.op_samples import *
dtypes = (torch.bfloat16, torch.float16, torch.float32)
for seed in range(24):
    dtype, w1_dtype = dtypes[seed % 3], dtypes[:3:2][seed % 2]
    dim = 8 * (1, 3, 8, 17, 130, 271)[seed // 4]  # with and without a rest, one block and several
    s = make_sample(seed, rows=7 + 4 * seed, dim=dim, hidden_dtype=dtype, w1_dtype=w1_dtype,
                    not_finite=0.2)
    got = s.clone()
    op.step_score_(*got.args())
    assert_matches(got, run_reference(s))
print(op.cpu_isa())
"""


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "avx512_bf16", "unknown"])
def test_every_instruction_set(isa: str) -> None:
    """A set the machine lacks is never chosen, however loudly it is asked for."""
    done = run_python(CHECK_ISA, STEP_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has = {
        "avx512_bf16": " avx512_bf16" in flags,
        "avx512": " avx512bw" in flags,
        "avx2": " avx2" in flags,
        "plain": True,
    }
    best = next(name for name in has if has[name])
    assert done.stdout.strip() == (isa if has.get(isa) else best)


def test_missing_library_says_how_to_build(tmp_path: Path) -> None:
    source = Path(op.__file__).read_text()
    (tmp_path / "lonely_op.py").write_text(source)
    done = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lonely_op")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pip install --no-build-isolation -e ." in done.stderr


def test_workspace_size() -> None:
    assert op.workspace_size(0) == 1
    assert op.workspace_size(64) - op.workspace_size(63) == op.HIDDEN_UNITS // 4


def test_the_lines_of_torch_in_the_documentation_are_the_op() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/kernel.md").read_text()
    lines = page.split("```python\n")[2].split("```")[0]
    for seed in range(20):
        sample = make_sample(seed, rows=12, dim=16, boundary_share=0.6)
        sample.slot_ids.copy_(torch.randperm(15)[:12])  # the lines leave padding out
        told = sample.clone()
        b1, w2, b2 = told.head.split((told.units, told.units, 1))
        names = {
            **{name: getattr(told, name) for name in ("hidden", "row_index", "slot_ids", "w1")},
            **{name: getattr(told, name) for name in ("input_ids", "positions", "think_end_id")},
            **{name: getattr(told, name) for name in ("score_from", "thinking", "score_sum")},
            **{"num_steps": told.num_steps, "out": told.out[:12], "b1": b1, "w2": w2, "b2": b2},
            **{"torch": torch, "nan": torch.nan},
            "is_boundary": lambda ids, s=told: reference.is_boundary(ids, s.boundary),
        }
        exec(lines, names)
        found = run_op(sample)
        assert_matches(found, replace(told, out=told.out.double()))
