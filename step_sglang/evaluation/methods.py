"""The methods: how each samples its traces and weighs their votes.

A method is a name, a function that samples and one that weighs the traces that finished; adding one
takes a few lines in :data:`METHODS`. The request tells the engine what to do
(``custom_params.step.baseline``); only the reference's policy is a setting of the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from step_sglang.errors import nearest
from step_sglang.evaluation.errors import BenchError
from step_sglang.protocol import DEFAULT_VOTE
from step_sglang.voting.effort import effort_point
from step_sglang.voting.session import SampledTrace, VoteRules
from step_sglang.voting.tally import weight_of

Step = bool | Mapping[str, Any]  # custom_params.step


@dataclass(frozen=True)
class MethodSettings:
    """Parameters of the methods; the defaults are those of their papers.

    DeepConf (arXiv 2508.15260): groups of 2,048 tokens and the 20 most likely candidates
    (section 4.1), 16 warm-up traces and a consensus of 0.95 (its online algorithm). Slim-SC
    (arXiv 2509.13990): similarity above 0.95, compared after 20 steps.
    """

    window: int = 2048  # tokens of a DeepConf group
    top_k: int = 20  # candidates of a token's confidence
    warmup: int = 16  # traces
    tau: float = 0.95  # share of DeepConf's vote at which it stops sampling; 0: it never does
    similarity: float = 0.95
    delay: int = 20  # steps of a trace before Slim-SC compares it


@dataclass(frozen=True)
class Part:
    """The traces of one request."""

    traces: tuple[SampledTrace, ...]
    seconds: float


@dataclass(frozen=True)
class Consensus:
    """Ends a group once the leading answer holds a share of the vote.

    ``weigh``: of a finished trace, None keeps it out of the vote. ``before``: finished traces of
    earlier requests, which vote too; where they agree already, nothing is sampled.
    """

    share: float
    weigh: Callable[[SampledTrace], float | None]
    before: tuple[SampledTrace, ...] = ()


class Sampler(Protocol):
    """Samples traces of the question at hand."""

    @property
    def settings(self) -> MethodSettings:
        """Parameters of the method."""
        ...

    async def ask(self, n: int, step: Step, until: VoteRules | Consensus | None = None) -> Part:
        """Sample n traces as one group; ``until`` ends it before its last trace."""
        ...


@dataclass(frozen=True)
class SampleResult:
    """All traces of a question, in the order of their requests."""

    parts: tuple[Part, ...]
    threshold: float | None = None

    @property
    def traces(self) -> tuple[SampledTrace, ...]:
        """Of all parts."""
        return tuple(trace for part in self.parts for trace in part.traces)


Ask = Callable[[Sampler, int], Awaitable[SampleResult]]
# The weight of each finished trace that has an answer; None keeps it out of the vote.
Weigh = Callable[[SampledTrace, float | None], float | None]


@dataclass(frozen=True)
class Method:
    """One method. ``policy``: of the server that it needs; None: any, also one without STEP."""

    name: str
    title: str  # in tables
    ask: Ask
    weigh: Weigh
    policy: str | None = "fair"
    single: bool = False  # one trace whatever n is
    ample: bool = False  # wants a server whose memory was not made small
    families: bool = True  # branches of one trace weigh less together than strangers


def confidence_of(trace: SampledTrace) -> float | None:
    """A trace's lowest group confidence, as the server reports it."""
    value = (trace.meta_info.get("step") or {}).get("confidence")
    return None if value is None else float(value)


def stop_threshold(confidences: Sequence[float], keep: float) -> float:
    """The confidence below which a trace is stopped: ``keep`` percent of the warm-up reach it.

    DeepConf's online algorithm (arXiv 2508.15260): the (100 - eta)-th percentile of the warm-up
    traces' lowest group confidences, between two of them linearly.
    """
    return float(np.percentile(np.asarray(confidences, np.float64), 100.0 - keep))


def _one_request(
    step: Step | Callable[[MethodSettings], Step], until: VoteRules | None = None
) -> Ask:
    async def ask(sampler: Sampler, n: int) -> SampleResult:
        value = step(sampler.settings) if callable(step) else step
        return SampleResult((await sampler.ask(n, value, until),))

    return ask


def _deepconf(keep: float) -> Ask:
    """Warm-up traces run to their end and set the threshold; the engine stops the others below.

    Sampling ends once the leading answer holds ``tau`` of the confidence of all traces that
    finished (adaptive sampling, the paper's online algorithm), which may be after the warm-up. The
    vote itself is over those that reach the threshold. The paper samples the others one after the
    other; here they run at once, and those that still run then end.
    """

    async def ask(sampler: Sampler, n: int) -> SampleResult:
        settings = sampler.settings
        baseline = {"name": "deepconf", "window": settings.window, "top_k": settings.top_k}
        warmup = await sampler.ask(min(n, settings.warmup), {"baseline": baseline})
        known = [c for trace in warmup.traces if (c := confidence_of(trace)) is not None]
        if not known:
            raise BenchError(
                "the server reported no confidence for DeepConf's warm-up: it is too old for this "
                "method"
            )
        threshold = stop_threshold(known, keep)
        if n <= settings.warmup:
            return SampleResult((warmup,), threshold)
        stopping = {**baseline, "stop_below": threshold}
        until = None
        if settings.tau > 0:
            # All finished traces, or two of the warm-up that reach the threshold would be one.
            until = Consensus(settings.tau, confidence_of, warmup.traces)
        rest = await sampler.ask(n - settings.warmup, {"baseline": stopping}, until)
        return SampleResult((warmup, rest), threshold)

    return ask


def _slim_sc(variant: str) -> Ask:
    return _one_request(
        lambda settings: {
            "baseline": {
                "name": "slim-sc",
                "variant": variant,
                "threshold": settings.similarity,
                "delay": settings.delay,
            }
        }
    )


def _control(name: str) -> Ask:
    return _one_request({"baseline": {"name": name}})


def _sc(rule: str) -> Ask:
    return _one_request(False, VoteRules("majority", rule))


def _step(rule: str) -> Ask:
    return _one_request(True, VoteRules(DEFAULT_VOTE, rule))


def _effort(effort: str, control: str | None = None) -> Ask:
    point = effort_point(effort)
    rules = VoteRules(DEFAULT_VOTE, point.early, point.threshold, point.shrink)
    step: dict[str, Any] = {"prune_at": point.prune_at}
    if control is not None:
        step["baseline"] = {"name": control}
    return _one_request(step, rules)


def _refill(mode: str) -> Ask:
    return _one_request({"refill": mode})


def _majority(trace: SampledTrace, threshold: float | None) -> float:
    return 1.0


def _by_score(trace: SampledTrace, threshold: float | None) -> float:
    return weight_of(trace.score, "weighted")


def _by_odds(trace: SampledTrace, threshold: float | None) -> float:
    """As a server votes unless a request says otherwise."""
    return weight_of(trace.score, DEFAULT_VOTE, trace.calibration)


def _by_confidence(trace: SampledTrace, threshold: float | None) -> float | None:
    """Only traces that reach the threshold vote, those of the warm-up too; weight: confidence."""
    confidence = confidence_of(trace)
    if confidence is None or (threshold is not None and confidence < threshold):
        return None
    return confidence


# STEP waits for all survivors, as the paper's does; `step-early` ends the group once it is
# improbable that the others change the answer, `step-exact` once they cannot. Likewise SC.
# `step-balanced` and `step-fast` also shrink the group, and hold it to a share of the pool; their
# controls, `random-balanced` and `random-fast`, differ from them in the victims alone. The refilled
# ones start branches where memory is free; `gambit`'s vote adds up the scores, as its paper's does,
# the others' know families.
# `step-paper` has the reference's policy, and its vote by trace score but for one thing: the
# reference's script also counts pruned traces whose text contains "boxed".
METHODS = {
    method.name: method
    for method in (
        Method("cot", "CoT", _one_request(False), _majority, policy=None, single=True),
        Method("sc", "SC", _one_request(False), _majority, policy=None),
        Method("sc-early", "SC, ends early", _sc("posterior"), _majority, policy=None),
        Method("sc-exact", "SC, ends when certain", _sc("exact"), _majority, None),
        Method("slim-sc-random", "Slim-SC (random)", _slim_sc("random"), _majority),
        Method("slim-sc-diversity", "Slim-SC (diversity)", _slim_sc("diversity"), _majority),
        Method("deepconf-low", "DeepConf-low", _deepconf(10.0), _by_confidence),
        Method("deepconf-high", "DeepConf-high", _deepconf(90.0), _by_confidence),
        Method("random", "random victim", _control("random"), _by_odds),
        Method(
            "random-balanced",
            "random victim, effort balanced",
            _effort("balanced", "random"),
            _by_odds,
        ),
        Method("random-fast", "random victim, effort fast", _effort("fast", "random"), _by_odds),
        Method("longest", "longest victim", _control("longest"), _by_odds),
        Method("step-paper", "STEP (paper policy)", _one_request(True), _by_score, policy="paper"),
        Method("step", "STEP", _one_request(True), _by_odds),
        Method("step-early", "STEP, ends early", _step("posterior"), _by_odds),
        Method("step-balanced", "STEP, effort balanced", _effort("balanced"), _by_odds),
        Method("step-fast", "STEP, effort fast", _effort("fast"), _by_odds),
        Method("step-exact", "STEP, ends when certain", _step("exact"), _by_odds),
        Method("step-refill", "STEP, refilled", _refill("best"), _by_odds),
        Method("step-refill-random", "STEP, refilled from any", _refill("random"), _by_odds),
        Method("gambit", "Gambit's rule", _refill("gambit"), _by_score, families=False),
    )
}


async def _record(sampler: Sampler, n: int) -> SampleResult:
    step = {"record": True, "step_scores": True, "min_survivors": n}
    return SampleResult((await sampler.ask(n, step),))


# Not a method to compare: every trace runs to its end, and is stored with the data that `replay`
# needs for its policies.
RECORD = Method("record", "recorded", _record, _by_score, ample=True)
ALIASES = {"slim-sc": "slim-sc-diversity", "deepconf": "deepconf-low"}
REFERENCE = "sc"  # what the others are compared with


def methods_named(names: str) -> tuple[Method, ...]:
    """Methods of a comma-separated list, each once, in the order of the list.

    Raises:
        BenchError: there is no such method.
    """
    found: dict[str, Method] = {}
    for name in (part.strip() for part in names.split(",")):
        method = METHODS.get(ALIASES.get(name, name))
        if method is None:
            known = ", ".join([*METHODS, *ALIASES])
            near = nearest(name, [*METHODS, *ALIASES])
            raise BenchError(f"there is no method {name[:40]!r}{near}; there are {known}")
        found[method.name] = method
    return tuple(found.values())
