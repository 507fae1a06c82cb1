"""Other methods on the real engine: what they measure, whom they end; the memory comes back."""

from __future__ import annotations

import math
import re
from collections import Counter
from statistics import median
from typing import Any

import pytest
import requests

from step_sglang.baselines import DeepConf, Random
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError
from step_sglang.patches import tokenizer
from step_sglang.pruning.request import StepRequest
from step_sglang.reasoner import questions
from step_sglang.reasoner.tokenizer import prompt_text
from step_sglang.training.confidence import token_signals
from tests.server.idle import idle_free_tokens
from tests.server.launch import Server

pytestmark = pytest.mark.server

N = 24
QUESTION = questions("test", 1, seed=7)[0].question


@pytest.fixture(scope="module")
def server(reasoner: Server) -> Server:
    return reasoner


def sample(server: Server, n: int, step: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    answers = server.generate(
        text=prompt_text(QUESTION),
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": 400,
            "custom_params": {"step": step},
        },
        **more,
    )
    assert len(answers) == n
    return [{**answer["meta_info"], "ids": answer["output_ids"]} for answer in answers]


def reasons(infos: list[dict[str, Any]]) -> Counter[str | None]:
    for info in infos:
        assert info["step"]["pruned"] is ("reason" in info["step"])
        assert info["step"]["pruned"] is (info["finish_reason"]["type"] == "abort")
    return Counter(info["step"].get("reason") for info in infos)


def test_confidences_are_those_of_the_servers_log_probabilities(server: Server) -> None:
    baseline = {"name": "deepconf", "window": 20}
    step = {"baseline": baseline, "record": True, "step_scores": True}
    infos = sample(server, 4, step, return_logprob=True, top_logprobs_num=20)
    for info in infos:
        record = info["step"]["record"]
        expected = [
            -math.fsum(entry[0] for entry in top) / len(top) for top in info["output_top_logprobs"]
        ]
        assert record["confidences"] == pytest.approx(expected, abs=1e-4)
        signals = token_signals([0.0] * len(expected), expected, 20)
        assert info["step"]["confidence"] == pytest.approx(signals.lowest_confidence[-1], abs=1e-4)
        times = record["token_times"]
        assert len(times) == info["completion_tokens"] and times == sorted(times)
        # Two processes, each with its own clock.
        assert abs(times[-1] - info["request_finished_ts"]) < 5
        assert len(info["step"]["step_scores"]) == info["step"]["num_steps"] > 0
    assert reasons(infos) == {None: 4}


def test_deepconf_ends_traces_below_the_threshold(server: Server) -> None:
    before, n = idle_free_tokens(server), N // 2
    lowest = sorted(
        info["step"]["confidence"]
        for info in sample(server, n, {"baseline": {"name": "deepconf", "window": 20}})
    )
    stop = {"name": "deepconf", "window": 20, "stop_below": lowest[n // 2]}
    infos = sample(server, n, {"baseline": stop})
    found = reasons(infos)
    assert found["confidence"] + found[None] == n and found["confidence"] > 0
    for info in infos:
        # One that falls below with its last tokens has finished.
        assert not info["step"]["pruned"] or info["step"]["confidence"] < lowest[n // 2]
    everyone = {"name": "deepconf", "window": 20, "stop_below": 1e9}
    infos = sample(server, 8, {"baseline": everyone})
    assert reasons(infos) == {"confidence": 8}
    # A token or two may be on their way when the scheduler looks at the one that counts.
    lengths = [info["completion_tokens"] for info in infos]
    assert 20 <= min(lengths) <= max(lengths) < 40 and median(lengths) <= 23
    assert all(len(info["ids"]) == info["completion_tokens"] for info in infos)
    assert idle_free_tokens(server) == before


@pytest.mark.parametrize("variant", ["random", "diversity"])
def test_slim_sc_ends_traces_with_the_same_thought(server: Server, variant: str) -> None:
    before = idle_free_tokens(server)
    # Traces of one question begin alike.
    slim = {"name": "slim-sc", "variant": variant, "delay": 0, "threshold": 0.8}
    found = reasons(sample(server, N, {"baseline": slim}))
    assert set(found) == {"similarity", None}
    assert idle_free_tokens(server) == before


@pytest.mark.parametrize("name", ["random", "longest"])
def test_controls_prune_when_memory_is_short(server: Server, name: str) -> None:
    before = idle_free_tokens(server)
    infos = sample(server, N, {"baseline": {"name": name}})
    found = reasons(infos)
    assert found["decode"] > 0 and found[None] > 0
    assert sum(info["num_retractions"] for info in infos) == 0
    assert idle_free_tokens(server) == before


def test_the_log_and_the_metrics_know_the_reason(server: Server) -> None:
    sample(server, 4, {"baseline": {"name": "deepconf", "window": 5, "stop_below": 1e9}})
    assert re.search(r"STEP pruned .* reason=confidence ", server.log_text())
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    assert re.search(r'step_traces_pruned_total\{.*reason="confidence".*\} [1-9]', text)


def test_bad_input_is_a_400(server: Server) -> None:
    params = {"max_new_tokens": 4, "custom_params": {"step": {"baseline": {"name": "best"}}}}
    answer = server.post("/generate", {"text": "1", "sampling_params": params})
    assert answer.status_code == 400 and "baseline.name must be one of" in answer.text


@pytest.mark.parametrize(
    ("config", "tp_size", "baseline", "message"),
    [
        (StepConfig("s", policy="paper"), 1, Random(), "--step-policy fair"),
        (StepConfig(capture=True), 1, Random(), "without --step-capture"),
        (StepConfig("s"), 2, DeepConf(), "--tp-size 1"),
        (StepConfig("s"), 2, Random(), None),
        (StepConfig("s"), 1, DeepConf(), None),
    ],
)
def test_servers_that_cannot(
    config: StepConfig,
    tp_size: int,
    baseline: Any,
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "ranks_of_a_batch", lambda: tp_size)
    step_request = StepRequest(baseline=baseline)
    if message is None:
        tokenizer._check_baseline(step_request, config)
        return
    with pytest.raises(RequestError, match=message):
        tokenizer._check_baseline(step_request, config)
