"""`step-sglang simulate` in the model of the scheduler: refusals, resuming, figures, labels."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import pyplot
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.errors import StepError
from step_sglang.evaluation.cost_model import CostModel, Roofline
from step_sglang.evaluation.modelled import MODELLED
from step_sglang.evaluation.simulated import OUTCOMES, OutcomeWriter, read_outcomes
from step_sglang.evaluation.simulation_report import draw, rows_of, write_report
from step_sglang.evaluation.simulation_setup import (
    SimulateOptions,
    run_modelled,
    set_up,
    time_of,
)
from step_sglang.evaluation.simulator import DecodeStep
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace, write_group
from step_sglang.scoring.scorer import load_scorer
from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.gpu import GPUS, NETWORKS, step_time
from step_sglang.simulation.model import write_player
from step_sglang.simulation.speed import Speed

POOL = 30_000


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    """Three questions with 40 traces of 1,000 to 5,000 tokens."""
    traces = [[1000 + 100 * i, 0 if i % 3 else 1 + i % 4, []] for i in range(40)]
    file = tmp_path / "lengths.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"questions": [{"traces": traces}] * 3}).encode()))
    return file


def options(source: object, **more: object) -> SimulateOptions:
    chosen = SimulateOptions((str(source),), pools=(POOL,), ns=(16,), max_new_tokens=6000)
    return replace(chosen, **more)  # type: ignore[arg-type]


def run(folder: Path, asked: SimulateOptions) -> int:
    """Simulate into a folder; returns how many outcomes were new."""
    simulation = set_up(asked)
    with OutcomeWriter(folder, simulation.meta) as writer:
        before = len(writer.done)
        run_modelled(simulation, writer, lambda found: None)
        return len(writer.done) - before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"gpu": "h10"}, r"no GPU preset 'h10' \(did you mean 'h100'\?\)"),
        ({"model": "qwen-8b"}, r"no model preset 'qwen-8b' \(did you mean 'qwen3-8b'\?\)"),
        ({"methods": "sc,stepp"}, r"'stepp' cannot be simulated \(did you mean 'step'\?\)"),
        ({"pools": (4000,)}, "a pool of 4,000 KV tokens cannot hold the longest trace"),
        ({"aucs": (0.3,)}, "--auc is at least 0.5"),
        ({"scheduler": "modell"}, r"--scheduler is model or sglang.*'model'"),
        ({"questions": 4}, "has 3 questions, not 4"),
        ({"step_time": 0.0}, "--step-time is a factor"),
        ({"recorded_speed": True}, "--recorded-speed is for folders"),
    ],
)
def test_what_cannot_be_simulated_is_one_message_before_anything_runs(
    lengths: Path, more: dict[str, object], says: str
) -> None:
    with pytest.raises(SimulationError, match=says):
        set_up(options(lengths, **more))


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SimulationError, match=r"generato does not exist \(did you mean 'gener"):
        set_up(options("generato"))
    with pytest.raises(SimulationError, match="run bench with --record"):
        set_up(options(tmp_path))


def test_a_damaged_record_is_named(lengths: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(folder, options(lengths, methods="sc", questions=1))
    file = folder / OUTCOMES
    whole = file.read_text()
    file.write_text(whole + '{"question": "0"}\n')
    with pytest.raises(SimulationError, match=r"simulated.jsonl line 2 is damaged \(members"):
        run(folder, options(lengths, methods="sc"))
    file.write_text(whole + '{"question"')  # torn by a kill: removed
    assert run(folder, options(lengths, methods="sc")) == 2


def test_a_simulation_goes_on_where_it_was(lengths: Path, tmp_path: Path) -> None:
    asked = options(lengths, methods="sc,step,random", ns=(8, 16), aucs=(0.6, 0.8))
    assert run(tmp_path / "out", replace(asked, questions=2)) == 2 * 3 * 2 * 2
    assert run(tmp_path / "out", asked) == 3 * 2 * 2
    assert run(tmp_path / "out", asked) == 0
    assert run(tmp_path / "whole", asked) == 3 * 3 * 2 * 2
    kept = [set(read_outcomes(tmp_path / name)[1]) for name in ("out", "whole")]
    assert kept[0] == kept[1]
    with pytest.raises(SimulationError, match="other settings"):
        run(tmp_path / "out", replace(asked, seed=1))


def test_every_method_ends_every_question(lengths: Path, tmp_path: Path) -> None:
    asked = options(lengths, methods=",".join(MODELLED), draws=2, at_once=2)
    run(tmp_path / "out", asked)
    rows = {row.method: row for row in rows_of(read_outcomes(tmp_path / "out")[1])}
    assert set(rows) == set(MODELLED) and {row.questions for row in rows.values()} == {3}
    assert rows["sc"].pruned == 0 and rows["sc"].retracted + rows["sc"].wait > 0
    assert rows["step"].pruned > 0 and rows["step"].seconds.value < rows["sc"].seconds.value
    assert rows["step-fast"].seconds.value < rows["step"].seconds.value
    assert rows["step-early"].ended > 0 and rows["step"].ended == 0
    assert rows["random-fast"].pruned == pytest.approx(rows["step-fast"].pruned, rel=0.3)


def test_questions_at_once_share_the_pool(lengths: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        run(tmp_path / str(number), options(lengths, methods="sc,step", at_once=number))
    alone, crowd = (rows_of(read_outcomes(tmp_path / n)[1]) for n in ("1", "3"))
    assert [row.method for row in crowd] == ["sc", "step"]
    for one, three in zip(alone, crowd, strict=True):
        assert three.seconds.value > one.seconds.value
    assert crowd[1].pruned > alone[1].pruned


def test_scores_change_nothing_for_a_majority(lengths: Path, tmp_path: Path) -> None:
    asked = options(lengths, methods="sc,step", aucs=(0.55, 0.9), ns=(32,))
    run(tmp_path / "out", asked)
    bad, good = ([o for o in read_outcomes(tmp_path / "out")[1] if o.auc == x] for x in asked.aucs)
    assert [replace(o, auc=None) for o in bad if o.method == "sc"] == [
        replace(o, auc=None) for o in good if o.method == "sc"
    ]
    assert [o.tokens for o in bad] != [o.tokens for o in good]


def test_times_are_factors_of_the_seconds(lengths: Path, tmp_path: Path) -> None:
    found = []
    for more in ({}, {"step_time": 1.2}, {"attention_time": 1.2}):
        folder = tmp_path / str(len(found))
        run(folder, options(lengths, methods="step", **more))
        found.append(rows_of(read_outcomes(folder)[1])[0].seconds.value)
    assert found[1] == pytest.approx(1.2 * found[0])
    assert found[0] < found[2] < found[1]


def test_recorded_groups_are_played_with_their_own_scores(tmp_path: Path) -> None:
    def trace(tokens: int, right: bool) -> RecordedTrace:
        places = tuple(range(9, tokens - 3, 10))
        scores = (0.8 if right else 0.2,) * len(places)
        times = [0.5 * i for i in range(tokens)]
        answer = "7.0" if right else "3"
        return RecordedTrace("finished", answer, right, scores[0], times, (), places, scores, "x")

    traces = tuple(trace(100 + 10 * i, i % 2 == 0) for i in range(12))
    write_group(tmp_path, RecordedGroup("q", 0, "7", 20, 400, 60.0, traces))
    asked = options(tmp_path, methods="sc,step", pools=(700,), ns=(12,), recorded_speed=True)
    run(tmp_path / "out", asked)
    sc, step = sorted(read_outcomes(tmp_path / "out")[1], key=lambda outcome: outcome.method)
    assert step.correct and step.pruned > 0 and step.auc is None
    assert sc.seconds > 0.5 * 210 > 0  # steps of half a second
    with pytest.raises(SimulationError, match=r"-n 13: the groups of .* have 12 traces"):
        set_up(replace(asked, ns=(13,)))
    with pytest.raises(StepError, match="cannot hold the longest trace"):
        set_up(replace(asked, pools=(200,)))
    next((tmp_path / "traces").iterdir()).write_bytes(b"no gzip")
    with pytest.raises(StepError, match="is damaged"):
        set_up(asked)


def test_a_row_of_a_recorded_speed_costs_once_and_a_question_its_overhead(tmp_path: Path) -> None:
    prices = CostModel(base=0.01, per_trace=0.001, per_token=1e-6, overhead=0.2)
    time = time_of(prices)
    for rows, attended in ((1, 100), (32, 4000)):
        expected = prices.base + rows * prices.per_trace + attended * prices.per_token
        assert time.decode(rows, attended) == pytest.approx(expected)
    moments = [DecodeStep(4, 1000, 0, 3)]
    assert Roofline(Speed(time, overhead=5.0)).seconds(moments) == pytest.approx(
        5.0 + Roofline(Speed(time)).seconds(moments)
    )
    # 100 stamps half a second apart, of 60 s.
    write_group(tmp_path, recorded([0.5] * 3, [0.7] * 2))
    simulation = set_up(options(tmp_path, pools=(900,), ns=(5,), recorded_speed=True))
    assert simulation.speed.overhead == pytest.approx(60 - 99 * 0.5)
    assert simulation.meta["overhead"] == simulation.speed.overhead
    assert simulation.step_times and "the recorded groups, as no trial" in simulation.step_times


def recorded(
    wrong: list[float], right: list[float], calibration: tuple[float, float] | None = None
) -> RecordedGroup:
    """A question whose traces of 100 tokens have these scores."""
    places = tuple(range(9, 90, 10))
    times = [0.5 * i for i in range(100)]
    traces = tuple(
        RecordedTrace(
            "finished", "5" if good else "3", good, score, times, (), places,
            (score,) * len(places), "x",
        )
        for good, scores in ((False, wrong), (True, right))
        for score in scores
    )  # fmt: skip
    return RecordedGroup("q", 0, "5", 20, 400, 60.0, traces, calibration)


@pytest.mark.parametrize("calibration", [(2.2, -0.9), None])
def test_recorded_scores_vote_by_their_scorers_odds(
    tmp_path: Path, calibration: tuple[float, float] | None
) -> None:
    group = recorded([0.5] * 3, [0.7] * 2, calibration)  # right by odds alone
    write_group(tmp_path, group)
    asked = options(tmp_path, methods="step", pools=(900,), ns=(5,))
    run(tmp_path / "out", asked)
    (outcome,) = read_outcomes(tmp_path / "out")[1]
    assert outcome.pruned == 0 and outcome.correct == (calibration is not None)
    # The real scheduler's scorer states the same.
    played = set_up(asked).source.group(0, 0, 5, None)
    info = load_scorer(write_player(tmp_path / "player", [played], 500).scorer).info
    assert (info.calibration and info.calibration.pair) == calibration
    with pytest.raises(SimulationError, match="calibrations, and a server has one"):
        write_player(tmp_path / "two", [played, replace(played, calibration=(1.0, 0.0))], 500)


def test_groups_of_a_question_that_differ_in_size_alone_are_two(tmp_path: Path) -> None:
    for wrong in (4, 6):
        write_group(tmp_path, recorded([0.5] * wrong, [0.7] * 4))
    asked = options(tmp_path, methods="sc,step", pools=(1400,), ns=(8,), at_once=2)
    assert run(tmp_path / "out", asked) == 4 == set_up(asked).total
    assert {o.question for o in read_outcomes(tmp_path / "out")[1]} == {"q of 8", "q of 10"}
    assert run(tmp_path / "out", asked) == 0


def test_outcomes_of_earlier_code_are_not_gone_on_with(lengths: Path, tmp_path: Path) -> None:
    asked = options(lengths, methods="sc", questions=1)
    run(tmp_path / "out", asked)
    file = tmp_path / "out" / "simulation.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    with pytest.raises(SimulationError, match="version 1, now 2"):
        run(tmp_path / "out", asked)
    assert write_report(tmp_path / "out").files  # what they say is still shown


def test_a_roofline_computes_beyond_some_hundred_rows() -> None:
    speed = Speed(step_time(GPUS["h100"], NETWORKS["qwen3-8b"]))
    moments = [DecodeStep(4, 1000, 0, 3), DecodeStep(900, 1000, 0)]
    expected = sum(speed.decode(4, 1000 + 4 * i) for i in range(3)) + speed.decode(900, 1000)
    assert Roofline(speed).seconds(moments) == pytest.approx(expected)
    assert Roofline(speed).seconds(moments, 10) > expected


def test_the_command_marks_every_line(lengths: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [
        "simulate", str(lengths), "-o", str(folder), "--pool", str(POOL), "--n", "8,16",
        "--methods", "sc,step,step-fast", "--max-new-tokens", "6000", "--draws", "2",
    ]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    text = (folder / "simulated.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| simulated")]
    assert all(line.startswith("| simulated | 30,000 |") for line in rows[:6])
    # And a line per cell: what each method has over SC, of whose time.
    for line, n, of in zip(rows[6:], ("8", "16"), (rows[:3], rows[3:6]), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:5] == ["simulated", "1", "30,000", n, "0.7"]
        for row, cell in zip(of[1:], cells[6:], strict=True):
            gap, ratio = (row.split("|")[place].split()[0] for place in (7, 9))
            assert cell == f"{gap} / {ratio}"
    assert not [line for line in text.splitlines() if "|" in line and "simulated" not in line][4:]
    assert (folder / "simulated-auc-0.7.png").stat().st_size > 5000
    meta, outcomes = read_outcomes(folder)
    figure = draw(rows_of(outcomes), meta, 0.7)
    assert figure.axes[0].get_title() == "simulated, 30,000 KV tokens, an AUC of 0.7"
    pyplot.close(figure)
    assert "3 questions, one at a time, 2 draws" in write_report(folder).table.caption


def test_the_command_refuses_before_it_makes_a_folder(lengths: Path, tmp_path: Path) -> None:
    command = ["simulate", str(lengths), "-o", str(tmp_path / "out"), "--gpu", "h1000"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, StepError) and not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*command[:4], "--auc", "much"])
    assert "--auc takes numbers" in str(result.exception)


def test_both_commands_say_where_their_step_times_come_from(tmp_path: Path) -> None:
    write_group(tmp_path, recorded([0.5] * 3, [0.7] * 2))
    told = "step times: the recorded groups, as no trial was timed; "
    for command in (
        ["simulate", str(tmp_path), "-o", str(tmp_path / "out"), "--recorded-speed",
         "--methods", "sc", "--n", "5"],
        ["replay", str(tmp_path), "--policies", "none"],
    ):  # fmt: skip
        result = CliRunner().invoke(app, [*command, "--pool", "900"])
        assert result.exit_code == 0, result.output
        assert told in " ".join(result.output.split()), result.output
