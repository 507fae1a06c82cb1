"""Signals of the methods that STEP is compared with: pure values, no engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_sglang.baselines import Baseline, DeepConf, EngineContext, SlimSC, parse_baseline
from step_sglang.baselines.embedding import load_embedding, ngrams
from step_sglang.config import StepConfig
from step_sglang.errors import ConfigError, RequestError
from step_sglang.pruning.groups import GroupRegistry, Trace, TraceStatus
from step_sglang.pruning.policy import Candidates, GroupView, TraceView
from step_sglang.pruning.timeline import Timeline
from step_sglang.scoring.confidence import token_confidences
from step_sglang.training.confidence import token_signals

BOUNDARY, THINK_END = 1, 2
CONTEXT = EngineContext(frozenset({BOUNDARY}), THINK_END, ngrams)


def join(groups: GroupRegistry, baseline: Baseline | None, **more: Any) -> Trace:
    return groups.join("g", baseline=baseline, context=CONTEXT, **more)


def say(trace: Trace, *tokens: int) -> Trace | None:
    """Show the tokens; returns whom the last of them ends."""
    ended = None
    for token in tokens:
        ended = trace.token(token, 0.0, float("nan"))
    return ended


@given(
    st.lists(st.floats(0, 20), min_size=1, max_size=60),
    st.integers(1, 12),
)
def test_the_lowest_confidence_is_that_of_training(values: list[float], window: int) -> None:
    trace = join(GroupRegistry(), DeepConf(window=window))
    expected = token_signals([0.0] * len(values), values, window).lowest_confidence
    for value, lowest in zip(values, expected, strict=True):
        assert trace.token(9, 0.0, value) is None
        assert trace.meta()["confidence"] == pytest.approx(lowest, abs=1e-9)


def test_deepconf_ends_a_trace_when_a_complete_group_is_too_low() -> None:
    trace = join(GroupRegistry(), DeepConf(window=3, stop_below=2.0))
    fates = [trace.token(9, 0.0, value) for value in (0.0, 0.0, 6.1, 0.0, 0.0)]
    assert fates == [None, None, None, None, None]  # means: -, -, 2.03, 2.03, 2.03
    assert trace.token(9, 0.0, 5.0) is trace  # 1.67


def test_confidence_against_log_softmax() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 4
    found = token_confidences(logits.clone(), (1, 20, 300))
    ranked = torch.log_softmax(logits.double(), dim=1).sort(dim=1, descending=True).values
    for column, k in enumerate((1, 20, 40)):
        expected = -ranked[:, :k].mean(dim=1)
        torch.testing.assert_close(found[:, column].double(), expected, rtol=1e-5, atol=1e-5)


def test_slim_sc_ends_one_of_two_traces_with_the_same_thought() -> None:
    groups = GroupRegistry()
    one, two, three = (join(groups, SlimSC(delay=0)) for _ in range(3))
    assert say(one, 5, 6, 7, BOUNDARY) is None
    assert say(two, 8, 9, 10, BOUNDARY) is None  # another thought
    assert say(one, 8, 9, 10, BOUNDARY) in (one, two)
    assert say(three, 5, 6, 7) is None  # not finished yet
    assert say(three, BOUNDARY) in (one, three)
    assert say(one, 8, 8, 8, 8, BOUNDARY) is None
    groups.end(one, TraceStatus.FINISHED)
    assert say(three, 8, 8, 8, 8, BOUNDARY) is None  # its twin has ended


def test_slim_sc_waits_for_its_delay_and_stops_with_the_thinking() -> None:
    groups = GroupRegistry()
    one, two = (join(groups, SlimSC(delay=2)) for _ in range(2))
    for trace in (one, two):
        assert say(trace, 5, BOUNDARY) is None
        assert say(trace, 6, BOUNDARY) is None
    assert say(one, 6, BOUNDARY) in (one, two)
    assert say(one, THINK_END, 6, BOUNDARY) is None


def test_the_diversity_variant_ends_the_more_redundant_trace() -> None:
    groups = GroupRegistry()
    dull, lively = (join(groups, SlimSC(variant="diversity", delay=0)) for _ in range(2))
    for _ in range(3):
        say(dull, 5, 5, 6, BOUNDARY)
    for word in (10, 20, 30):
        say(lively, word, word + 1, word + 2, BOUNDARY)
    assert say(lively, 5, 5, 6, BOUNDARY) is dull
    assert say(dull, 10, 11, 12, BOUNDARY) is dull


def test_of_three_twins_one_survives() -> None:
    """All say the same in one pass; a trace that is about to end takes no part any more."""
    groups = GroupRegistry()
    traces = [join(groups, SlimSC(delay=0)) for _ in range(3)]
    for trace in traces:
        ended = say(trace, 5, 6, BOUNDARY)
        if ended is not None:
            groups.end_soon(ended)
    assert sum(trace.is_active for trace in traces) == 1


def test_thoughts_of_traces_that_ended_are_dropped() -> None:
    groups = GroupRegistry()
    stays = join(groups, SlimSC(delay=0))
    for number in range(40):
        trace = join(groups, SlimSC(delay=0))
        for word in range(10):
            say(trace, 1000 * number + word, BOUNDARY)
            say(stays, 1000 * number + 500 + word, BOUNDARY)
        groups.end(trace, TraceStatus.FINISHED)
    thoughts = stays.group.method_state
    assert thoughts is not None and 400 <= len(thoughts) < 600
    last = join(groups, SlimSC(delay=0))
    assert say(last, 20_505, BOUNDARY) in (last, stays)  # what stays said is still known


def test_ending_spares_the_minimum() -> None:
    groups = GroupRegistry()
    traces = [join(groups, SlimSC()) for _ in range(3)]
    for trace in (*traces, traces[0]):
        groups.end_soon(trace)
    assert [trace.ending for trace in traces] == [True, True, False] and groups.num_ending == 2
    for trace in traces:
        groups.end(trace, TraceStatus.PRUNED)
    assert groups.num_ending == 0 and len(groups) == 0
    last = join(groups, DeepConf())
    groups.end_soon(last)  # its warm-up traces survive, in another request
    assert last.ending


def test_who_watches_tokens() -> None:
    groups = GroupRegistry()
    plain, recorded = join(groups, None), join(groups, None, timeline=Timeline())
    assert not plain.watches_tokens and groups.watched == {20: 1}
    groups.end(recorded, TraceStatus.FINISHED)
    assert not groups.watched
    confident = groups.join("h", baseline=DeepConf(top_k=7), context=CONTEXT, timeline=Timeline())
    thinking = groups.join("i", baseline=SlimSC(), context=CONTEXT)
    assert groups.watched == {7: 1, 0: 1}
    confident.token(3, 12.34567, 1.5)
    groups.end(confident, TraceStatus.FINISHED)
    groups.end(thinking, TraceStatus.ABORTED)
    assert confident.meta()["record"] == {"token_times": [12.3457], "confidences": [1.5]}
    assert confident.meta()["confidence"] == 1.5
    assert groups.watched.total() == 0


@pytest.mark.parametrize("name", ["random", "longest"])
def test_controls_rank_when_memory_is_short(name: str) -> None:
    groups = GroupRegistry()
    method = parse_baseline({"name": name})
    traces = [join(groups, method) for _ in range(20)]
    views = [TraceView(i, 10, 100 - i, *trace.rank_key(100 - i)) for i, trace in enumerate(traces)]
    view = GroupView("g", 20, 1, 1.0, views, 1)
    candidates = Candidates([view], StepConfig("s", min_steps=5))
    victims = []
    while (victim := candidates.take()) is not None:
        victims.append(victim.handle)
    assert len(victims) == 19
    assert (victims == list(range(19))) is (name == "longest")
    assert traces[0].group.prunable
    assert not join(GroupRegistry(), DeepConf()).group.prunable


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("deepconf", "must be an object"),
        ({}, "name must be one of random, longest, deepconf, slim-sc, not None"),
        ({"name": ["x"]}, "name must be one of"),
        ({"name": "deepconf", "widow": 3}, r"has no \['widow'\]"),
        ({"name": "random", "window": 3}, r"has no \['window'\]"),
        ({"name": "deepconf", "window": 0}, "window must be an integer from 1"),
        ({"name": "deepconf", "window": True}, "window must be an integer"),
        ({"name": "deepconf", "window": 10**5000}, "more than 15 digits"),
        ({"name": "deepconf", "top_k": 1.5}, "top_k must be an integer"),
        ({"name": "deepconf", "stop_below": "x"}, "stop_below must be a number"),
        ({"name": "deepconf", "stop_below": float("nan")}, "stop_below must be a number"),
        ({"name": "slim-sc", "variant": "worst"}, "variant must be one of random, diversity"),
        ({"name": "slim-sc", "threshold": 1.5}, "threshold must be a number from -1 to 1"),
        ({"name": "slim-sc", "delay": -1}, "delay must be an integer from 0"),
    ],
)
def test_bad_input(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_baseline(value)


def test_ngrams_are_unit_vectors_of_what_the_step_says() -> None:
    one, same, other = ngrams([5, 6, 7]), ngrams([5, 6, 7]), ngrams([7, 6, 5])
    assert np.linalg.norm(one) == pytest.approx(1) and (one == same).all()
    assert 0.2 < float(one @ other) < 0.9  # the same words in another order
    assert not ngrams([]).any()


def test_an_embedding_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="pip install sentence-transformers"):
        load_embedding("m", str)
    (tmp_path / "sentence_transformers.py").write_text(
        "import numpy\n"
        "class SentenceTransformer:\n"
        "    def __init__(self, name, device):\n"
        "        if name != 'm': raise OSError(f'no {name}')\n"
        "    def encode(self, text, **options):\n"
        "        assert options['normalize_embeddings']\n"
        "        return numpy.array([len(text), 0.0])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    vector = load_embedding("m", lambda step: "x" * len(step))([1, 2, 3])
    assert vector.tolist() == [3.0, 0.0] and vector.dtype == np.float32
    with pytest.raises(ConfigError, match="cannot load n: no n"):
        load_embedding("n", str)
