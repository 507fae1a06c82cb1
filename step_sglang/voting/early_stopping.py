"""Tells when a vote may end before its last trace. Knows nothing of servers.

``exact``: no outcome of the open traces can change the winner. ``posterior``: the probability that
they do is below a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

from step_sglang.errors import VoteError, safe_repr
from step_sglang.protocol import EARLY_RULES
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.voting.tally import Tally, weight_of

DEFAULT_THRESHOLD = 0.01
# Sums of the same weights in another order differ in the last bits.
_ROUNDING = 1e-6


def check_rule(rule: object, threshold: object = DEFAULT_THRESHOLD) -> None:
    """Raise VoteError unless they are a rule and a probability below 1/2."""
    if rule not in EARLY_RULES:
        raise VoteError(
            f"unknown early-finish rule {safe_repr(rule)}; it must be one of "
            f"{', '.join(EARLY_RULES)}"
        )
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not (number and 0 < threshold < 0.5):  # type: ignore[operator]
        raise VoteError(
            "the early-finish threshold must be a probability above 0 and below 0.5, "
            f"not {safe_repr(threshold)}"
        )


def highest_weight(
    score_sum: float,
    num_steps: int,
    tokens_left: int | None,
    vote: str = "weighted",
    calibration: TraceCalibration | None = None,
) -> float:
    """The most that a trace which still runs can weigh at its end.

    A trace score is a running mean of step scores, each at most 1, and a step takes a token, so
    with ``tokens_left`` tokens to come it is at most the mean with as many perfect steps. A
    calibration never falls with the score, so the highest score has the highest weight; a trace
    that ends without a step weighs as a score of 1/2 does, which is no more.

    Args:
        score_sum: sum of its step scores so far.
        num_steps: how many they are.
        tokens_left: tokens that it may still generate; None when that is not known.
        vote: under ``majority`` every trace weighs 1.
        calibration: of the scorer, see :func:`~step_sglang.voting.tally.weight_of`.
    """
    highest = 1.0
    if tokens_left is not None and num_steps > 0:
        # The token that ends the last counted step may not have been consumed yet: one step more.
        steps = max(tokens_left, 0) + 1
        highest = (score_sum + steps) / (num_steps + steps)
        if calibration is not None:
            # The sum's own rounding, which a steep calibration makes larger than the rule allows.
            highest += _ROUNDING
    return weight_of(min(1.0, highest), vote, calibration)


def cannot_change(tallies: Sequence[Tally], open_weights: Sequence[float], vote: str) -> bool:
    """Whether no outcome of the open traces can change the winner.

    Each open trace may end without an answer (pruned, aborted, cut off) or give any answer, a known
    or a new one, with any weight up to its own. The worst outcome for the winner is that all of
    them agree on one other answer. A winner that could at worst be equalled is not certain.

    Args:
        tallies: the answers so far, the winner first.
        open_weights: for every trace that has not ended, the most that it can weigh.
        vote: one of the votes; under ``best`` one trace suffices to change the winner.
    """
    if not tallies:
        return not open_weights
    if not open_weights:
        return True
    winner, others = tallies[0].weight, [t.weight for t in tallies[1:]]
    runner_up = max(others, default=0.0)
    threat = max(runner_up, *open_weights) if vote == "best" else runner_up + sum(open_weights)
    return winner > threat + _ROUNDING


def change_probability(tallies: Sequence[Tally], num_open: int, vote: str) -> float:
    """Upper bound of the probability that ``num_open`` more traces change the winner.

    Model, for the winner and each other answer (and one not given yet) by itself: every open trace
    finishes with the mean weight of the finished ones and gives one of the two; which one is a
    coin of unknown bias, with a uniform prior, of which the weights so far (in units of their mean)
    are draws. The number for the other answer is then Beta-binomial; the bound sums over the other
    answers. The stopping rule of Adaptive-Consistency (arXiv 2305.11860) is Bayesian in the same
    spirit, for samples drawn one by one; here the number still to come is known.

    Returns:
        A probability; 1 when there is no answer yet. Under ``best``, where one trace decides,
        the chance that the best of the open traces beats the winner if all scores are exchangeable.
    """
    if num_open == 0:
        return 0.0
    if not tallies:
        return 1.0
    count = sum(t.count for t in tallies)
    if vote == "best":
        return num_open / (num_open + count)
    total = sum(t.weight for t in tallies)
    if total <= 0:
        return 1.0
    # Late: half a second and more of imports, for one rule. A server has them anyway.
    import numpy as np
    from scipy.stats import betabinom

    votes = np.asarray([t.weight for t in tallies]) * count / total
    leader = votes[0]
    others = np.append(votes[1:], 0.0)[:, None]  # [O, 1], the last: an answer not given yet
    won = np.arange(num_open + 1)  # of the open traces, by the other answer
    chance = betabinom.pmf(won, num_open, others + 1, leader + 1)  # [O, num_open + 1]
    overtakes = others + won >= leader + num_open - won - _ROUNDING
    return min(1.0, float(chance[overtakes].sum()))


def is_settled(
    tallies: Sequence[Tally],
    open_weights: Sequence[float],
    vote: str,
    early: str,
    threshold: float = DEFAULT_THRESHOLD,
    num_ended: int = 0,
) -> bool:
    """Whether a group may end before its open traces.

    Args:
        tallies: the answers so far, the winner first; without any, nothing is settled.
        open_weights: for every trace that has not ended, the most that it can weigh.
        vote: one of the votes.
        early: one of the rules.
        threshold: of the posterior rule.
        num_ended: traces that were ended because the vote did not need them. They cannot vote any
            more, but the posterior rule compares with the vote in which they did, see ``shrink``.
    """
    if early == "off" or not tallies:
        return False
    if cannot_change(tallies, open_weights, vote):
        return True
    if early == "exact":
        return False
    return change_probability(tallies, len(open_weights) + num_ended, vote) < threshold
