"""What a bench keeps: results that survive kills, figures, tables, plots."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.plots import accuracy_against_latency
from step_sglang.evaluation.report import (
    accuracy_table,
    breakdown_table,
    latex,
    markdown,
    write_report,
)
from step_sglang.evaluation.results import RESULTS, ResultWriter, load_results
from step_sglang.evaluation.stats import compare, mean_of, permutation_p
from step_sglang.evaluation.summary import in_common, summarize
from step_sglang.evaluation.trial_result import PoolUsage, TrialResult, TrialTrace
from step_sglang.evaluation.votes import vote_rows
from step_sglang.scoring.calibration import TraceCalibration

META = {"model": "m", "dataset": "d", "settings": {"window": 20}}
FINISHED = TrialTrace("finished", "5", True, 100, 0.8, None, None, 0, 0.5, 0.01, 2.0)
PRUNED = TrialTrace("pruned", None, False, 40, 0.2, None, "decode", 0, 1.5, 0.01, 1.0)


def result(question: str = "q0", method: str = "sc", **changes: object) -> TrialResult:
    plain = TrialResult(
        question=question,
        method=method,
        n=2,
        repeat=0,
        memory="512 tokens",
        pool=512,
        gold="5",
        answer="5",
        correct=True,
        latency=3.0,
        phases=(3.0,),
        threshold=None,
        started=1e9,
        traces=(FINISHED, PRUNED),
        usage=(PoolUsage(0.5, 0.4, 2, 0), PoolUsage(1.0, 0.8, 1, 1)),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    results = [result(), result("q1", answer=None, correct=False), result(method="step", n=4)]
    with ResultWriter(tmp_path, META) as writer:
        for one in results:
            writer.add(one)
        with pytest.raises(BenchError, match="already"):
            writer.add(results[0])
    loaded = load_results([tmp_path])
    assert list(loaded.results) == results
    assert not loaded.problems


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_line_is_removed_and_its_run_repeated(tmp_path: Path, cut: int) -> None:
    with ResultWriter(tmp_path, META) as writer:
        writer.add(result())
        writer.add(result("q1"))
    file = tmp_path / RESULTS
    file.write_bytes(file.read_bytes()[:-cut])
    with ResultWriter(tmp_path, META) as writer:
        assert writer.done == {result().key}
        assert "torn" in writer.repairs[0]
        writer.add(result("q1"))
    assert [r.question for r in load_results([tmp_path]).results] == ["q0", "q1"]


def test_a_folder_belongs_to_one_way_of_measuring_and_one_writer(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META) as writer:
        writer.add(result())
        with (
            pytest.raises(BenchError, match="another process"),
            ResultWriter(tmp_path, META),
        ):
            pass
    with (
        pytest.raises(BenchError, match="model 'm', now 'other'"),
        ResultWriter(tmp_path, {**META, "model": "other"}),
    ):
        pass
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"question": 1}\n')
    with pytest.raises(BenchError, match="line 2 is unusable"), ResultWriter(tmp_path, META):
        pass


def test_a_kill_before_the_first_result_and_what_an_earlier_version_wrote(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META):
        pass
    (tmp_path / RESULTS).unlink()
    with pytest.raises(BenchError, match="no results yet"):
        load_results([tmp_path])
    more = {**META, "split": "test"}
    with ResultWriter(tmp_path, more) as writer:
        writer.add(result())
    with ResultWriter(tmp_path / "new", more) as writer:
        writer.add(result("q1"))
    assert len(load_results([tmp_path, tmp_path / "new"]).results) == 2
    for folder, meta, message in (
        (tmp_path / "new", {**more, "split": "train"}, "split 'test', now 'train'"),
        (tmp_path / "new", META, "split 'test', now None"),
        (tmp_path, {**more, "model": "other"}, "model 'm', now 'other'"),
    ):
        with pytest.raises(BenchError, match=message), ResultWriter(folder, meta):
            pass


def test_one_memory_is_one_pool(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META) as writer:
        writer.check_pool("0.9 of memory", 10_000)
        writer.add(result(memory="0.9 of memory", pool=10_000))
        writer.check_pool("0.9 of memory", 10_099)  # another start
        with pytest.raises(BenchError, match=r"11000 tokens.*'0\.9 of memory'.*with 10000"):
            writer.check_pool("0.9 of memory", 11_000)
        writer.check_pool("0.5 of memory", 5_000)
    with ResultWriter(tmp_path, META) as writer, pytest.raises(BenchError, match="another folder"):
        writer.check_pool("0.9 of memory", 9_000)


def test_shards_count_as_one(tmp_path: Path) -> None:
    for shard, question in (("a", "q0"), ("b", "q1")):
        with ResultWriter(tmp_path / shard, META) as writer:
            writer.add(result(question))
            writer.add(result("both"))
    loaded = load_results([tmp_path / "a", tmp_path / "b"])
    assert sorted(r.question for r in loaded.results) == ["both", "q0", "q1"]
    assert "repeats" in loaded.problems[0]
    with ResultWriter(tmp_path / "c", {**META, "dataset": "other"}):
        pass
    with pytest.raises(BenchError, match="different ways \\(dataset\\)"):
        load_results([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(BenchError, match="no usable"):
        load_results([tmp_path])


def test_repeats_of_a_question_are_no_new_questions() -> None:
    one = mean_of({"a": [1.0], "b": [0.0], "c": [1.0]})
    many = mean_of({"a": [1.0] * 9, "b": [0.0] * 9, "c": [1.0] * 9})
    assert one == many
    assert one.value == pytest.approx(2 / 3)
    assert one.error == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
    assert math.isnan(mean_of({"a": [1.0, 0.0]}).error)


def test_the_permutation_test_is_exact_for_few_questions() -> None:
    rng = np.random.default_rng(0)
    # Of 2^5 flips only all and none give a mean as far from zero.
    assert permutation_p(np.ones(5), rng) == pytest.approx(2 / 32)
    assert permutation_p(np.asarray([1.0, 0.0, 0.0, -1.0]), rng) == 1.0
    assert permutation_p(np.zeros(30), rng) == 1.0
    assert permutation_p(np.asarray([0.0, 0.5, 0.0]), rng) == 1.0
    assert permutation_p(np.ones(40), rng) == pytest.approx(1 / 10_001)
    mixed = np.asarray([1.0] * 11 + [-1.0] * 9)
    assert permutation_p(mixed, rng) > 0.5


def test_the_permutation_test_keeps_its_level() -> None:
    draws = np.random.default_rng(1)
    found = [
        permutation_p(draws.choice((-1.0, 0.0, 1.0), 30), np.random.default_rng(i), 500)
        for i in range(200)
    ]
    assert np.mean(np.asarray(found) < 0.05) < 0.1


def test_comparisons_are_paired_by_question() -> None:
    # The questions differ a lot, the methods by one always.
    hard = {f"q{i}": [10.0 * i] for i in range(20)}
    easier = {f"q{i}": [10.0 * i - 1.0, 10.0 * i - 1.0] for i in range(20)}
    found = compare({**easier, "only here": [0.0]}, hard)
    assert found is not None and found.questions == 20
    assert found.difference.low == found.difference.high == pytest.approx(-1.0)
    assert found.p_value < 0.001
    assert found.ratio.value == pytest.approx(94.0 / 95.0)
    assert compare({"a": [1.0]}, {"b": [1.0]}) is None


def some_results() -> list[TrialResult]:
    found = []
    for q in range(6):
        for repeat in range(2):
            right = q % 2 == 0
            found += [
                result(f"q{q}", correct=right, latency=4.0 + q, repeat=repeat),
                result(f"q{q}", "step", correct=True, latency=1.0 + q, repeat=repeat),
                result(f"q{q}", "cot", n=1, correct=right, latency=0.5, repeat=repeat),
            ]
    return found


def test_summaries_compare_with_sc_of_the_same_memory() -> None:
    other = replace(result("q0", "step"), memory="1024 tokens")
    found = summarize([*some_results(), other])
    assert [(s.method, s.n, s.memory) for s in found] == [
        ("cot", 1, "512 tokens"),
        ("sc", 2, "512 tokens"),
        ("step", 2, "512 tokens"),
        ("step", 2, "1024 tokens"),
    ]
    cot, sc, step, alone = found
    assert cot.accuracy_gap is None and sc.accuracy_gap is None and alone.accuracy_gap is None
    assert step.accuracy_gap is not None
    assert step.accuracy_gap.difference.value == pytest.approx(0.5)
    assert step.accuracy_gap.p_value == pytest.approx(2 / 8)  # three questions differ
    assert step.latency_gap is not None
    assert step.latency_gap.ratio.value == pytest.approx(3.5 / 6.5)
    assert (sc.runs, sc.questions) == (12, 6)
    assert (sc.tokens.value, sc.pruned, sc.wait) == (140.0, 1.0, 1.0)
    assert sc.longest_wait == 1.5 and sc.usage == pytest.approx(0.6) and sc.peak_usage == 0.8


def test_any_method_may_be_the_one_to_compare_with() -> None:
    cot, sc, step = summarize(some_results(), "step")
    assert cot.latency_gap is None and step.latency_gap is None  # one trace is another n
    assert sc.latency_gap is not None
    assert sc.latency_gap.ratio.value == pytest.approx(6.5 / 3.5)
    assert "latency / STEP" in accuracy_table([sc, step], "STEP").head


def test_the_report_has_tables_and_plots(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META) as writer:
        for one in some_results():
            writer.add(one)
    written = write_report([tmp_path], tmp_path)
    assert {f.name for f in written.files} == {
        "report.md", "report.tex", "latency.png", "latency.pdf", "breakdown.png", "breakdown.pdf",
    }  # fmt: skip
    for file in written.files:
        assert file.stat().st_size > 500
    assert "Tokens of" not in written.markdown
    assert "| STEP | 2 | 100.0 ± 0.0 | 140 ± 0 | 3.50 ± 0.76 | +50.0 [" in written.markdown
    tex = (tmp_path / "report.tex").read_text()
    assert tex.count(r"\toprule") == 3 and r"100.0 $\pm$ 0.0" in tex
    table = accuracy_table(summarize(some_results()))
    lines = markdown(table).splitlines()
    assert len(lines) == 4 + len(table.rows)
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert latex(table).count(r"\\") == 1 + len(table.rows)


def voted(question: str, scores: dict[str, list[float]], **changes: object) -> TrialResult:
    """A trial of `step` whose traces gave these answers with these scores; 5 is right."""
    traces = tuple(
        replace(FINISHED, answer=answer, correct=answer == "5", score=score)
        for answer, theirs in scores.items()
        for score in theirs
    )
    return result(question, "step", n=len(traces), traces=traces, **changes)


def test_the_same_traces_under_three_votes(tmp_path: Path) -> None:
    doubtful = {"3": [0.5, 0.5, 0.5], "5": [0.7, 0.7]}  # right by odds alone
    unlikely = {"3": [0.5, 0.5, 0.5], "5": [0.9, 0.9]}  # by score too
    results = [
        voted("q0", doubtful, calibration=(2.2, -0.9)),
        voted("q1", unlikely, calibration=(2.2, -0.9)),
    ]
    with ResultWriter(tmp_path, META) as writer:
        for one in results:
            writer.add(one)
    assert list(load_results([tmp_path]).results) == results
    (row,) = vote_rows(results)
    assert {vote: mean.value for vote, mean in row.accuracy.items()} == {
        "majority": 0.0, "weighted": 0.5, "calibrated": 1.0,
    }  # fmt: skip
    assert row.gain is not None and row.gain.difference.value == 0.5
    assert "| STEP | 5 | 512 tokens | 0.0 ± 0.0 | 50.0 ± 50.0 | 100.0 ± 0.0 | +50.0 [" in (
        write_report([tmp_path], tmp_path).markdown
    )
    # What an earlier version measured states no calibration: it can be given.
    old = [replace(one, calibration=None) for one in results]
    (row,) = vote_rows(old)
    assert set(row.accuracy) == {"majority", "weighted"} and row.gain is None
    (row,) = vote_rows(old, TraceCalibration(2.2, -0.9))
    assert row.accuracy["calibrated"].value == 1.0


def test_votes_that_the_records_cannot_tell_are_left_out() -> None:
    whole = voted("q0", {"5": [0.7, 0.7]})
    cut = replace(whole, traces=(replace(FINISHED, fate="cancelled"), FINISHED))
    unscored = replace(whole, traces=(replace(FINISHED, score=None), FINISHED))
    branched = replace(whole, n=1)
    assert len(vote_rows([whole])) == 1
    for one in (cut, unscored, branched):
        assert vote_rows([one]) == []
    assert vote_rows([whole, replace(cut, question="q1")]) == []  # one trial is enough


def test_an_early_end_has_its_footnote(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META) as writer:
        for one in some_results():
            cut = replace(one.traces[0], fate="cancelled")
            early = replace(one, method="step-early", traces=(cut, *one.traces[1:]))
            writer.add(early if one.method == "step" else one)
    text = write_report([tmp_path], tmp_path).markdown
    notes = [line for line in text.splitlines() if line.startswith("Tokens of")]
    assert len(notes) == 1
    assert notes[0].startswith("Tokens of STEP, ends early, n = 2, ")
    assert notes[0].endswith("without the latter by at most 15 a question.")
    head = next(line for line in text.splitlines() if "ended early" in line)
    broken = [line for line in text.splitlines() if line.startswith("| STEP, ends early")][1]
    assert broken.split("|")[head.split("|").index(" ended early ")].strip() == "1.0"


def test_several_memories_become_a_column_and_a_plot(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META) as writer:
        for memory in ("0.9 of memory", "0.5 of memory"):
            for one in some_results():
                writer.add(replace(one, memory=memory))
    written = write_report([tmp_path], tmp_path)
    assert "memory.png" in {f.name for f in written.files}
    rows = [line for line in written.markdown.splitlines() if line.startswith("| STEP")]
    assert [row.split(" | ")[2] for row in rows[:2]] == ["0.5 of memory", "0.9 of memory"]


def test_results_are_plain_json(tmp_path: Path) -> None:
    with ResultWriter(tmp_path, META) as writer:
        writer.add(result())
    line = json.loads((tmp_path / RESULTS).read_text())
    assert line["traces"]["tokens"] == [100, 40]
    assert line["usage"][1] == [1.0, 0.8, 1, 1]


def test_rows_are_of_the_same_questions(tmp_path: Path) -> None:
    fewer = [r for r in some_results() if (r.method, r.question) != ("sc", "q5")]
    kept, told = in_common([*fewer, replace(result("q9", "step"), memory="1024 tokens")])
    assert {r.question for r in kept} == {*(f"q{i}" for i in range(5)), "q9"}
    (line,) = told
    assert line.startswith("512 tokens: 1 of 6 questions are left out, as not every method has")
    assert "sc n=2 5" in line and "step n=2 6" in line
    assert in_common(some_results()) == (tuple(some_results()), ())
    apart = [result("a"), result("b", "step")]
    assert in_common(apart)[0] == tuple(apart) and "no question is one" in in_common(apart)[1][0]
    with ResultWriter(tmp_path, META) as writer:
        for one in fewer:
            writer.add(one)
    written = write_report([tmp_path], tmp_path)
    assert "5 questions, 2 repeats, 30 runs." in written.heading
    assert line in written.warnings and "| STEP | 2 | 100.0 ± 0.0 | 140 ± 0 | 3.00" in (
        written.markdown
    )


def test_what_a_decided_vote_cut_short_and_how_long_it_waited(tmp_path: Path) -> None:
    cut = replace(FINISHED, wait=None, prefill=None, decode=None, answer=None)
    traces = (
        replace(FINISHED, wait=1.0),
        replace(cut, fate="shrunk", wait=2.0),
        replace(cut, fate="cancelled", tokens=0),  # never began: waited all the time
        replace(cut, fate="cancelled"),  # began, nobody knows when
        replace(cut, fate="aborted"),
    )
    one = result("q0", "step-fast", n=5, traces=traces, latency=12.0, phases=(12.0,))
    (row,) = summarize([one])
    assert (row.ended, row.cancelled, row.aborted) == (3, 2, 1)
    assert row.wait == pytest.approx((1 + 2 + 12) / 3) and row.longest_wait == 12
    with ResultWriter(tmp_path, META) as writer:
        writer.add(one)
    written = write_report([tmp_path], tmp_path)
    assert any("1 traces were aborted by the server" in warning for warning in written.warnings)
    assert breakdown_table([row]).rows[0][8] == "3.0"


def test_a_plot_names_its_pool() -> None:
    _, sc, step = summarize(some_results())
    for shown, title in (
        ([sc, step], "2 traces a question, KV pool: 512 tokens; bars: standard error"),
        ([sc, replace(step, n=4)], "KV pool: 512 tokens; bars: standard error"),
    ):
        figure = accuracy_against_latency(shown)
        assert figure.axes[0].get_title() == title
        pyplot.close(figure)
