"""Training on planted signals: what must be found, what must be refused, what is written."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.scoring.calibration import calibration_from_json
from step_sglang.scoring.scorer import ScorerInfo, load_scorer, save_scorer
from step_sglang.training import trained_on as trained_on_module
from step_sglang.training.calibrate import BY_VOTE, calibration_on, doubts
from step_sglang.training.card import card_text, check_card
from step_sglang.training.data import Chunks, score_steps
from step_sglang.training.errors import TrainError
from step_sglang.training.fit import Recipe, ScorerNetwork, fit
from step_sglang.training.linear_probe import fit_linear_probe
from step_sglang.training.metrics import RUNNING_MEAN
from step_sglang.training.objectives import PairSampler
from step_sglang.training.plots import PLOTS
from step_sglang.training.reader import Reader
from step_sglang.training.split import split_questions
from step_sglang.training.store import Writer
from step_sglang.training.stored import StoredQuestion
from step_sglang.training.train import (
    Shares,
    check_test_store,
    evaluate_file,
    evaluate_scorer,
    jsonable,
    train_scorer,
)
from step_sglang.training.trained_on import question_hashes, trained_on
from tests.training_samples import D, meta, planted_store, question

QUICK = {"epochs": 6, "learning_rate": 1e-3}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("planted") / "store", 68)


@pytest.mark.parametrize("objective", ["bce", "pairwise"])
def test_the_planted_signal_is_found(store: Path, tmp_path: Path, objective: str) -> None:
    trained = train_scorer(store, tmp_path / "out", Recipe(objective=objective, **QUICK))
    check_card(tmp_path / "out" / "README.md", load_scorer(trained.scorer))
    test = trained.test.ranking[RUNNING_MEAN]
    assert test[1.0].auc_within.value > 0.95 and test[0.25].auc_within.value > 0.85
    assert test[0.25].auc_within.value < test[1.0].auc_within.value
    assert trained.test.step_auc > 0.85 and trained.test.questions == 10
    assert trained.linear_probe.ranking[RUNNING_MEAN][1.0].auc_within.value > 0.95
    # the scores mean something: half of the traces are correct, and the score says which
    assert trained.test.trace_calibration.ece < 0.25
    # fitted on the validation questions, it makes them mean what they say
    assert trained.calibration is not None and trained.calibration.questions == 10
    assert trained.test.weight_calibration is not None
    assert trained.test.weight_calibration.ece < trained.test.trace_calibration.ece
    assert trained.test.votes["calibrated"].accuracy.value == 1

    scorer = load_scorer(trained.scorer)
    assert scorer.info.model == "planted" and scorer.info.delimiters == ("\n\n",)
    assert scorer.info.think_end == "</think>" and scorer.hidden_size == D
    assert scorer.info.calibration == trained.calibration
    summary = scorer.info.training
    assert summary["objective"] == objective
    assert summary["questions"] == {"train": 48, "validation": 10, "test": 10}
    written = json.loads(trained.metrics.read_text())
    assert written["test"]["ranking"][RUNNING_MEAN]["50%"]["auc_within"]["value"] == pytest.approx(
        test[0.5].auc_within.value, abs=1e-5
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "scorer.safetensors", "README.md", "metrics.json", *PLOTS,
        *(name.replace(".png", ".pdf") for name in PLOTS),
    }  # fmt: skip
    for name in PLOTS:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    assert scorer.w1.dtype == torch.bfloat16
    # the file scores as the network that was trained
    again = evaluate_file(trained.scorer, store)
    assert again.questions == 68 and again.ranking[RUNNING_MEAN][1.0].auc_within.value > 0.95
    reader = Reader(store)
    network = ScorerNetwork.from_scorer(scorer)
    one, other = (
        score_steps(reader, reader.shards[:2], n) for n in (network, trained.fitted.network)
    )
    assert np.allclose(one, other, atol=1e-6)


def test_pairwise_ignores_what_only_tells_questions_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with Writer(tmp_path, meta(n=16)) as writer:
        for i in range(60):
            hard = i % 2
            share = 0.15 if hard else 0.85
            difficulty = 4.0 * (1 if hard else -1)
            writer.add(question(f"q{i}", rng, 16, share=share, signal=0.25, difficulty=difficulty))
    reader = Reader(tmp_path)
    split = split_questions(reader, 0.3, 0.0, 0)
    network = fit(reader, split.train, split.validation, Recipe("pairwise", **QUICK)).network
    with torch.no_grad():
        axis = torch.zeros(3, D)
        axis[1, 0] = axis[2, 1] = 1.0
        base, correctness, difficulty_effect = network(axis).tolist()
    assert correctness - base > 0.1 and correctness - base > 2 * abs(difficulty_effect - base)
    bce = fit(reader, split.train, split.validation, Recipe("bce", **QUICK)).network
    with torch.no_grad():
        base, correctness, difficulty_effect = bce(axis).tolist()
    assert base - difficulty_effect > correctness - base, "the trap must catch bce"


def test_training_is_reproducible(store: Path) -> None:
    reader = Reader(store)
    split = split_questions(reader, 0.2, 0.2, 0)
    for objective in ("bce", "pairwise"):
        recipe = Recipe(objective, epochs=2)
        one, two = (fit(reader, split.train, split.validation, recipe) for _ in range(2))
        assert one.history == two.history
        for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_paper_stops_early_and_keeps_the_best_epoch(store: Path) -> None:
    reader = Reader(store)
    split = split_questions(reader, 0.2, 0.2, 0)
    fitted = fit(
        reader, split.train, split.validation, Recipe("bce", learning_rate=0.03, patience=2)
    )
    figures = [0.75 * e.step_auc + 0.25 * e.step_f1 for e in fitted.history]
    assert len(figures) < 20 and len(figures) == fitted.best_epoch + 2
    assert figures[fitted.best_epoch - 1] == max(figures)
    labels = [r.correct for s in split.train for r in reader.traces(s) for _ in range(r.num_steps)]
    assert fitted.positive_weight == pytest.approx(labels.count(False) / labels.count(True))


def test_a_split_is_by_question_and_stable(store: Path) -> None:
    reader = Reader(store)
    split = split_questions(reader, 0.2, 0.1, 7)
    parts = [set(split.train), set(split.validation), set(split.test)]
    assert [len(part) for part in parts] == [47, 14, 7]
    assert set.union(*parts) == set(reader.shards) and sum(map(len, parts)) == 68
    assert split == split_questions(Reader(store), 0.2, 0.1, 7)
    assert split != split_questions(reader, 0.2, 0.1, 8)


def test_chunks_stay_within_memory_and_cover_every_step_once(store: Path) -> None:
    reader = Reader(store)
    limit = 20_000  # bytes; 32 per row
    small = Chunks(reader, reader.shards, limit, seed=0)
    orders = []
    for _ in range(2):
        chunks = list(small)
        assert len(chunks) > 3
        assert all(chunk.hidden.nbytes <= limit for chunk in chunks)
        assert all(chunk.hidden.dtype == torch.float16 for chunk in chunks)
        orders.append(torch.cat([chunk.hidden[:, 3] for chunk in chunks]))
        labels = torch.cat([chunk.label for chunk in chunks])
        assert len(labels) == small.rows and labels.sum() == small.positive_rows
    (whole,) = Chunks(reader, reader.shards, 1 << 30, seed=0)
    assert torch.equal(orders[0].sort().values, whole.hidden[:, 3].sort().values)
    assert not torch.equal(orders[0], orders[1]), "every epoch must mix anew"
    assert whole.label.tolist() == whole.table.correct[whole.table.step_trace].tolist()
    split = split_questions(reader, 0.2, 0.2, 0)
    recipe = Recipe("pairwise", memory_mb=1, **QUICK)
    assert fit(reader, split.train, split.validation, recipe).history[-1].within > 0.9


def test_pairs_are_of_one_question_and_equally_far_along(store: Path) -> None:
    reader = Reader(store)
    (chunk,) = Chunks(reader, reader.shards, 1 << 30, seed=0)
    table = chunk.table
    good, bad = PairSampler(table).draw(5000, np.random.default_rng(0))
    trace = table.step_trace
    assert table.correct[trace[good]].all() and not table.correct[trace[bad]].any()
    assert (table.question[trace[good]] == table.question[trace[bad]]).all()
    along = [
        (rows - table.offsets[trace[rows]]) / table.num_steps[trace[rows]] for rows in (good, bad)
    ]
    assert np.abs(along[0] - along[1]).max() <= 1 / 3  # at least 3 steps each
    assert len(np.unique(trace[good])) > 0.9 * table.correct.sum()


def test_the_floor_is_a_linear_function_of_the_states(store: Path) -> None:
    reader = Reader(store)
    linear_probe = fit_linear_probe(reader, reader.shards[:40])
    assert int(linear_probe.weight.abs().argmax()) == 0 and linear_probe.weight[0] > 0
    assert linear_probe(torch.zeros(2, D)).shape == (2,)


def refused(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(TrainError, match=message):
        train_scorer(*args, **kwargs)


@pytest.mark.parametrize(("share", "kind"), [(1.0, "correct"), (0.0, "wrong")])
def test_one_class_only(tmp_path: Path, share: float, kind: str) -> None:
    made = planted_store(tmp_path / "s", 10, share=share)
    refused(f"all .* traces .* are {kind}", made, tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_questions_without_answers_get_other_advice(store: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with Writer(tmp_path / "s", meta()) as writer:
        for i in range(12):
            made = question(f"q{i}", rng)
            unknown = tuple(replace(trace, answer="", correct=False) for trace in made.traces)
            writer.add(StoredQuestion(unknown, made.hidden))
    told = "none has an answer .*`train --labels vote`.* a store with true answers"
    refused(told, tmp_path / "s", tmp_path / "o", Recipe())
    refused(told, store, tmp_path / "o", Recipe(), test_store=tmp_path / "s")
    scorer = ScorerNetwork(D).as_scorer(ScorerInfo("planted"))
    with pytest.raises(TrainError, match=told):
        calibration_on(scorer, tmp_path / "s")


@pytest.mark.parametrize("scale", [1e20, 1e37])
def test_states_that_float32_cannot_square(tmp_path: Path, scale: float) -> None:
    rng = np.random.default_rng(0)
    with Writer(tmp_path / "s", meta(dtype="bfloat16")) as writer:
        for i in range(12):
            made = question(f"q{i}", rng)
            writer.add(StoredQuestion(made.traces, made.hidden * scale))
    refused("are as large as .*float32 cannot hold", tmp_path / "s", tmp_path / "o", Recipe())
    reader = Reader(tmp_path / "s")
    split = split_questions(reader, 0.3, 0.0, 0)
    with pytest.raises(TrainError, match=r"loss of epoch \d+ is (nan|inf).*learning rate 1e\+30"):
        fit(reader, split.train, split.validation, Recipe(learning_rate=1e30))


def test_no_boundaries(tmp_path: Path) -> None:
    made = planted_store(tmp_path / "s", 10, steps=(0, 0))
    refused("none of the 48 traces .* has a step.*--delimiter", made, tmp_path / "o", Recipe())


def test_some_traces_without_a_boundary_are_fine(tmp_path: Path) -> None:
    made = planted_store(tmp_path / "s", 30, steps=(0, 4))
    trained = train_scorer(made, tmp_path / "o", Recipe("bce", **QUICK))
    assert trained.test.traces_without_steps > 0
    assert trained.test.ranking[RUNNING_MEAN][1.0].auc_within.value > 0.8


def test_no_mixed_question(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with Writer(tmp_path / "s", meta()) as writer:
        for i in range(20):
            writer.add(question(f"q{i}", rng, share=float(i % 2)))
    refused(
        "needs: collect more traces",
        tmp_path / "s",
        tmp_path / "o",
        Recipe("pairwise"),
        Shares(0.3),
    )


def test_too_few_questions(tmp_path: Path) -> None:
    refused("too few", planted_store(tmp_path / "s", 2), tmp_path / "o", Recipe())


def test_test_stores(store: Path, tmp_path: Path) -> None:
    other = planted_store(tmp_path / "other", 10, seed=5)
    trained = train_scorer(store, tmp_path / "o", Recipe("bce", **QUICK), test_store=other)
    assert trained.test.questions == 10 and trained.validation.questions == 10
    refused("questions must be new", store, tmp_path / "o", Recipe(), test_store=store)
    wide = planted_store(tmp_path / "wide", 10, seed=6, d=D + 8)
    refused("scorer of another model", store, tmp_path / "o", Recipe(), test_store=wide)


def test_a_test_question_is_no_training_question_with_a_blank_at_its_end(
    store: Path, tmp_path: Path
) -> None:
    other = planted_store(tmp_path / "other", 10, seed=5)
    index = other / "index.jsonl"
    known = Reader(store).traces(0)[0].question
    index.write_text(index.read_text().replace("what is s5q3?", f"{known} \\n"))
    says = "1 questions are in both"
    refused(says, store, tmp_path / "o", Recipe("bce", **QUICK), test_store=other)


def test_a_readme_of_something_else_stays(store: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    refused(r"is no card of a scorer, and would be overwritten", store, tmp_path, Recipe())
    assert os.listdir(tmp_path) == ["README.md"]


def other_steps(folder: Path, questions: int = 12, **changed: Any) -> Path:
    rng = np.random.default_rng(9)
    with Writer(folder, meta(**changed)) as writer:
        for i in range(questions):
            writer.add(question(f"other{i}", rng))
    return folder


def test_stores_of_other_steps_and_of_copies(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that end elsewhere are refused wherever a scorer meets a store; a copy is not."""
    info = ScorerInfo("org/planted", ("\n\n",), "</think>")
    scorer = ScorerNetwork(D).as_scorer(info)
    lines = other_steps(tmp_path / "lines", delimiters=("\n",))
    beyond = other_steps(tmp_path / "beyond", think_end=None)
    copy = other_steps(tmp_path / "copy", model="/models/planted")
    for found, message in (
        (lines, r"ends with '\\n\\n', one in .*lines with '\\n': .* --delimiter '\\n\\n'"),
        (beyond, "stop at </think>, those in .*beyond go on to the trace's end.*--scope thinking"),
    ):
        refused(message, store, tmp_path / "o", Recipe(), test_store=found)
        for measure in (
            lambda found=found: evaluate_scorer(scorer, Reader(found), Path("s")),
            lambda found=found: calibration_on(scorer, found),
        ):
            with pytest.raises(TrainError, match=message):
                measure()
        unknown = replace(scorer, info=ScorerInfo("org/planted"))  # a file that does not say
        assert calibration_on(unknown, found).questions == 12
    everything = replace(info, think_end=None, training={"source": "test"})
    with pytest.raises(TrainError, match=r"go on to the trace's end, those in .*--scope all"):
        calibration_on(replace(scorer, info=everything), copy)
    assert calibration_on(scorer, copy).questions == 12
    assert evaluate_scorer(scorer, Reader(copy), Path("s")).questions == 12
    check_test_store(Reader(store), Reader(copy))
    (tmp_path / "models" / "planted").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    relative = other_steps(tmp_path / "relative", model="models/planted")
    assert calibration_on(scorer, relative).questions == 12
    with pytest.raises(TrainError, match="trained for else/planted"):
        named = replace(scorer, info=replace(info, model="else/planted"))
        calibration_on(named, other_steps(tmp_path / "named", model="org/planted"))


def test_a_calibration_knows_its_questions_and_their_labels(store: Path, tmp_path: Path) -> None:
    trained = train_scorer(store, tmp_path / "o", Recipe(epochs=1, learning_rate=1e-3))
    scorer = load_scorer(trained.scorer)
    with pytest.raises(TrainError, match=r"trained on 48 of the 68 questions in .*new questions"):
        calibration_on(scorer, store)
    shown = CliRunner().invoke(app, ["inspect", str(trained.scorer), "--on", str(store)])
    assert shown.exit_code == 0, shown.output
    assert "trained on 48 of the 68 questions" in " ".join(shown.stderr.split())
    assert "question hashes" not in shown.output
    fresh = planted_store(tmp_path / "fresh", 12, seed=3)
    found = calibration_on(scorer, fresh)
    assert found.labels == "answers" and found.held_out
    assert found == calibration_from_json(json.loads(json.dumps(found.as_json())))
    assert doubts(scorer, found, Reader(fresh).meta) == ()
    assert trained.calibration is not None and trained.calibration.held_out
    assert "fitted on 10 held-out questions;" in (tmp_path / "o" / "README.md").read_text()

    # A file of an earlier version does not say which questions trained it.
    training = {k: v for k, v in scorer.info.training.items() if k != "question_hashes"}
    old = replace(scorer, info=replace(scorer.info, training=training))
    for folder in (store, fresh):
        found = calibration_on(old, folder)
        assert not found.held_out
        (said,) = doubts(old, found, Reader(folder).meta)
        assert "trained on test, where these traces are from too" in said
        stated = card_text(replace(old, info=replace(old.info, calibration=found)))
        assert f"fitted on {found.questions} questions;" in stated
    damaged = {**training, "question_hashes": "?"}
    assert trained_on(damaged, Reader(store)) is None

    voted = other_steps(tmp_path / "voted", sampling={"labels": "vote", "agreement": 0.5})
    found = calibration_on(scorer, voted)
    assert found.labels == "vote" and doubts(scorer, found, Reader(voted).meta) == (BY_VOTE,)
    stated = card_text(replace(scorer, info=replace(scorer.info, calibration=found)))
    assert "fitted on 12 held-out questions to what their traces agree on, not to true" in stated


def test_a_scorer_of_many_questions_states_a_sample_of_them(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(store)
    monkeypatch.setattr(trained_on_module, "_MOST", 20)
    stated = {"question_hashes": question_hashes(reader, reader.shards)}
    assert trained_on(stated, reader) == 20


def test_a_scorer_of_another_model(store: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.safetensors"
    save_scorer(ScorerNetwork(D + 8).as_scorer(ScorerInfo("other")), wide)
    with pytest.raises(TrainError, match=r"size 24 .*other.* holds 16 .*planted"):
        evaluate_file(wide, store)
    named = tmp_path / "named.safetensors"
    save_scorer(ScorerNetwork(D).as_scorer(ScorerInfo("other")), named)
    with pytest.raises(TrainError, match="trained for other"):
        evaluate_file(named, store)


def test_bad_settings() -> None:
    for call in (
        lambda: Recipe(objective="mse"),
        lambda: Recipe(epochs=0),
        lambda: Shares(0.6, 0.5),
        lambda: Shares(0.0),
    ):
        with pytest.raises(TrainError):
            call()


def test_an_unwritable_folder(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused("cannot write", store, tmp_path / "file" / "o", Recipe("bce", epochs=1))


def test_jsonable() -> None:
    assert jsonable({0.25: (float("nan"), 1.0), "a": [None]}) == {"25%": [None, 1.0], "a": [None]}


@pytest.mark.parametrize(
    ("dtype", "w1"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_the_weights_dtype_is_that_of_the_file(
    store: Path, tmp_path: Path, dtype: str, w1: torch.dtype
) -> None:
    recipe = Recipe("bce", **{**QUICK, "epochs": 1}, dtype=dtype)
    trained = train_scorer(store, tmp_path / "out", recipe)
    scorer = load_scorer(trained.scorer)
    assert scorer.w1.dtype == w1 and scorer.b1.dtype == torch.float32
    # nothing was rounded after it was measured
    assert torch.equal(scorer.w1.float(), trained.fitted.network.first.weight)
    with pytest.raises(TrainError, match="--dtype must be one of bfloat16, float32"):
        Recipe(dtype="float16")
