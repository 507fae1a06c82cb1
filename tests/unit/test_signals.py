"""Signals of a trace at a moment, and learned judges of its steps."""

from __future__ import annotations

import numpy as np
import pytest

from step_sglang.training.aggregators import (
    KINDS,
    LOSSES,
    Features,
    fit_judge,
    judge,
    load_sequences,
)
from step_sglang.training.data import build_labels
from step_sglang.training.metrics import within_auc
from step_sglang.training.reader import Reader
from step_sglang.training.signals import (
    auc_by_question,
    mean_estimate,
    own_fraction,
    running_signals,
    same_tokens,
)
from step_sglang.training.store import Writer
from tests.training_samples import meta, question


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("store")
    with Writer(folder, meta()) as writer:
        for i in range(24):
            writer.add(question(f"q{i}", rng, signal=0.7))
    return Reader(folder)


def test_running_statistics_are_what_a_loop_over_prefixes_says(reader: Reader) -> None:
    table = build_labels(reader, reader.shards[:3])
    scores = np.random.default_rng(1).random(int(table.offsets[-1]))
    found = running_signals(table, scores)
    for start, end in zip(table.offsets[:-1], table.offsets[1:], strict=True):
        for i in range(start, end):
            prefix = scores[start : i + 1]
            weights = 0.5 ** (np.arange(len(prefix))[::-1] / 2)
            assert found["mean"][i] == pytest.approx(prefix.mean())
            assert found["last"][i] == prefix[-1]
            assert found["minimum"][i] == prefix.min()
            assert found["mean of the last 4"][i] == pytest.approx(prefix[-4:].mean())
            logits = np.log(prefix / (1 - prefix))
            assert found["mean of logits"][i] == pytest.approx(logits.mean())
            expected = (weights * prefix).sum() / weights.sum()
            assert found["exponential mean, half of 2 steps"][i] == pytest.approx(expected)


def test_at_a_fraction_of_its_own_steps_every_trace_takes_part(reader: Reader) -> None:
    table = build_labels(reader, reader.shards)
    moment = own_fraction(table, 0.5)
    values = moment.pick(np.arange(int(table.offsets[-1]), dtype=np.float64))
    assert (values == table.offsets[:-1] + np.ceil(table.num_steps / 2) - 1).all()
    noise = np.random.default_rng(2).random(len(values))
    per_question = auc_by_question(table, moment, noise)
    expected = within_auc(noise, table.correct, table.question)
    assert np.nanmean(per_question) == pytest.approx(expected)


def test_at_the_same_number_of_tokens_only_those_that_run_take_part(reader: Reader) -> None:
    table = build_labels(reader, reader.shards)
    moment = same_tokens(table, 1.0)
    for trace in range(len(table.question)):
        mine = table.question == table.question[trace]
        mean = table.num_tokens[mine].mean()
        assert moment.present[trace] == (table.num_tokens[trace] > mean)
        if moment.present[trace]:
            assert table.positions[moment.row[trace]] < mean
    # All are equally long then, so the length ranks nobody.
    assert np.nanmean(auc_by_question(table, moment, -moment.length)) == 0.5


def test_given_the_length_only_similar_pairs_count(reader: Reader) -> None:
    table = build_labels(reader, reader.shards)
    moment = own_fraction(table, 1.0)
    noise = np.random.default_rng(0).random(len(table.question))
    by_length = -moment.length - 1e-3 * noise
    free = np.nanmean(auc_by_question(table, moment, by_length))
    assert auc_by_question(table, moment, by_length, 1e9) == pytest.approx(
        auc_by_question(table, moment, by_length), nan_ok=True
    )
    equal = auc_by_question(table, moment, by_length, 0.0)
    assert np.isnan(equal).sum() >= np.isnan(auc_by_question(table, moment, by_length)).sum()
    assert np.isfinite(free) and np.isfinite(np.nanmean(equal))
    found = mean_estimate(equal)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_judge_finds_a_planted_signal_and_sees_no_later_step(
    reader: Reader, kind: str, loss: str
) -> None:
    train = load_sequences(reader, reader.shards[:14])
    held = load_sequences(reader, reader.shards[14:18])
    new = load_sequences(reader, reader.shards[18:])
    features = Features(position=True, siblings=loss == "pairwise")
    model, scale = fit_judge(kind, loss, features, train, held, 0, epochs=8)
    values = judge(model, scale, new)
    moment = own_fraction(new.table, 1.0)
    assert np.nanmean(auc_by_question(new.table, moment, moment.pick(values))) > 0.8
    if features.siblings:
        return  # what comes later belongs to others too
    cut = new.inputs.clone()
    cut[:, :, 3:] = 5.0
    again = judge(model, scale, type(new)(new.table, cut, new.mask, new.correct))
    early = np.concatenate([np.arange(count) < 3 for count in new.table.num_steps])
    assert values[early] == pytest.approx(again[early], abs=1e-4)
    assert values[~early] != pytest.approx(again[~early], abs=1e-4)
