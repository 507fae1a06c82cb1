"""The votes that measured traces would have had: by trace score, by odds, by number.

What a trace weighs changes nothing that an engine did, so the votes are read from the records. Not
where a method's traces branch, whose families a record does not hold, nor where the group ended by
one vote: another might have gone on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from step_sglang.evaluation.methods import METHODS
from step_sglang.evaluation.stats import Mean, Paired, compare, mean_of
from step_sglang.evaluation.trial_result import TrialResult
from step_sglang.protocol import VOTE_CALIBRATED
from step_sglang.scoring.calibration import TraceCalibration, calibration_of
from step_sglang.scoring.scorer import load_scorer
from step_sglang.voting.tally import Ballot, tallying, weight_of
from step_sglang.voting.verifier import AnswerVerifier

RAW = "weighted"
SHOWN = ("majority", RAW, VOTE_CALIBRATED)


@dataclass(frozen=True)
class VoteRow:
    """One method with n traces in one memory, under three votes."""

    method: str
    title: str
    n: int
    memory: str
    accuracy: dict[str, Mean]  # by vote; without a calibration `calibrated` is missing
    gain: Paired | None  # of the calibrated vote over the one by trace score


def stated_by(scorer: Path | None) -> TraceCalibration | None:
    """The calibration of a scorer file; raises ScorerError."""
    return None if scorer is None else load_scorer(scorer).info.calibration


def vote_rows(
    results: Sequence[TrialResult], calibration: TraceCalibration | None = None
) -> list[VoteRow]:
    """The votes of every method whose finished traces have scores.

    Args:
        results: of all methods.
        calibration: for results that state none.
    """
    cells: dict[tuple[str, int, str], list[TrialResult]] = defaultdict(list)
    for result in results:
        if result.method in METHODS:
            cells[result.memory, result.n, result.method].append(result)
    verifier = AnswerVerifier()  # starts nothing unless it is asked
    try:
        return [
            _row(found, calibration, verifier) for found in cells.values() if _can_revote(found)
        ]
    finally:
        verifier.close()


def _can_revote(results: Sequence[TrialResult]) -> bool:
    scored = all(
        trace.score is not None
        for result in results
        for trace in result.traces
        if trace.fate == "finished" and trace.answer is not None
    )
    known = any(trace.score is not None for result in results for trace in result.traces)
    cut = any(result.ended for result in results)
    return scored and known and not cut and all(len(r.traces) <= r.n for r in results)


def _row(
    results: Sequence[TrialResult], given: TraceCalibration | None, verifier: AnswerVerifier
) -> VoteRow:
    right: dict[str, dict[str, list[float]]] = {vote: defaultdict(list) for vote in SHOWN}
    for result in results:
        calibration = calibration_of(result.calibration) or given
        for vote in SHOWN:
            if vote != VOTE_CALIBRATED or calibration is not None:
                value = float(_is_right(result, vote, calibration, verifier))
                right[vote][result.question].append(value)
    whole = {vote: dict(values) for vote, values in right.items() if len(values) == len(right[RAW])}
    first = results[0]
    return VoteRow(
        first.method,
        METHODS[first.method].title,
        first.n,
        first.memory,
        {vote: mean_of(values) for vote, values in whole.items()},
        compare(whole[VOTE_CALIBRATED], whole[RAW]) if VOTE_CALIBRATED in whole else None,
    )


def _is_right(
    result: TrialResult,
    vote: str,
    calibration: TraceCalibration | None,
    verifier: AnswerVerifier,
) -> bool:
    voters = [t for t in result.traces if t.fate == "finished" and t.answer is not None]
    ballots = [Ballot(str(t.answer), weight_of(t.score, vote, calibration)) for t in voters]
    tallies = verifier.comparison().run(tallying(ballots, vote))
    # The first trace of the winning answer was graded when it was measured.
    return bool(tallies) and voters[tallies[0].members[0]].correct
