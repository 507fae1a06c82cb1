"""The paper's question sets by name, and choices in words."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from step_sglang.data.benchmarks import BENCHMARKS, with_choices
from step_sglang.data.questions import load_questions
from step_sglang.errors import SourceError
from step_sglang.evaluation.setup import QUESTION_SEED as _QUESTION_SEED
from step_sglang.reasoner import questions
from step_sglang.voting.answers import extract_choice

BESIDE = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("STEP_TEST_DATA") or BESIDE)
GPQA = {
    "Question": "Which gas is most of the air?",
    "Correct Answer": "Nitrogen\n",
    "Incorrect Answer 1": "Oxygen",
    "Incorrect Answer 2": "Argon",
    "Incorrect Answer 3": "Neon",
}


@pytest.mark.parametrize("name", [n for n, known in BENCHMARKS.items() if not known.choices])
def test_questions_from_local_files(name: str) -> None:
    if not (DATA / BENCHMARKS[name].file).exists():
        pytest.skip("a public checkout has no question files beside it")
    found = load_questions(name, data_dir=DATA)
    assert len(found.jobs) == 30 and not found.problems
    assert {job.extract for job in found.jobs} == {"boxed"}
    assert len(load_questions(name, 2, data_dir=DATA).jobs) == 2


def write(file: Path, *rows: object) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_choices_get_shuffled_letters_that_never_change(tmp_path: Path) -> None:
    rows = [{**GPQA, "Question": f"{GPQA['Question']} ({i})"} for i in range(40)]
    write(tmp_path / "gpqa_diamond.jsonl", *rows)
    jobs = load_questions("gpqa-diamond", data_dir=tmp_path).jobs
    assert jobs == load_questions("gpqa-diamond", data_dir=tmp_path).jobs
    assert {job.answer for job in jobs} == set("ABCD")
    for job in jobs:
        assert job.extract == "choice"
        assert f"\n{job.answer}) Nitrogen\n" in job.question
        assert all(f") {gas}\n" in job.question for gas in ("Oxygen", "Argon", "Neon"))
    assert extract_choice("So the answer is \\boxed{(C)}.") == "C"


def test_choices_in_words_already_stay(tmp_path: Path) -> None:
    row = {"question": "Which? A) one B) two", "answer": "B"}
    assert with_choices(row) == row
    assert with_choices({**GPQA, "Incorrect Answer 2": None}) is None
    write(tmp_path / "gpqa_diamond.jsonl", row, {**GPQA, "Incorrect Answer 2": None})
    found = load_questions("gpqa-diamond", data_dir=tmp_path)
    assert [(job.answer, job.extract) for job in found.jobs] == [("B", "choice")]
    assert len(found.problems) == 1


def test_without_a_file_and_a_connection_the_error_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    loader = SimpleNamespace(load_dataset=unreachable)
    monkeypatch.setitem(sys.modules, "datasets", loader)
    with pytest.raises(SourceError, match=r"aime_2025\.jsonl and name the folder with --data-dir"):
        load_questions("aime-25", data_dir=tmp_path)


def test_a_benchs_reasoner_questions_are_new_ones() -> None:
    """Nobody trained on them, and neither the reasoner's card nor the demo looked at them."""
    asked = {job.question for job in load_questions("reasoner:test", 200, seed=_QUESTION_SEED).jobs}
    assert len(asked) == 200
    for split in ("train", "scorer-train", "scorer-validation"):
        assert not asked & {q.question for q in questions(split, 500)}
    for seed in (0, 1):
        assert not asked & {q.question for q in questions("test", 500, seed)}
