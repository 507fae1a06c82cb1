"""How the methods ask and vote, by hand-made answers; what runs in which order, and where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from step_sglang.client.result import server_times
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Job
from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.methods import (
    METHODS,
    RECORD,
    Consensus,
    MethodSettings,
    Part,
    methods_named,
    stop_threshold,
)
from step_sglang.evaluation.run import Plan, blocks
from step_sglang.evaluation.sampler import ServerSampler, grade
from step_sglang.evaluation.serving import PoolSize, Serving, parse_pool_sizes
from step_sglang.evaluation.watch import read_gauges
from step_sglang.voting.answers import extract_boxed
from step_sglang.voting.classes import run_here
from step_sglang.voting.effort import effort_point
from step_sglang.voting.session import SampledTrace, TraceFate, VoteRules
from step_sglang.voting.verifier import AnswerVerifier, Comparison

SETTINGS = MethodSettings(window=10, warmup=4, delay=3)


def trace(
    index: int,
    answer: str | None,
    score: float | None = None,
    confidence: float | None = None,
    fate: TraceFate = TraceFate.FINISHED,
) -> SampledTrace:
    info: dict[str, Any] = {"step": {"confidence": confidence}}
    return SampledTrace(index, score=score, tokens=9, fate=fate, answer=answer, meta_info=info)


class Script:
    """Answers requests with given traces and remembers what was asked."""

    settings = SETTINGS

    def __init__(self, *parts: list[SampledTrace]) -> None:
        self.parts = list(parts)
        self.asked: list[tuple[int, Any, Any]] = []

    async def ask(self, n: int, step: Any, until: Any = None) -> Part:
        self.asked.append((n, step, until))
        return Part(tuple(self.parts.pop(0)), 1.0)


def vote(name: str, script: Script, n: int) -> tuple[str | None, bool]:
    method = METHODS[name]
    asked = asyncio.run(method.ask(script, n))
    verifier = AnswerVerifier()
    try:
        graded = grade(method, asked, "7", verifier)
    finally:
        verifier.close()
    assert len(graded.traces) == n
    return graded.answer, graded.correct


def test_what_each_method_says_to_the_server() -> None:
    balanced, fast = effort_point("balanced"), effort_point("fast")
    expected: dict[str, Any] = {
        "cot": False,
        "sc": False,
        "slim-sc-random": {
            "baseline": {"name": "slim-sc", "variant": "random", "threshold": 0.95, "delay": 3}
        },
        "slim-sc-diversity": {
            "baseline": {"name": "slim-sc", "variant": "diversity", "threshold": 0.95, "delay": 3}
        },
        "random": {"baseline": {"name": "random"}},
        "random-balanced": {"prune_at": balanced.prune_at, "baseline": {"name": "random"}},
        "random-fast": {"prune_at": fast.prune_at, "baseline": {"name": "random"}},
        "longest": {"baseline": {"name": "longest"}},
        "step": True,
        "step-paper": True,
        "sc-early": False,
        "sc-exact": False,
        "step-early": True,
        "step-exact": True,
        "step-balanced": {"prune_at": balanced.prune_at},
        "step-fast": {"prune_at": fast.prune_at},
        "step-refill": {"refill": "best"},
        "step-refill-random": {"refill": "random"},
        "gambit": {"refill": "gambit"},
    }
    rules = {
        "sc-early": VoteRules("majority", "posterior"),
        "sc-exact": VoteRules("majority", "exact"),
        "step-early": VoteRules("calibrated", "posterior"),
        "step-exact": VoteRules("calibrated", "exact"),
        "step-balanced": VoteRules("calibrated", "posterior", balanced.threshold, balanced.shrink),
        "step-fast": VoteRules("calibrated", "posterior", fast.threshold, fast.shrink),
    }
    rules |= {
        name.replace("step", "random"): rules[name] for name in ("step-balanced", "step-fast")
    }
    assert {*expected, "deepconf-low", "deepconf-high"} == {*METHODS}
    for name, step in expected.items():
        script = Script([trace(0, "7")])
        asyncio.run(METHODS[name].ask(script, 1))
        assert script.asked == [(1, step, rules.get(name))]


def test_recorded_traces_are_never_pruned() -> None:
    script = Script([trace(0, "7"), trace(1, "7")])
    asyncio.run(RECORD.ask(script, 2))
    assert script.asked == [(2, {"record": True, "step_scores": True, "min_survivors": 2}, None)]
    whole = replace(plan("sc,step", questions=1, ns=(8, 16)), methods=(METHODS["step"], RECORD))
    small, large = blocks(whole, frozenset())
    assert small.serving == Serving("fair", PoolSize(512))
    assert large.serving == Serving("fair", PoolSize())
    assert [(t.method.name, t.n) for t in large.trials] == [("record", 16)]


def test_sc_counts_and_step_weighs_the_traces_that_finished() -> None:
    traces = [
        trace(0, "3", 0.2), trace(1, "3", 0.3), trace(2, "7", 0.9),
        trace(3, "3", 0.99, fate=TraceFate.PRUNED), trace(4, None, 0.9),
    ]  # fmt: skip
    assert vote("sc", Script(traces), 5) == ("3", False)
    assert vote("step", Script(traces), 5) == ("7", True)
    assert vote("step", Script([trace(0, None), trace(1, "7", fate=TraceFate.PRUNED)]), 2) == (
        None,
        False,
    )


def test_deepconf_stops_below_what_the_best_of_the_warmup_reach() -> None:
    warmup = [trace(i, "3", confidence=c) for i, c in enumerate((1.0, 2.0, 3.0, 4.0))]
    for name, threshold in (("deepconf-low", 3.7), ("deepconf-high", 1.3)):
        script = Script(warmup, [trace(0, "7", confidence=9.0)])
        asked = asyncio.run(METHODS[name].ask(script, 5))
        baseline = {"name": "deepconf", "window": 10, "top_k": 20}
        assert asked.threshold == pytest.approx(threshold)
        assert [one[:2] for one in script.asked] == [
            (4, {"baseline": baseline}),
            (1, {"baseline": {**baseline, "stop_below": asked.threshold}}),
        ]
        assert script.asked[0][2] is None
        until = script.asked[1][2]
        assert (until.share, until.before) == (0.95, tuple(warmup))
        # Also those below the threshold, which have no vote in the end.
        assert [until.weigh(t) for t in warmup] == [1.0, 2.0, 3.0, 4.0]


def test_deepconf_without_adaptive_sampling_samples_all() -> None:
    script = Script([trace(i, "3", confidence=1.0 + i) for i in range(4)], [trace(0, "7")])
    script.settings = replace(SETTINGS, tau=0)
    asyncio.run(METHODS["deepconf-low"].ask(script, 5))
    assert [one[2] for one in script.asked] == [None, None]


def test_deepconf_votes_by_confidence_without_those_below_the_threshold() -> None:
    warmup = [trace(i, "3", confidence=c) for i, c in enumerate((1.0, 2.0, 3.0, 4.0))]
    rest = [trace(0, "7", confidence=5.0), trace(1, "3", confidence=3.6)]
    # Low: one warm-up trace of weight 4 and one other of weight 5 are left.
    assert vote("deepconf-low", Script(warmup, rest), 6) == ("7", True)
    # High: only the worst is left out, and 2 + 3 + 4 + 3.6 beats 5.
    assert vote("deepconf-high", Script(warmup, rest), 6) == ("3", False)


def test_deepconf_with_no_more_traces_than_its_warmup_asks_once() -> None:
    script = Script([trace(i, "7", confidence=1.0 + i) for i in range(3)])
    asked = asyncio.run(METHODS["deepconf-low"].ask(script, 3))
    assert [n for n, _, _ in script.asked] == [3]
    assert asked.threshold == pytest.approx(stop_threshold([1.0, 2.0, 3.0], 10))
    with pytest.raises(BenchError, match="no confidence"):
        asyncio.run(METHODS["deepconf-low"].ask(Script([trace(0, "7")]), 1))


def test_method_names() -> None:
    names = [m.name for m in methods_named("deepconf, sc,slim-sc,deepconf-low")]
    assert names == ["deepconf-low", "sc", "slim-sc-diversity"]
    with pytest.raises(BenchError, match="no method 'gambler'"):
        methods_named("sc,gambler")


class Streamed:
    """A source whose traces end with given texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    async def render(self, messages: Any) -> list[int]:
        return [1]

    async def close(self) -> None:
        pass

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        for index, text in enumerate(self.texts):
            info = {"completion_tokens": 1, "finish_reason": {"type": "stop"}}
            yield {"index": index, "text": text, "output_ids": [5], "meta_info": info}


class NoComparison(Comparison):
    def __init__(self) -> None:
        pass

    async def arun(self, steps: Any) -> Any:
        raise AssertionError("a vote, while the clock may run")


class NoJudge(AnswerVerifier):
    def comparison(self) -> Comparison:
        return NoComparison()


def test_answers_are_read_and_not_compared_while_a_question_is_asked() -> None:
    source = Streamed("\\boxed{x+1}", "no answer", "\\boxed{1+x}")
    verifier = NoJudge()
    session = ServerSampler(source, [1], Sampling(), SETTINGS, extract_boxed, verifier)
    part = asyncio.run(session.ask(3, False))
    assert [trace.answer for trace in part.traces] == ["x+1", None, "1+x"]
    assert {trace.fate for trace in part.traces} == {TraceFate.FINISHED}
    with pytest.raises(AssertionError):
        asyncio.run(session.ask(3, False, VoteRules("majority", "exact")))


class Judge(AnswerVerifier):
    """Compares in this process."""

    def comparison(self) -> Comparison:
        return InPlace()


class InPlace(Comparison):
    def __init__(self) -> None:
        pass

    async def arun(self, steps: Any) -> Any:
        return run_here(steps)


def streamed(*texts: str) -> ServerSampler:
    return ServerSampler(Streamed(*texts), [1], Sampling(), SETTINGS, extract_boxed, Judge())


def fates(part: Part) -> list[str]:
    return [trace.fate.value for trace in part.traces]


def test_a_vote_ends_its_group_by_the_rule_that_the_method_names() -> None:
    texts = ["\\boxed{7}"] * 8
    for rule, finished in (("off", 8), ("exact", 5), ("posterior", 4)):
        part = asyncio.run(streamed(*texts).ask(8, False, VoteRules("majority", rule)))
        assert fates(part) == ["finished"] * finished + ["cancelled"] * (8 - finished), rule


def test_a_consensus_ends_the_group_and_may_make_it_needless() -> None:
    def weigh(one: SampledTrace) -> float | None:
        return one.meta_info.get("weight", 1.0)

    def ask(share: float, before: tuple[SampledTrace, ...], *texts: str) -> Part:
        until = Consensus(share, weigh, before)
        return asyncio.run(streamed(*texts).ask(len(texts), False, until))

    sevens = ["\\boxed{7}"] * 4
    three, seven = trace(0, "3"), trace(1, "7")
    # 1 of 2, then 2 of 3, 3 of 4: three quarters.
    part = ask(0.75, (three, seven), *sevens)
    assert fates(part) == ["finished", "finished", "cancelled", "cancelled"]
    assert [t.answer for t in part.traces[:2]] == ["7", "7"]
    # What does not vote does not hinder: pruned, without an answer, without a weight.
    silent = (trace(0, "3", fate=TraceFate.PRUNED), trace(1, None), trace(2, "3"))
    silent[2].meta_info = {"weight": None}
    assert ask(0.95, (*silent, seven), *sevens).traces == ()
    # No vote is no consensus, and another spelling is no other answer.
    part = ask(0.95, silent, "no answer", "\\boxed{7.0}", *sevens)
    assert fates(part)[:3] == ["finished", "finished", "cancelled"]
    part = ask(0.95, (three, trace(1, "7.0")), *sevens)
    assert fates(part) == ["finished"] * 4


def plan(methods: str, questions: int = 3, **changes: Any) -> Plan:
    jobs = tuple((i, Job(f"q{i}", f"q{i}", "1")) for i in range(questions))
    options = {"ns": (8,), "repeats": 1, "memories": (PoolSize(512),), **changes}
    return Plan(jobs=jobs, methods=methods_named(methods), sampling=Sampling(), **options)


def test_methods_of_one_server_take_turns_in_rotating_order() -> None:
    found = blocks(plan("cot,sc,step,step-paper", repeats=2), frozenset())
    assert [b.serving for b in found] == [
        Serving("fair", PoolSize(512)), Serving("paper", PoolSize(512)),
    ] * 2  # fmt: skip
    orders = [t.method.name for t in found[0].trials]
    assert orders == ["cot", "sc", "step", "sc", "step", "cot", "step", "cot", "sc"]
    assert [t.job.id for t in found[0].trials[:4]] == ["q0", "q0", "q0", "q1"]
    assert [t.method.name for t in found[2].trials[:3]] == ["sc", "step", "cot"]
    assert {t.method.name for t in found[1].trials} == {"step-paper"}


def test_a_chain_of_thought_is_one_trace_whatever_n_is() -> None:
    (block,) = blocks(plan("cot,sc", questions=1, ns=(8, 16)), frozenset())
    assert sorted((t.method.name, t.n) for t in block.trials) == [("cot", 1), ("sc", 8), ("sc", 16)]
    assert block.serving.policy is None  # stock will do


def test_methods_without_step_share_the_only_server_there_is() -> None:
    found = blocks(plan("sc,step-paper", questions=1), frozenset())
    assert [(b.serving.policy, len(b.trials)) for b in found] == [("paper", 2)]


def test_what_is_done_is_not_done_again() -> None:
    whole = plan("cot,sc,step", questions=2)
    (block,) = blocks(whole, frozenset())
    done = {turn.key for turn in block.trials[:4]}
    (left,) = blocks(whole, frozenset(done))
    assert left.trials == block.trials[4:]
    assert blocks(whole, frozenset(turn.key for turn in block.trials)) == []


def test_every_memory_has_its_own_servers() -> None:
    memories = parse_pool_sizes(None, "0.5,0.9")
    found = blocks(plan("sc", questions=1, memories=memories), frozenset())
    assert [b.serving.memory.flags for b in found] == [
        ("--mem-fraction-static", "0.5"), ("--mem-fraction-static", "0.9"),
    ]  # fmt: skip
    assert [m.tokens for m in parse_pool_sizes("64,128", None)] == [64, 128]
    assert parse_pool_sizes(None, None) == (PoolSize(),)
    for pool, share in (("64", "0.5"), ("small", None), (None, "most"), (None, "1.5")):
        with pytest.raises(BenchError):
            parse_pool_sizes(pool, share)


def test_times_by_the_servers_stamps() -> None:
    info = {
        "queue_time": 2.0, "forward_entry_time": 103.0, "prefill_finished_time": 103.5,
        "request_finished_ts": 110.0, "num_retractions": 0, "api_server_dispatch_finish_ts": 101.0,
    }  # fmt: skip
    assert server_times(info) == (2.0, 0.5, 6.5)
    # It waited two seconds before it started, and three more after it had been retracted.
    again = {**info, "queue_time": 5.0, "num_retractions": 1}
    assert server_times(again) == (5.0, 0.5, 3.5)
    assert server_times({"queue_time": 1.0}) == (None, None, None)


def test_gauges_of_a_metrics_page() -> None:
    page = (
        "# HELP sglang:token_usage x\n"
        'sglang:token_usage{model_name="m",tp_rank="0"} 0.25\n'
        'sglang:token_usage{model_name="m",tp_rank="1"} 0.5\n'
        "sglang:num_running_reqs 3.0\nsglang:num_queue_reqs_total 9.0\n"
    )
    assert read_gauges(page) == {"token_usage": 0.5, "num_running_reqs": 3.0}
