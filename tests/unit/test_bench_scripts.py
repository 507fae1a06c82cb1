"""Scripts of bench/ that go on where they were stopped, and one that only has to run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a script; called with arguments it runs."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def call(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *arguments])
    module.main()


def test_limits_of_groups(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--questions",
        "2",
        "--traces",
        "16",
        "--bursts",
        "2",
        "--limits",
        "off",
        "--keep",
        "4",
    ]
    call(monkeypatch, script("limits"), *command)
    off, kept = (line.split() for line in capsys.readouterr().out.splitlines()[-2:])
    assert (off[0], kept[:3]) == ("off", ["auto,", "keep", "4"])
    right, mean, whole, at_once = map(float, off[2:])
    assert 0 <= right <= 1 and 0 < mean <= whole and 1 <= at_once <= 2


@pytest.fixture
def refill(script: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on questions that cost nothing. ``asked``: those it was to do."""
    module: Any = script("refill_model")
    module.asked = []
    methods = [*module.CONTROLS, "step-refill", "step-refill-early"]

    def results(asked: list[Any], *_: object) -> Iterator[tuple[Any, dict[str, Any]]]:
        module.asked += [question.question for question in asked]
        one = module.Outcome(True, 10, 100, 50, 2, 3, 0, 0)
        yield from ((question, dict.fromkeys(methods, one)) for question in asked)

    monkeypatch.setattr(module, "results", results)
    monkeypatch.setattr(module, "TraceSource", lambda *_: None)
    return module


def test_a_stopped_run_of_refill_goes_on(
    refill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "found.jsonl"

    def go(*more: str) -> list[str]:
        refill.asked.clear()
        few = ["--questions", "4", "--repeats", "1", "--refilled", "step-refill"]
        call(monkeypatch, refill, "--out", str(file), "--together", "2", *few, *more)
        return list(refill.asked)

    first = go("--questions", "2")
    assert len(first) == 2 and len(file.read_text().splitlines()) == 1 + 2 * 7
    # A kill in the middle of the second question's rows, and of a line.
    file.write_text(file.read_text()[:-400])
    assert go() == [first[1], *refill.asked[1:]] and len(refill.asked) == 3
    assert len(file.read_text().splitlines()) == 1 + 4 * 7 and go() == []
    # Of other settings it is another file.
    for more, says in ((["-n", "8"], "n 16, now 8"), (["--seed", "3"], "seed 18, now 3"),
                       (["--pool", "99"], "now 99"), (["--operations", "9"], "operations 8, now 9"),
                       (["--refilled", "gambit"], "refilled")):  # fmt: skip
        with pytest.raises(SystemExit, match=says):
            go(*more)
    # An earlier version's file is shown, not gone on with.
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[1:]))
    with pytest.raises(SystemExit, match="with --report, and go on in another --out"):
        go()
    capsys.readouterr()
    go("--report")
    shown = capsys.readouterr().out
    assert "4 questions" in shown and "| simulated | step-refill-early | 100.0 |" in shown
    assert file.read_text() == "".join(lines[1:])


def test_a_stopped_run_of_prefixes_goes_on(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = script("prefix_signal")
    asked: list[str] = []

    def prefixes_of(source: object, part: list[Any], *_: object) -> list[dict[str, Any]]:
        asked.extend(question.question for question in part)
        pair = [{"score": 0.4, "share": 0.5}, {"score": 0.6, "share": 1.0}]
        at = {str(depth): pair for depth in module.DEPTHS}
        return [{"question": q.question, "right": [True], "prefixes": at} for q in part]

    monkeypatch.setattr(module, "prefixes_of", prefixes_of)
    monkeypatch.setattr(module, "TraceSource", lambda *_: SimpleNamespace())
    file = tmp_path / "found.jsonl"
    call(monkeypatch, module, "--out", str(file), "--questions", "3")
    file.write_text(file.read_text()[:-10])
    first = list(asked)
    asked.clear()
    call(monkeypatch, module, "--out", str(file), "--questions", "3")
    assert asked == first[2:] and len(file.read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="traces 16, now 8"):
        call(monkeypatch, module, "--out", str(file), "--questions", "3", "--traces", "8")
    assert json.loads(file.read_text().splitlines()[0])["settings"]["model"] == "reasoner"
    call(monkeypatch, module, "--out", str(file), "--report")
