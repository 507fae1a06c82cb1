"""Labels by vote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from step_sglang.data.questions import Fields, load_questions
from step_sglang.training.errors import TrainError
from step_sglang.training.fit import Recipe
from step_sglang.training.grade import graded
from step_sglang.training.reader import Reader
from step_sglang.training.store import Writer
from step_sglang.training.train import train_scorer
from step_sglang.training.voted import Labels, VotedReader
from tests.training_samples import meta, question


def store(folder: Path, shares: list[float], first: int = 0) -> Path:
    rng = np.random.default_rng(first)
    with Writer(folder, meta()) as writer:
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


def test_questions_may_have_no_answers(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "what?"}\n{"question": "why?"}\n')
    found = load_questions(str(file), fields=Fields(answer=None))
    assert [job.question for job in found.jobs] == ["what?", "why?"]
    assert graded("so \\boxed{7}", "stop", found.jobs[0].answer) == ("7", False)
