from __future__ import annotations

import time

import pytest

from step_sglang.errors import VoteError
from step_sglang.voting.answers import (
    choice_letter,
    equivalent,
    extract_boxed,
    extract_choice,
    extract_number,
    extractor_named,
)
from step_sglang.voting.tally import Ballot, Poll, share_of, tally, weight_of
from step_sglang.voting.verifier import AnswerVerifier


def ballots(*pairs: tuple[str, float]) -> list[Ballot]:
    return [Ballot(answer, weight) for answer, weight in pairs]


def test_weighted_sums_and_merges_equivalent_answers() -> None:
    found = tally(ballots(("1/2", 0.3), ("3", 0.6), ("0.5", 0.4), ("\\frac{1}{2}", 0.1)))
    assert [(t.answer, t.count, t.members) for t in found] == [
        ("1/2", 3, (0, 2, 3)),
        ("3", 1, (1,)),
    ]
    assert found[0].weight == pytest.approx(0.8) and share_of(found) == pytest.approx(0.8 / 1.4)


def test_votes_can_differ() -> None:
    cast = [("7", 0.9), ("8", 0.5), ("8", 0.6), ("9", 0.1), ("9", 0.2), ("9", 0.3)]
    winners = {
        vote: tally(ballots(*((a, weight_of(s, vote)) for a, s in cast)), vote=vote)[0].answer
        for vote in ("weighted", "majority", "best")
    }
    assert winners == {"weighted": "8", "majority": "9", "best": "7"}


def test_ties_go_to_more_traces_then_to_the_first() -> None:
    assert tally(ballots(("a", 0.5), ("b", 0.25), ("b", 0.25)))[0].answer == "b"
    assert tally(ballots(("a", 0.5), ("b", 0.5)))[0].answer == "a"


def test_later_ballots_never_change_what_is_merged() -> None:
    def same(one: str, other: str) -> bool:  # near, hence not transitive
        return abs(int(one) - int(other)) <= 1

    poll = Poll(same=same)
    for ballot in ballots(("1", 0.1), ("3", 0.1)):
        poll.add(ballot)
    before = {t.answer: t.members for t in poll.tallies()}
    poll.add(Ballot("2", 0.9))
    after = {t.answer: t.members for t in poll.tallies()}
    assert after == {"1": (*before["1"], 2), "3": before["3"]}


def test_worthless_and_missing_ballots() -> None:
    assert tally([]) == [] and share_of([]) == 0.0
    assert share_of(tally(ballots(("a", 0.0), ("a", 0.0), ("b", 0.0)))) == pytest.approx(2 / 3)
    with pytest.raises(VoteError, match="weighted, majority, best"):
        Poll("plurality")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("B", "(B)", True),
        ("\\text{(b)}", "B.", True),
        ("B", "C", False),
        ("12", "12.0", True),
        ("12", "13", False),
        ("1{,}000", "1000", True),
        ("\\sqrt{4}", "2", True),
        ("x+1", "1+x", True),
    ],
)
def test_equivalence(one: str, other: str, same: bool) -> None:
    assert equivalent(one, other) is same and equivalent(other, one) is same


def test_extractors() -> None:
    assert extract_boxed("\\boxed{1} so \\boxed{\\frac{1}{2}} and \\boxed{3") == "\\frac{1}{2}"
    assert extract_boxed("\\boxed{}") is None
    assert extract_choice("The answer is (B). No, the answer is **C**.") == "C"
    assert extract_choice("so \\boxed{\\text{(D)}}") == "D"
    assert extract_choice("the answer is a mess") is None
    assert extract_number("it costs $1,234.50 in all") == "1234.50"
    assert extract_number("12 or \\boxed{13} or 14") == "13"
    assert choice_letter("x") is None and choice_letter("12") is None
    with pytest.raises(VoteError, match="boxed, choice, number"):
        extractor_named("regex")
    with pytest.raises(VoteError, match="unknown answer extractor"):
        extractor_named(["boxed"])


def test_the_judge_compares_and_survives_an_endless_comparison() -> None:
    verifier = AnswerVerifier(time_limit=1.0)
    try:
        assert verifier.same("1/2", "0.5") and not verifier.same("1/2", "1/3")
        started = time.monotonic()
        assert not verifier.same("9^{9^{9^{9}}}", "9^{9^{9^{8}}}+1")
        assert time.monotonic() - started < 30
        assert verifier.same("x+1", "1+x")  # a new child
        assert not verifier.same("9" * 5000, "9" * 5001)
    finally:
        verifier.close()


@pytest.mark.timeout(60)
def test_extractors_take_linear_time() -> None:
    """What reads a trace runs where all requests are served: no text may hold it up."""
    assert extract_boxed("\\boxed{7} " + "\\boxed{" * 50_000) == "7"
    assert extract_boxed("\\boxed{" * 50_000) is None
    assert extract_boxed("\\boxed{7} " + "{" * 200_000) == "7"
    for gap in (" " * 20_000, " \n" * 10_000):
        assert extract_choice(f"the answer is{gap}B then the answer{gap}1") == "B"
    assert extract_choice("answer" * 30_000) is None
    assert extract_choice("the answer is: **(C)** " + "answer : ** " * 5_000) == "C"
    assert extract_number("1" * 50_000 + "," * 50_000) is not None
    assert choice_letter("\\text" * 1_000 + " " * 4_000) is None
