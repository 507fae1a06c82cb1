"""Replays what fuzzing found (`python -m tests.fuzz.fuzz_scorer`, `fuzz_request`)."""

from __future__ import annotations

import pytest

from tests.fuzz import targets


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", targets.TARGETS)
def test_replay(name: str) -> None:
    inputs = targets.corpus(name)
    assert len(inputs) >= 80 and targets.corpus_file(name).stat().st_size < 100_000
    for content in inputs:
        targets.TARGETS[name](content)
    print(f"{name}: {len(inputs)} inputs")


def test_the_scorer_inputs_reach_both_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the corpus would only show that everything is refused."""
    loaded: list[str] = []
    original = targets.load_scorer

    def watched(path):  # type: ignore[no-untyped-def]
        scorer = original(path)
        loaded.append(path.suffix)
        return scorer

    monkeypatch.setattr(targets, "load_scorer", watched)
    for content in targets.corpus("scorer"):
        targets.scorer(content)
    assert {".pt", ".safetensors"} == set(loaded)
    assert len(loaded) < len(targets.corpus("scorer")) / 2
