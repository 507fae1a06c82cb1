"""Which traces a vote does not need: against brute force, simulation, and what must always hold."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_sglang.errors import VoteError
from step_sglang.protocol import VOTES
from step_sglang.pruning.policy import TraceView
from step_sglang.voting.classes import run_here
from step_sglang.voting.early_stopping import change_probability
from step_sglang.voting.session import TraceFate, VoteRules, VoteSession
from step_sglang.voting.shrink import check_shrink, difference_probability, num_needed, surplus
from step_sglang.voting.tally import Ballot, Tally, tally

COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=4)


def text(one: str, other: str) -> bool:
    return one == other


def tallies_of(counts: list[int], weight: float = 1.0, vote: str = "majority") -> list[Tally]:
    cast = [Ballot(chr(97 + i), weight) for i, count in enumerate(counts) for _ in range(count)]
    return tally(cast, text, vote)


def differ(leader: int, behind: int, going: int, left: int) -> float:
    """Of two answers, by summing over every outcome: the votes of some and of all disagree."""

    def outcomes(n: int, a: int, b: int) -> list[tuple[int, float]]:
        """Pólya's urn: votes for the other among n, and their probability."""
        beta = [
            math.comb(n, x)
            * math.exp(
                math.lgamma(b + x + 1) + math.lgamma(a + n - x + 1) - math.lgamma(a + b + n + 2)
                - math.lgamma(b + 1) - math.lgamma(a + 1) + math.lgamma(a + b + 2)
            )
            for x in range(n + 1)
        ]  # fmt: skip
        return list(enumerate(beta))

    total = 0.0
    for x, chance in outcomes(going, leader, behind):
        a, b = leader + going - x, behind + x
        for y, then in outcomes(left - going, a, b):
            total += chance * then * ((b > a) != (b + y > a + left - going - y))
    return total


@pytest.mark.parametrize(
    ("leader", "behind", "going", "left"),
    [(3, 1, 2, 5), (6, 2, 3, 9), (4, 4, 1, 8), (9, 5, 10, 20), (2, 0, 0, 7), (5, 3, 11, 12)],
)
def test_two_answers_against_brute_force(leader: int, behind: int, going: int, left: int) -> None:
    # The third, an answer not given yet, is compared in the same way; and both may be ahead.
    pairs = differ(leader, behind, going, left) + differ(leader, 0, going, left)
    found = difference_probability(
        tallies_of([leader] + [behind] * (behind > 0)), going, left, "majority"
    )
    if not behind:
        assert found == pytest.approx(differ(leader, 0, going, left), abs=1e-9)
    else:
        assert pairs - 1e-9 <= found <= min(1.0, pairs + 0.5)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(1, 30), st.floats(0.1, 1.0))
def test_what_always_holds(counts: list[int], left: int, weight: float) -> None:
    tallies = tallies_of(counts, weight, "weighted")
    chances = [difference_probability(tallies, k, left, "weighted") for k in range(left + 1)]
    assert all(0 <= chance <= 1 for chance in chances)
    assert chances[left] == 0.0
    # To end all is the posterior rule, but for ties.
    assert chances[0] <= change_probability(tallies, left, "weighted") + 1e-9
    # Weights alike are counts.
    assert chances == pytest.approx(
        [difference_probability(tallies_of(counts), k, left, "majority") for k in range(left + 1)]
    )
    for threshold in (0.01, 0.1, 0.3):
        needed = num_needed(tallies, left, threshold, "weighted")
        assert 1 <= needed <= left
        assert difference_probability(tallies, needed, left, "weighted") <= threshold
        if needed > 1:
            assert difference_probability(tallies, needed - 1, left, "weighted") > threshold
    assert num_needed(tallies, left, 0.3, "weighted") <= num_needed(tallies, left, 1e-9, "weighted")


def test_the_bound_holds_in_its_own_model() -> None:
    """Traces of answers drawn from shares that are themselves drawn: observed below predicted."""
    rng = random.Random(5)
    observed: Counter[int] = Counter()
    predicted: Counter[int] = Counter()
    number: Counter[int] = Counter()
    for _ in range(1200):
        shares = [rng.expovariate(1) ** 2 for _ in range(4)]
        votes = rng.choices("abcd", shares, k=40)
        seen = rng.randint(3, 20)
        tallies = tally([Ballot(v, 1.0) for v in votes[:seen]], text, "majority")
        going = rng.randint(0, 40 - seen)
        chance = difference_probability(tallies, going, 40 - seen, "majority")
        few = tally([Ballot(v, 1.0) for v in votes[: seen + going]], text, "majority")
        full = tally([Ballot(v, 1.0) for v in votes], text, "majority")
        place = min(4, int(chance * 20))
        number[place] += 1
        predicted[place] += chance
        observed[place] += few[0].answer != full[0].answer
    for place, count in number.items():
        error = 3 * math.sqrt(max(observed[place], 1)) / count
        assert observed[place] / count <= predicted[place] / count + error, place
    # And it is of use: what is called improbable is most of the cases.
    assert number[0] > 600


@settings(max_examples=60, deadline=None)
@given(
    COUNTS,
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=20),
    st.integers(0, 8),
    st.sampled_from(VOTES),
)
def test_the_least_promising_end(
    counts: list[int], scores: list[tuple[float, int]], ended: int, vote: str
) -> None:
    tallies = tallies_of(counts, 0.5, vote)
    views = [TraceView(i, 0, 10 + i, s * n, n) for i, (s, n) in enumerate(scores)]
    gone = surplus(tallies, views, ended, 0.1, vote)
    assert len(gone) < len(views) and len(set(gone)) == len(gone)
    needed = num_needed(tallies, len(views) + ended, 0.1, vote)
    assert len(views) - len(gone) == min(needed, len(views))
    known = [v.score_sum / v.num_steps for v in views if v.num_steps]
    mean = sum(known) / len(known) if known else 0.0

    def score(view: TraceView) -> float:
        return view.score_sum / view.num_steps if view.num_steps else mean

    kept = [score(v) for v in views if v.handle not in gone]
    assert all(score(views[i]) <= min(kept) + 1e-12 for i in gone)


def test_edges() -> None:
    assert difference_probability([], 1, 5, "weighted") == 1.0
    assert difference_probability(tallies_of([3], 0.0, "weighted"), 1, 5, "weighted") == 1.0
    assert difference_probability(tallies_of([3], vote="best"), 2, 5, "best") == 3 / 8
    assert surplus([], [TraceView(0, 0, 1, 0.0, 0)], 0, 0.4, "weighted") == []
    check_shrink(0), check_shrink(0.3)
    for wrong in (-0.1, 0.5, 1, True, None, "few", math.nan, math.inf):
        with pytest.raises(VoteError, match="shrink must be a probability"):
            check_shrink(wrong)


def chunk(index: int, score: float, end: str | None = None, answer: int = 1, **step: Any) -> dict:
    reason = None if end is None else {"type": end, "message": "m"}
    known = {"score": score, "num_steps": 3, "pruned": False, **step}
    info = {"id": f"r{index}", "finish_reason": reason, "completion_tokens": 9, "step": known}
    body = rf"\boxed{{{answer}}}" if end == "stop" else ""
    return {"index": index, "text": body, "output_ids": list(range(9)), "meta_info": info}


def test_a_session_names_each_surplus_trace_once() -> None:
    session = VoteSession(12, VoteRules("weighted", "off", shrink=0.2))
    for index in range(11):  # of the last nothing has come
        session.feed(chunk(index, 0.3 + index / 100))
    assert session.surplus() == []
    ended: list[str] = []
    for index in (10, 9):
        assert session.feed(chunk(index, 0.9, "stop"))
        run_here(session.counting())
        assert not session.decided()
        ended += session.surplus()
    assert ended and len(set(ended)) == len(ended)
    assert "r0" in ended and "r11" not in ended
    first, late = int(ended[0][1:]), int(ended[1][1:])
    session.feed(chunk(first, 0.1, "abort", pruned=True, reason="shrink"))
    assert session.traces[first].fate is TraceFate.SHRUNK
    # One that finished before it heard of it votes.
    session.feed(chunk(late, 0.5, "stop", answer=2))
    run_here(session.counting())
    assert session.traces[late].fate is TraceFate.FINISHED
    assert len(session.tallies()) == 2
    session.cancel()
    told = [int(rid[1:]) for rid in ended]
    assert {t.index for t in session.traces if t.fate is TraceFate.SHRUNK} == {*told} - {late}
    voted = session.num(TraceFate.FINISHED)
    assert session.num(TraceFate.CANCELLED) == 12 - voted - len(ended) + 1


def test_without_shrink_all_go_on() -> None:
    session = VoteSession(8, VoteRules("weighted", "off"))
    for index in range(8):
        session.feed(chunk(index, 0.5))
    session.feed(chunk(0, 0.5, "stop"))
    run_here(session.counting())
    assert session.surplus() == []
