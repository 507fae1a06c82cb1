"""The virtual GPU without an engine: presets, the clock, the traces and the model that plays."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from step_sglang.scoring.boundary import boundary_ids, think_end_id
from step_sglang.scoring.scorer import load_scorer
from step_sglang.simulation import model as player
from step_sglang.simulation.clock import Clock, GpuTime
from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.generator import QUANTILES, Question
from step_sglang.simulation.gpu import (
    GPUS,
    NETWORKS,
    gpu_named,
    kv_pool,
    network_named,
    step_time,
)
from step_sglang.simulation.model import write_player
from step_sglang.simulation.played import PlayedGroup, PlayedTrace, in_units
from step_sglang.simulation.speed import Speed
from step_sglang.simulation.synthetic import RIGHT, Ranking, Sampled, drawn, read_lengths, scored

# What the models' cards say they have, in billions.
PARAMETERS = {"qwen3-4b": 4.02, "qwen3-8b": 8.19, "phi-4": 14.66, "qwen3-30b-a3b": 30.53}


def trace(tokens: int, answer: str | None = "5", every: int = 4, score: float = 0.7) -> PlayedTrace:
    places = np.arange(every - 1, tokens - player.TAIL, every)
    return PlayedTrace(tokens, answer, places, np.full(len(places), score, np.float32))


def group(*traces: PlayedTrace, prompt: int = 9) -> PlayedGroup:
    return PlayedGroup("q", 0, "5", prompt, traces)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_models_shape_has_the_parameters_that_its_card_names(name: str) -> None:
    assert NETWORKS[name].parameters / 1e9 == pytest.approx(PARAMETERS[name], abs=0.005)


def test_a_decode_step_reads_weights_and_keys_or_computes() -> None:
    time = step_time(GPUS["h100"], NETWORKS["qwen3-8b"])
    assert NETWORKS["qwen3-8b"].kv_bytes == 147_456
    assert time.attended == pytest.approx(55e-9, rel=0.01)
    assert time.decode(1, 0) == pytest.approx(6.1e-3, rel=0.02)
    assert time.decode(64, 360_000) == pytest.approx(3.9 * 7e-3, rel=0.05)
    # Beyond some hundred rows the matrices take longer than reading them.
    assert time.decode(2048, 0) - time.decode(2047, 0) > 2 * time.row


def test_a_step_reads_the_experts_that_its_tokens_take() -> None:
    time = step_time(GPUS["h100"], NETWORKS["qwen3-30b-a3b"])
    one, many = time.decode(1, 0) - time.row, time.decode(256, 0) - 256 * time.row
    assert one - time.base - time.weights == pytest.approx(time.expert_weights * 8 / 128)
    assert many == pytest.approx(time.base + time.weights + time.expert_weights, rel=0.01)


def test_pools_follow_from_memory() -> None:
    assert 340_000 < kv_pool(GPUS["h100"], NETWORKS["qwen3-8b"]) < 380_000
    tiny = replace(GPUS["h100"], name="tiny", memory=8e9)
    with pytest.raises(SimulationError, match="qwen3-8b does not fit on one tiny"):
        kv_pool(tiny, NETWORKS["qwen3-8b"])


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(SimulationError, match=r"no GPU preset 'h10'.*did you mean 'h100'"):
        gpu_named("h10")
    with pytest.raises(
        SimulationError, match=r"no model preset 'qwen-8b'.*did you mean 'qwen3-8b'"
    ):
        network_named("qwen-8b")


def test_units_stand_for_real_tokens() -> None:
    time = step_time(GPUS["h100"], NETWORKS["qwen3-8b"])
    assert Speed(time, 8).decode(3, 100) == pytest.approx(8 * time.decode(3, 800))
    assert Speed(time, 8).prefill([10], [10]) == pytest.approx(Speed(time).prefill([80], [80]))


def test_a_speed_is_read_as_it_was_written(tmp_path: Path) -> None:
    speed = Speed(step_time(GPUS["b200"], NETWORKS["qwen3-30b-a3b"]), 16)
    speed.write(tmp_path / "speed.json")
    assert Speed.read(tmp_path / "speed.json") == speed


def test_the_clock_moves_when_results_are_looked_at(tmp_path: Path) -> None:
    clock, other = Clock(tmp_path / "clock"), Clock(tmp_path / "clock")
    begin, gpu = clock.now(), GpuTime(clock)
    gpu.launched(2.0)
    gpu.launched(3.0)  # while the first still computes
    assert other.now() == begin
    gpu.completed()
    assert other.now() == begin + 2
    gpu.completed()
    gpu.completed()  # of nothing
    assert other.now() == begin + 5
    gpu.launched(1.0)
    gpu.completed()
    assert other.now() == begin + 6


def test_coarser_units_keep_lengths_and_mean_scores() -> None:
    places = np.array([0, 3, 7, 12])
    scores = np.array([0.2, 0.4, 0.6, 0.8], np.float32)
    fine = group(PlayedTrace(80, "5", places, scores), prompt=16)
    coarse = in_units(fine, 4)
    assert (coarse.prompt_tokens, coarse.traces[0].tokens) == (4, 20)
    assert coarse.traces[0].positions.tolist() == [0, 1, 3]
    assert coarse.traces[0].scores.tolist() == pytest.approx([0.3, 0.6, 0.8])
    assert in_units(fine, 1) is fine
    assert in_units(fine, 16).traces[0].positions.tolist() == [0]
    assert in_units(fine, 40).traces[0].positions.tolist() == []  # two tokens are the end alone


def test_the_model_holds_tokens_and_scores_of_its_traces(tmp_path: Path) -> None:
    cut = replace(trace(12, None), ends=False)
    groups = [group(trace(20), trace(16, "1/2")), group(cut, trace(9, None))]
    made = write_player(tmp_path, groups, 64)
    weights = load_file(tmp_path / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert weights[player.TRACES].tolist() == [0, 20, 36, 48, 57]
    assert weights[player.QUESTIONS].tolist() == [0, 2, 4]
    starts = weights[player.TRACES].tolist()
    texts = [tokenizer.decode(weights[player.TOKENS][a:b]) for a, b in pairwise(starts)]
    assert texts[0].endswith("</think>\\boxed{5}<|end|>")
    assert texts[1].endswith("</think>\\boxed{1/2}<|end|>")
    assert "<|end|>" not in texts[2] and texts[3].endswith("</think>.<|end|>")
    assert [text.count("\n\n") for text in texts] == [
        len(t.scores) for g in groups for t in g.traces
    ]
    assert boundary_ids(tokenizer, ["\n\n"]) == [player.BOUNDARY]
    assert think_end_id(tokenizer) == player.THINK_END
    assert made.prompts[0] != made.prompts[1]
    assert {len(prompt) for prompt in made.prompts} == {9}
    assert texts[0][:5] == "000\n\n" and texts[0][5] == "0" and texts[1][5] == "1"  # no KV shared


def test_the_scorer_reads_log_odds_and_the_head_every_token(tmp_path: Path) -> None:
    write_player(tmp_path, [group(trace(20, score=0.3))], 64)
    weights, scorer = (
        load_file(tmp_path / "model.safetensors"),
        load_scorer(tmp_path / "scorer.safetensors"),
    )
    odds = weights[player.LOG_ODDS][3]
    states = torch.zeros(player.HIDDEN)
    states[0], states[1] = odds, -odds
    found = torch.sigmoid(torch.relu(scorer.w1 @ states + scorer.b1) @ scorer.w2 + scorer.b2)
    assert float(found) == pytest.approx(0.3, abs=1e-6)
    head = weights[player.HEAD]
    wanted = head.clone()
    wanted[:, :2] = 15.0  # a score must not change the token
    assert (wanted @ head.T).argmax(1).tolist() == list(range(len(head)))


@pytest.mark.parametrize(("auc", "grown"), [(0.7, 0.5), (0.8, 0.0), (0.5, 0.0)])
def test_invented_scores_rank_as_well_as_they_are_said_to(auc: float, grown: float) -> None:
    lengths = [Sampled(4000, RIGHT if i % 2 else "1") for i in range(1200)]
    source = np.random.default_rng(3)
    made = scored("q", 0, lengths, Ranking(auc, grown), 9, 5000, 100, source)

    def ranked(share: float) -> float:
        means = [t.scores[: max(1, int(share * len(t.scores)))].mean() for t in made.traces]
        right, wrong = np.array(means[1::2]), np.array(means[::2])
        return float((right[:, None] > wrong).mean() + (right[:, None] == wrong).mean() / 2)

    assert ranked(1.0) == pytest.approx(auc, abs=0.03)
    if grown and auc > 0.5:
        assert 0.47 < ranked(0.0) < ranked(0.25) - 0.03 < ranked(1.0) - 0.03


def test_a_trace_beyond_the_limit_is_cut_and_has_no_answer() -> None:
    made = scored(
        "q", 0, [Sampled(900, RIGHT), Sampled(300, RIGHT)], Ranking(), 9, 500, 100,
        np.random.default_rng(0),
    )  # fmt: skip
    assert [(t.tokens, t.answer, t.ends) for t in made.traces] == [
        (500, None, False),
        (300, RIGHT, True),
    ]
    assert max(made.traces[0].positions) < 500


@pytest.mark.parametrize("bad", [{"auc": 0.4}, {"auc": 1.0}, {"grown": -1.0}])
def test_a_ranking_that_cannot_be_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SimulationError, match=r"--auc|--grown"):
        Ranking(**bad)


def lengths_file(folder: Path, traces: object) -> Path:
    file = folder / "lengths.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"questions": [{"traces": traces}]}).encode()))
    return file


def test_lengths_and_answers_are_read(tmp_path: Path) -> None:
    file = lengths_file(tmp_path, [[30, 0, ["x"]], [40, -1], [50, 2]])
    expected = (Sampled(30, "0"), Sampled(40, None), Sampled(50, "2"))
    assert read_lengths(file) == (("0", expected),)
    assert len(drawn(expected, 5, np.random.default_rng(0))) == 5


def test_generated_questions_are_as_long_and_as_right_as_published() -> None:
    source = np.random.default_rng(0)
    groups = [Question(4, number).traces(32, source) for number in range(1000)]
    lengths = [trace.tokens for group in groups for trace in group]
    found = np.quantile(lengths, list(QUANTILES))
    assert found.tolist() == pytest.approx(list(QUANTILES.values()), rel=0.08)
    right = [np.mean([trace.answer == RIGHT for trace in group]) for group in groups]
    assert np.mean(right) == pytest.approx(0.67, abs=0.03)
    won = [Counter(t.answer for t in group).most_common(1)[0][0] == RIGHT for group in groups]
    assert np.mean(won) == pytest.approx(0.80, abs=0.04)
    shorter = []
    for group in groups:
        good = np.array([t.tokens for t in group if t.answer == RIGHT])
        bad = np.array([t.tokens for t in group if t.answer != RIGHT])
        if len(good) > 1 and len(bad) > 1:
            shorter.append((good[:, None] < bad).mean())
    assert np.mean(shorter) == pytest.approx(0.70, abs=0.03)


def test_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    for traces in ([["x", 0]], [[0, 0]], [[5]], 7):
        with pytest.raises(SimulationError, match="cannot be read as lengths and answers"):
            read_lengths(lengths_file(tmp_path, traces))
    file = tmp_path / "torn.json.gz"
    file.write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(SimulationError, match="cannot be read"):
        read_lengths(file)
    with pytest.raises(SimulationError, match="does not exist"):
        read_lengths(tmp_path / "none")
