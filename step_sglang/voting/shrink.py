"""Tells which traces of a vote need not go on, because fewer settle it. Knows nothing of servers.

Of ``m`` open traces let ``k`` go on. How probable is it that the vote over the finished traces and
those ``k`` has another winner than the vote over all ``m`` would have had? The least ``k`` for
which that is at most a threshold suffices; the ``k`` most promising go on, the others may end now.

The model is that of the posterior rule (``early_stopping.change_probability``, which is Bayesian as
the stopping rule of Adaptive-Consistency, arXiv 2305.11860, is): an answer is compared with the
leader by itself. In units of a finished trace's mean weight the leader has ``a`` votes, the other
answer ``b``. Every open trace gives one of the two, by a coin of unknown bias with a uniform prior
that the votes so far have updated, so of all ``m`` the number ``Z`` for the other is
Beta-binomial(m, b + 1, a + 1). The coin tosses are exchangeable, so whichever ``k`` of the ``m`` go
on, the number ``X`` for the other among these is hypergeometric given ``Z``: ``k`` drawn out of
``m`` of which ``Z`` count. The other is ahead

* of the leader and the ``k``, if ``b + X > a + k - X``,
* of the leader and all, if ``b + Z > a + m - Z``.

If the winners differ, then the order of the leader and some other answer differs between the two
votes, or two others are ahead of the leader among the ``k``. The bound adds up the probabilities of
the former over the other answers (and one not given yet), and of the latter at most the sum of
P(ahead among the ``k``) over all other answers but the most probable one.

With ``k = 0`` it is the posterior rule's probability, but for ties, which here leave the leader in
place in both votes. Traces that were ended for this rule stay among the ``m`` as long as the group
runs: what is bounded is the difference from the vote of everyone, at whatever moment one looks, so
ending traces again and again does not add up. To the model it does not matter which ``k`` go on, as
long as they are not chosen by their answers. That the promising ones are right more often makes the
votes differ more than it says, and for the better.
"""

from __future__ import annotations

from collections.abc import Sequence

from step_sglang.errors import VoteError, safe_repr
from step_sglang.pruning.policy import TraceView, worst_last
from step_sglang.voting.tally import Tally

_ROUNDING = 1e-6  # sums of the same weights in another order differ in the last bits


def check_shrink(shrink: object) -> None:
    """Raise VoteError unless it is a probability below 1/2; 0 is never."""
    number = isinstance(shrink, int | float) and not isinstance(shrink, bool)
    if not (number and 0 <= shrink < 0.5):  # type: ignore[operator]
        raise VoteError(
            "shrink must be a probability from 0 (never) to below 0.5, that the traces that end "
            f"would have changed the answer, not {safe_repr(shrink)}"
        )


def difference_probability(
    tallies: Sequence[Tally], num_going: int, num_open: int, vote: str
) -> float:
    """Bound of the probability that ``num_going`` of ``num_open`` traces vote otherwise than all.

    Args:
        tallies: the answers so far, the winner first.
        num_going: traces that go on, of the open ones.
        num_open: traces that have not finished; those that were ended for this rule too.
        vote: one of the votes. Under ``best``, where one trace decides, it is the chance that the
            best of all is among those that end, if all scores are exchangeable.

    Returns:
        A probability; 1 when there is no answer yet, 0 when all go on.
    """
    if num_going >= num_open:
        return 0.0
    total = sum(t.weight for t in tallies)
    count = sum(t.count for t in tallies)
    if not tallies or total <= 0:
        return 1.0
    if vote == "best":
        return (num_open - num_going) / (num_open + count)
    # Late: half a second and more of imports, for one rule. A server has them anyway.
    import numpy as np
    from scipy.stats import betabinom, hypergeom

    votes = np.asarray([t.weight for t in tallies]) * count / total
    leader = votes[0]
    others = np.append(votes[1:], 0.0)[:, None]  # [O, 1], the last: an answer not given yet
    of_all = np.arange(num_open + 1)  # [num_open + 1] Z
    chance = betabinom.pmf(of_all, num_open, others + 1, leader + 1)  # [O, num_open + 1]
    wins = others + of_all > leader + num_open - of_all + _ROUNDING
    # The most of the k that the other may have without being ahead.
    most = np.floor((leader + num_going - others + _ROUNDING) / 2)  # [O, 1]
    behind = hypergeom.cdf(most, num_open, of_all, num_going)  # [O, num_open + 1]
    differs = (chance * np.where(wins, behind, 1 - behind)).sum(axis=1)
    ahead = (chance * (1 - behind)).sum(axis=1)  # of the k
    return min(1.0, max(0.0, float(differs.sum() + ahead.sum() - ahead.max())))


def num_needed(tallies: Sequence[Tally], num_open: int, threshold: float, vote: str) -> int:
    """How many of ``num_open`` traces must go on, at least one.

    The probability falls with the number that goes on, but for ties; a bisection finds a number
    that suffices and of which one less does not.

    Args:
        tallies: the answers so far, the winner first.
        num_open: as for :func:`difference_probability`.
        threshold: the probability that is accepted.
        vote: one of the votes.
    """
    too_few, enough = 0, max(1, num_open)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if difference_probability(tallies, middle, num_open, vote) <= threshold:
            enough = middle
        else:
            too_few = middle
    return enough


def surplus(
    tallies: Sequence[Tally],
    going: Sequence[TraceView],
    num_ended: int,
    threshold: float,
    vote: str,
) -> list[int]:
    """Which traces may end, because those that go on settle the vote.

    Args:
        tallies: the answers so far, the winner first.
        going: the traces that run or wait. Promising is who would be pruned last.
        num_ended: traces that were ended for this rule before.
        threshold: the probability that is accepted, that the vote of all differs.
        vote: one of the votes.

    Returns:
        Handles, the least promising first.
    """
    needed = num_needed(tallies, len(going) + num_ended, threshold, vote)
    ranked = worst_last(going, min_steps=1)
    return [view.handle for view in reversed(ranked[needed:])]
