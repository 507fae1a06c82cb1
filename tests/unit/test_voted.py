"""Labels by vote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.data.questions import Fields, load_questions
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.errors import TrainError
from step_sglang.training.fit import Recipe
from step_sglang.training.grade import graded
from step_sglang.training.reader import Reader
from step_sglang.training.store import Writer
from step_sglang.training.train import train_scorer
from step_sglang.training.voted import Labels, VotedReader
from tests.training_samples import meta, question


def store(folder: Path, shares: list[float], first: int = 0, **changed: Any) -> Path:
    rng = np.random.default_rng(first)
    with Writer(folder, meta(**changed)) as writer:
        for i, share in enumerate(shares, start=first):
            writer.add(question(f"q{i}", rng, share=share))
    return folder


def test_traces_are_labelled_by_the_answer_that_their_question_agrees_on(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", [1.0, 0.9, 0.5, 0.0])
    voted, true = VotedReader(folder, 0.6), Reader(folder)
    assert 0 < len(voted.shards) < 4
    for shard in voted.shards:
        answers = [trace.extracted for trace in true.traces(shard)]
        winner = max(set(answers), key=answers.count)
        assert answers.count(winner) >= 0.6 * len(answers)
        assert [t.correct for t in voted.traces(shard)] == [a == winner for a in answers]
        assert (voted.load(shard).hidden == true.load(shard).hidden).all()


def test_questions_without_agreement_are_left_out_and_none_is_an_error(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", [0.0, 0.0])  # three wrong answers, 3 of 8 at most
    with pytest.raises(TrainError, match=r"of none a share of 0\.9 of the traces agrees"):
        VotedReader(folder, 0.9)
    with pytest.raises(TrainError, match="--agreement must be a share"):
        Labels("vote", 0.0)
    with pytest.raises(TrainError, match="--labels must be one of"):
        Labels("guess")


def test_a_scorer_learns_from_votes_what_true_labels_would_teach(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", [0.7] * 30)
    tested = store(tmp_path / "t", [0.5] * 12, first=100)
    recipe = Recipe(epochs=8, learning_rate=1e-3)
    trained = train_scorer(
        folder, tmp_path / "out", recipe, test_store=tested, labels=Labels("vote", 0.5)
    )
    assert trained.test.ranking["running mean"][1.0].auc_within.value > 0.9


def test_a_store_that_was_voted_when_it_was_collected_says_so(tmp_path: Path) -> None:
    by_vote = {"sampling": {"labels": "vote", "agreement": 0.7}}
    voted = store(tmp_path / "s", [0.5] * 20, **by_vote)
    true = store(tmp_path / "t", [0.5] * 12, first=100)
    recipe, out = Recipe(epochs=1), tmp_path / "out"
    trained = train_scorer(voted, out, recipe, test_store=true)
    assert load_scorer(trained.scorer).info.training["labels"] == "vote"
    found = json.loads(trained.metrics.read_text())["labels"]
    assert found == {"source": "vote", "agreement": 0.7}
    assert "| labels | vote |" in (out / "README.md").read_text()
    with pytest.raises(TrainError, match=r"s was collected with --labels vote: .* needs true ones"):
        train_scorer(true, tmp_path / "o", recipe, test_store=voted)
    for folder, warned in ((voted, True), (true, False)):
        shown = CliRunner().invoke(app, ["inspect", str(out), "--on", str(folder)])
        assert shown.exit_code == 0
        said = " ".join(shown.stderr.split())
        assert ("against its traces' own vote, not true answers" in said) == warned


def test_questions_may_have_no_answers(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "what?"}\n{"question": "why?"}\n')
    found = load_questions(str(file), fields=Fields(answer=None))
    assert [job.question for job in found.jobs] == ["what?", "why?"]
    assert graded("so \\boxed{7}", "stop", found.jobs[0].answer) == ("7", False)
