"""Recorded traces, and what a replay makes of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.errors import SourceError
from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.errors import ReplayError
from step_sglang.evaluation.fitted_prices import fit_groups
from step_sglang.evaluation.ranking import build, recorded_rankings
from step_sglang.evaluation.replay import (
    POLICIES,
    WATERMARKED,
    ReplayOutcome,
    calibrated_by,
    is_right,
    predict,
    simulate,
    split_groups,
)
from step_sglang.evaluation.simulator import DecodeStep, Request, Reserve
from step_sglang.evaluation.traces import (
    TRACES,
    RecordedGroup,
    RecordedTrace,
    load_groups,
    write_group,
)
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.training.metrics import RUNNING_MEAN
from step_sglang.voting.session import VoteRules
from step_sglang.voting.tally import Ballot, tally, weight_of

STEP = 10  # tokens
PROMPT = 20
CLOCK = CostModel(base=0.01, per_trace=0.001, per_token=1e-6, overhead=0.1)


def trace(length: int, good: bool, draw: random.Random, times: list[float]) -> RecordedTrace:
    """A trace whose scores tell what it is worth, with some noise."""
    positions = tuple(range(STEP - 1, length - 1, STEP))
    scores = tuple((0.6 if good else 0.4) + 0.2 * (draw.random() - 0.5) for _ in positions)
    return RecordedTrace(
        fate="finished",
        answer="7" if good else "3",
        correct=good,
        score=float(np.mean(scores)) if scores else None,
        times=tuple(times[:length]),
        confidences=tuple(10 + draw.random() for _ in range(length)),
        positions=positions,
        step_scores=scores,
        text="x",
    )


def group(number: int, n: int = 16, good: int = 6) -> RecordedGroup:
    """A minority is right; all traces ran at the same time on a machine with known prices."""
    draw = random.Random(number)
    lengths = [draw.randint(60, 200) for _ in range(n)]
    times = [1e9]
    for step in range(1, max(lengths)):
        running = sum(length > step for length in lengths)
        moment = DecodeStep(running, running * step, 0)
        times.append(times[-1] + CLOCK.seconds([moment], PROMPT) - CLOCK.overhead)
    traces = tuple(trace(x, i < good, draw, times) for i, x in enumerate(lengths))
    return RecordedGroup(
        f"q{number}", 0, "7", PROMPT, 200, times[-1] - times[0] + CLOCK.overhead, traces
    )


GROUPS = [group(number) for number in range(8)]
CALIBRATED = [replace(one, calibration=(2.2, -0.9)) for one in GROUPS]
AMPLE, TIGHT = 10_000, 600


def test_recorded_traces_come_back_as_they_were(tmp_path: Path) -> None:
    again = replace(GROUPS[0].traces[0], text="one\u2028two\u2029three\u0085four\r\n")
    again_group = replace(GROUPS[0], repeat=1, traces=(again, *GROUPS[0].traces[1:]))
    for one in (*GROUPS[:2], again_group, GROUPS[0]):
        write_group(tmp_path, one)
    smaller = replace(GROUPS[0], traces=GROUPS[0].traces[:4])
    write_group(tmp_path, smaller)  # beside the others
    assert list(load_groups([tmp_path])) == [GROUPS[0], again_group, smaller, GROUPS[1]]
    problems: list[str] = []
    (tmp_path / "other").mkdir()
    write_group(tmp_path / "other", GROUPS[2])
    write_group(tmp_path / "other", replace(GROUPS[0], gold="other"))
    both = list(load_groups([tmp_path, tmp_path / "other"], problems.append))
    assert both == [GROUPS[0], again_group, smaller, GROUPS[1], GROUPS[2]]
    assert len(problems) == 1 and "repeats a group; the first counts" in problems[0]
    (tmp_path / TRACES / "q0-4-0.jsonl.gz").unlink()
    file = next((tmp_path / TRACES).iterdir())
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ReplayError, match="damaged"):
        list(load_groups([tmp_path]))
    with pytest.raises(ReplayError, match="--record"):
        list(load_groups([tmp_path / "elsewhere"]))


def test_the_clock_finds_the_prices_of_the_machine() -> None:
    cost_model = fit_groups(GROUPS)
    assert cost_model.base == pytest.approx(CLOCK.base, rel=0.05)
    assert cost_model.per_trace == pytest.approx(CLOCK.per_trace, rel=0.05)
    assert cost_model.per_token == pytest.approx(CLOCK.per_token, rel=0.2)
    assert cost_model.overhead == pytest.approx(CLOCK.overhead, rel=0.05)
    with pytest.raises(ReplayError, match="too short"):
        fit_groups([replace(GROUPS[0], traces=(trace(1, True, random.Random(0), [1.0]),))])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_large_pool_changes_nothing(policy: str) -> None:
    for one in GROUPS[:3]:
        fate = simulate(one, policy, AMPLE, CLOCK)
        assert fate.finished == one.traces
        assert (fate.pruned, fate.retracted, fate.wait_share) == (0, 0, 0.0)
        assert fate.tokens == sum(t.tokens for t in one.traces)
        assert fate.steps == max(t.tokens for t in one.traces)
        # Its first step reads the prompts' last tokens, which the recorded cost_model did not see.
        assert fate.seconds == pytest.approx(one.latency, rel=0.05)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_small_pool_makes_traces_wait_or_prunes_them(policy: str) -> None:
    for one in GROUPS:
        fate = simulate(one, policy, TIGHT, CLOCK)
        assert len(fate.finished) + fate.pruned == len(one.traces)
        if policy == "none":
            assert fate.pruned == 0 and fate.wait_share > 0.1
            assert fate.tokens == sum(t.tokens for t in one.traces)
        else:
            assert fate.pruned > 0 and len(fate.finished) >= 1
            assert fate.tokens < sum(t.tokens for t in one.traces)
            assert fate.steps <= max(t.tokens for t in one.traces) + 1


def test_score_pruning_keeps_the_right_traces_and_longest_first_the_short_ones() -> None:
    def kept(policy: str) -> tuple[float, float]:
        fates = [simulate(one, policy, TIGHT, CLOCK, seed=i) for i, one in enumerate(GROUPS)]
        finished = [t for fate in fates for t in fate.finished]
        return (
            float(np.mean([t.correct for t in finished])),
            float(np.mean([t.tokens for t in finished])),
        )

    fair, lots, longest = kept("fair"), kept("random"), kept("longest")
    assert fair[0] > lots[0] + 0.2
    assert longest[1] < lots[1]


def test_predictions_by_policy_vote_and_pool() -> None:
    found = list(predict(GROUPS, ["none", "fair"], ["majority", "weighted"], [TIGHT, AMPLE], CLOCK))
    by = {(p.policy, p.vote, p.pool): p for p in found}
    assert len(by) == 8 and all(p.groups == 8 and p.n == 16 for p in found)
    assert by["none", "majority", TIGHT].accuracy.value == 0.0  # ten of sixteen are wrong
    assert by["fair", "majority", TIGHT].accuracy.value > 0.5
    tight, sc = by["fair", "weighted", TIGHT], by["none", "weighted", TIGHT]
    assert tight.seconds < sc.seconds and tight.tokens < sc.tokens
    ample = by["fair", "weighted", AMPLE]
    assert ample.seconds == by["none", "weighted", AMPLE].seconds


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("vote", ["weighted", "calibrated", "majority", "best"])
def test_an_exact_end_changes_no_answer_and_a_posterior_one_saves_more(
    policy: str, vote: str
) -> None:
    saved = dict.fromkeys(("exact", "posterior"), 0)
    for pool in (TIGHT, AMPLE):
        for one in CALIBRATED if vote == "calibrated" else GROUPS:
            whole = simulate(one, policy, pool, CLOCK)
            for rule in saved:
                fate = simulate(one, policy, pool, CLOCK, rules=VoteRules(vote, rule))
                assert len(fate.finished) + fate.pruned + fate.cancelled == len(one.traces)
                assert fate.steps <= whole.steps and fate.seconds <= whole.seconds
                # Up to the end everything went as it did in the whole group.
                finished = [t for t in whole.finished if t in fate.finished]
                assert list(fate.finished) == finished
                if rule == "exact":
                    assert winner(fate, vote) == winner(whole, vote)
                saved[rule] += whole.tokens - fate.tokens
    assert saved["posterior"] > 0
    assert saved["posterior"] >= saved["exact"]
    if vote == "majority":
        assert saved["exact"] > 0  # ten or more of sixteen agree


def winner(fate: ReplayOutcome, vote: str) -> str | None:
    voters = [t for t in fate.finished if t.answer is not None]
    weights = [weight_of(t.score, vote, fate.calibration) for t in voters]
    cast = [Ballot(str(t.answer), weight) for t, weight in zip(voters, weights, strict=True)]
    tallies = tally(cast, vote=vote)
    return tallies[0].answer if tallies else None


def test_odds_as_weights_make_good_traces_count_for_more() -> None:
    """Six good traces of score .6 against ten of .4: outvoted by score, not by odds."""
    steep = [replace(one, calibration=(6.0, 0.0)) for one in GROUPS]
    found = list(predict(steep, ["none"], ["weighted", "calibrated"], [AMPLE], CLOCK))
    assert [p.accuracy.value for p in found] == [0.0, 1.0]
    # Without one it is the vote by trace score, also where a group ends early by it.
    for rule in ("off", "exact"):
        found = list(
            predict(GROUPS, ["none"], ["weighted", "calibrated"], [AMPLE], CLOCK, early=[rule])
        )
        assert found[0] == replace(found[1], vote="weighted")


def test_records_without_a_calibration_take_that_of_a_scorer(tmp_path: Path) -> None:
    for one in (GROUPS[0], CALIBRATED[1]):
        write_group(tmp_path, one)
    again = list(load_groups([tmp_path]))
    assert [one.calibration for one in again] == [None, (2.2, -0.9)]
    given = calibrated_by(again, TraceCalibration(1.5, 0.0))
    assert [one.calibration for one in given] == [(1.5, 0.0), (2.2, -0.9)]
    assert calibrated_by(again, None) == again


def test_a_share_of_the_pool_prunes_more_and_ends_sooner() -> None:
    for policy in WATERMARKED:
        whole = [simulate(one, policy, TIGHT, CLOCK) for one in GROUPS]
        same = [simulate(one, policy, TIGHT, CLOCK, prune_at=1) for one in GROUPS]
        half = [simulate(one, policy, TIGHT, CLOCK, prune_at=0.5) for one in GROUPS]
        assert whole == same
        assert sum(f.pruned for f in half) > sum(f.pruned for f in whole)
        assert sum(f.tokens for f in half) < sum(f.tokens for f in whole)
    for policy in set(POLICIES) - set(WATERMARKED):
        with pytest.raises(ReplayError, match="has no share of the pool"):
            simulate(GROUPS[0], policy, TIGHT, CLOCK, prune_at=0.5)


def test_predictions_by_share_and_early_end() -> None:
    found = list(
        predict(
            GROUPS[:2], ["none", "fair"], ["weighted"], [TIGHT], CLOCK,
            early=["off", "posterior"], prune_at=[1.0, 0.5],
        )
    )  # fmt: skip
    assert [(p.policy, p.prune_at, p.early) for p in found] == [
        ("none", 1.0, "off"), ("none", 1.0, "posterior"), ("fair", 1.0, "off"),
        ("fair", 1.0, "posterior"), ("fair", 0.5, "off"), ("fair", 0.5, "posterior"),
    ]  # fmt: skip
    assert all(p.cancelled == 0 for p in found if p.early == "off")


def test_votes_are_those_of_the_traces_that_finished() -> None:
    fate = simulate(GROUPS[0], "fair", AMPLE, CLOCK)
    assert not is_right(fate, "majority")
    assert is_right(fate, "best")
    assert not is_right(replace(fate, finished=()), "weighted")


def test_groups_of_fewer_traces_and_groups_that_were_pruned() -> None:
    assert [len(g.traces) for g in split_groups(GROUPS[:1], 5)] == [5, 5, 5]
    assert split_groups(GROUPS, None) == GROUPS
    cut = replace(GROUPS[0].traces[0], fate="pruned")
    pruned = replace(GROUPS[0], traces=(cut, *GROUPS[0].traces[1:]))
    assert split_groups([pruned, GROUPS[1]], None) == [GROUPS[1]]
    for groups, n in (([pruned], None), (GROUPS, 17)):
        with pytest.raises(ReplayError, match="no recorded group"):
            split_groups(groups, n)


def test_what_cannot_be_replayed() -> None:
    with pytest.raises(ReplayError, match="no policy 'best'"):
        simulate(GROUPS[0], "best", AMPLE, CLOCK)
    with pytest.raises(ReplayError, match="cannot hold a trace of 20"):
        simulate(GROUPS[0], "none", 150, CLOCK)


def test_the_command_takes_lists_with_blanks(tmp_path: Path) -> None:
    for one in GROUPS[:2]:
        write_group(tmp_path, one)
    options = ("--pool", str(TIGHT), "--policies", "none, fair", "--votes", "weighted, best")
    ran = CliRunner().invoke(app, ["replay", str(tmp_path), *options, "--json"])
    assert ran.exit_code == 0, ran.output
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [(one["policy"], one["vote"], one["n"]) for one in found] == [
        ("none", "weighted", 16), ("none", "best", 16), ("fair", "weighted", 16),
        ("fair", "best", 16),
    ]  # fmt: skip
    shared = ("--policies", "fair", "--votes", "weighted", "--early", "off,posterior")
    more = ("--pool", str(TIGHT), *shared, "--prune-at", "1,0.5")
    ran = CliRunner().invoke(app, ["replay", str(tmp_path), *more])
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(app, ["replay", str(tmp_path), *more, "--json"])
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert [(one["prune_at"], one["early"]) for one in found] == [
        (1.0, "off"), (1.0, "posterior"), (0.5, "off"), (0.5, "posterior"),
    ]  # fmt: skip
    for share in ("0", "1.5", "half", ""):
        bad = ["replay", str(tmp_path), "--pool", str(TIGHT), "--prune-at", share]
        ran = CliRunner().invoke(app, bad)
        assert isinstance(ran.exception, SourceError), ran.output
        assert "--prune-at takes shares" in str(ran.exception)
    # Groups of another size are another measurement.
    write_group(tmp_path, replace(GROUPS[0], traces=GROUPS[0].traces[:4]))
    ran = CliRunner().invoke(app, ["replay", str(tmp_path), *options, "--json"])
    assert isinstance(ran.exception, ReplayError) and "4 and 16 traces" in str(ran.exception)
    ran = CliRunner().invoke(app, ["replay", str(tmp_path), *options, "--json", "-n", "8"])
    assert ran.exit_code == 0, ran.output


def test_admission_reserves_less_and_less() -> None:
    reserve = Reserve(1000)
    request = Request(0, 0, 500, generated=400)
    assert reserve.future(request) == 600
    assert Reserve(10_000).future(request) == 4096  # SGLang looks no further ahead
    before = reserve.ratio
    for _ in range(1000):
        reserve.decay()
    assert reserve.ratio == pytest.approx(0.14 * before)
    reserve.retracted([request])
    assert reserve.ratio == pytest.approx(420 / 1001)


def test_ranking_along_recorded_traces(tmp_path: Path) -> None:
    assert recorded_rankings([tmp_path], 20) is None
    for one in GROUPS:
        write_group(tmp_path, one)
    found = recorded_rankings([tmp_path], 20)
    assert found is not None
    assert found[RUNNING_MEAN][1.0].auc_within.value > 0.9
    assert found["minus length"][1.0].auc_within.value < 0.8
    table, scores = build([one.traces for one in GROUPS], 20)
    assert len(scores) == table.offsets[-1] == len(table.positions)
    assert table.num_steps.tolist() == [len(t.positions) for g in GROUPS for t in g.traces]
