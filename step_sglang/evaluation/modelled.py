"""The methods in a model of the scheduler: quick, and as exact as that model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from step_sglang.evaluation.cost_model import Roofline
from step_sglang.evaluation.replay import NEVER_EARLY, NO_PRUNING, is_right, simulate_together
from step_sglang.evaluation.simulated import SimulatedOutcome
from step_sglang.evaluation.simulation_input import as_recorded
from step_sglang.evaluation.traces import RecordedGroup
from step_sglang.protocol import DEFAULT_VOTE
from step_sglang.simulation.played import PlayedGroup, in_units
from step_sglang.simulation.speed import Speed
from step_sglang.voting.effort import effort_point
from step_sglang.voting.session import VoteRules


@dataclass(frozen=True)
class ModelledMethod:
    """What a method of the bench is to the model of the scheduler."""

    policy: str  # of `replay`
    rules: VoteRules
    prune_at: float = 1.0


def _dial(policy: str, effort: str) -> ModelledMethod:
    point = effort_point(effort)
    rules = VoteRules(DEFAULT_VOTE, point.early, point.threshold, point.shrink)
    return ModelledMethod(policy, rules, point.prune_at)


# By their names in `methods.METHODS`. The others need token confidences or texts, which traces that
# are played do not have, or branch.
MODELLED = {
    "sc": ModelledMethod(NO_PRUNING, VoteRules("majority", "off")),
    "sc-early": ModelledMethod(NO_PRUNING, VoteRules("majority", "posterior")),
    "sc-exact": ModelledMethod(NO_PRUNING, VoteRules("majority", "exact")),
    "random": ModelledMethod("random", NEVER_EARLY),
    "random-balanced": _dial("random", "balanced"),
    "random-fast": _dial("random", "fast"),
    "longest": ModelledMethod("longest", NEVER_EARLY),
    "step": ModelledMethod("fair", NEVER_EARLY),
    "step-early": ModelledMethod("fair", VoteRules(DEFAULT_VOTE, "posterior")),
    "step-exact": ModelledMethod("fair", VoteRules(DEFAULT_VOTE, "exact")),
    "step-balanced": _dial("fair", "balanced"),
    "step-fast": _dial("fair", "fast"),
}


def for_model(groups: Sequence[PlayedGroup], unit: int, limit: int) -> list[RecordedGroup]:
    """Groups as the model takes them; ``limit``: tokens that a trace may have."""
    return [as_recorded(in_units(group, unit), max(1, limit // unit)) for group in groups]


def model_outcomes(
    groups: Sequence[RecordedGroup], name: str, pool: int, speed: Speed, auc: float | None
) -> list[SimulatedOutcome]:
    """A method on questions that come at once.

    Args:
        groups: one of each question, as :func:`for_model` makes them.
        name: of the method, one of :data:`MODELLED`.
        pool: KV tokens, real ones.
        speed: of the virtual GPU; its unit is that in which the groups' tokens are counted.
        auc: of their scores, where these are invented.

    Raises:
        ReplayError: the pool cannot hold the longest trace.
    """
    method, unit = MODELLED[name], speed.unit
    fates = simulate_together(
        groups, method.policy, pool // unit, Roofline(speed), seed=groups[0].repeat,
        rules=method.rules, prune_at=method.prune_at, unit=unit,
    )  # fmt: skip
    return [
        SimulatedOutcome(
            question=group.question,
            method=name,
            n=len(group.traces),
            draw=group.repeat,
            pool=pool,
            auc=auc,
            correct=is_right(fate, method.rules.vote),
            seconds=fate.seconds,
            tokens=fate.tokens * unit,
            wait=fate.wait_share * fate.seconds,
            pruned=fate.pruned,
            retracted=fate.retracted,
            ended=fate.cancelled,
        )
        for group, fate in zip(groups, fates, strict=True)
    ]
