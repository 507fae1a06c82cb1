"""Collecting and training against the real server: kills, stored states, a trained scorer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from step_sglang.reasoner import model_path, questions
from step_sglang.reasoner.tokenizer import prompt_text
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.reader import Reader
from tests.server.expected import hidden_states, step_positions
from tests.server.launch import Server, serve
from tests.server.launch import start_command as start

pytestmark = pytest.mark.server

QUESTIONS, N = 10, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "collect.log"
    with serve(model_path(), "--enable-step", "--step-capture", log=log) as running:
        yield running


def run(*arguments: object) -> str:
    """Run the command to its successful end; returns what it printed."""
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def train(store: Path, out: Path) -> str:
    """Train on a split that has right and wrong traces on each side; so few may all be wrong."""
    options = ("--epochs", 2, "--threads", 1, "--validation", 0.3, "--test", 0.3)
    for seed in range(10):
        process = start("train", store, "-o", out, *options, "--seed", seed)
        shown, err = process.communicate(timeout=300)
        if "needs both kinds" not in " ".join(err.split()):
            assert process.returncode == 0, err
            return shown
    raise AssertionError("no split of ten has right and wrong traces on each side")


def stopped_when(process: subprocess.Popen[str], store: Path, stop: Callable[[], None]) -> str:
    """Call `stop` once two questions are in the store; returns the command's messages."""
    deadline = time.monotonic() + 240
    index = store / "index.jsonl"
    while not (index.exists() and index.read_text().count("\n") >= 2 * N):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing was collected"
        time.sleep(0.05)
    stop()
    return process.communicate(timeout=120)[1]


def assert_complete(store: Path) -> Reader:
    """Every question once, with its n traces, and no file that belongs to none."""
    reader = Reader(store, with_text=True)
    counts = Counter(r.question_id for shard in reader.shards for r in reader.traces(shard))
    assert not reader.problems
    assert len(counts) == QUESTIONS and set(counts.values()) == {N}
    assert len(list((store / "shards").iterdir())) == QUESTIONS
    return reader


@pytest.fixture(scope="module")
def store(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose collection was killed once and run again."""
    folder = tmp_path_factory.mktemp("collected") / "store"
    arguments = (
        *("collect", "reasoner:scorer-train", "--url", server.url, "-o", folder, "-n", N),
        *("--limit", QUESTIONS, "--keep-text", "--dtype", "float32", "--concurrency", 2),
    )
    process = start(*arguments)
    stopped_when(process, folder, lambda: process.send_signal(signal.SIGKILL))
    kept = (folder / "index.jsonl").read_text().count("\n")
    assert kept < QUESTIONS * N, "killed too late to be a test"
    out = run(*arguments)
    assert f"{QUESTIONS - kept // N} questions" in out
    return folder


def test_a_killed_collection_goes_on(store: Path) -> None:
    reader = assert_complete(store)
    asked = {q.question: q.answer for q in questions("scorer-train", QUESTIONS)}
    for shard in reader.stream():
        for trace in shard.traces:
            assert trace.answer == asked.pop(trace.question, trace.answer)
            assert trace.correct == (trace.extracted == trace.answer)
    assert not asked


def test_stored_states_are_those_of_the_model(store: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    checked = 0
    for shard in list(Reader(store, with_text=True).stream())[:4]:
        for trace in shard.traces:
            prompt = tokenizer(prompt_text(trace.question))["input_ids"]
            output = list(trace.tokens)  # its text may be tokenized otherwise
            positions = step_positions(model_path(), output)
            assert trace.steps.positions.tolist() == positions
            rows = shard.hidden[trace.first_row : trace.first_row + trace.num_steps]
            expected = hidden_states(model_path(), prompt, output, positions)
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-3)
            checked += len(positions)
    assert checked > 100


def test_from_traces_equals_what_was_captured_while_generating(
    server: Server, store: Path, tmp_path: Path
) -> None:
    collected = Reader(store, with_text=True)
    file = tmp_path / "traces.jsonl"
    with file.open("w") as lines:
        for shard in collected.shards:
            for r in collected.traces(shard):
                trace = {"question": r.question, "answer": r.answer, "text": r.text}
                trace["tokens"] = r.tokens
                lines.write(json.dumps(trace) + "\n")
    again = tmp_path / "again"
    run(
        *("collect", file, "--from-traces", "--url", server.url, "-o", again),
        *("--dtype", "float32"),
    )
    first = {shard.traces[0].question_id: shard for shard in collected.stream()}
    for shard in Reader(again).stream():
        expected = first[shard.traces[0].question_id]
        for one, other in zip(shard.traces, expected.traces, strict=True):
            assert one.steps.positions.tolist() == other.steps.positions.tolist()
            assert (one.correct, one.num_steps) == (other.correct, other.num_steps)
        torch.testing.assert_close(shard.hidden, expected.hidden, rtol=0, atol=1e-3)


def test_a_scorer_is_trained_on_it(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "wrote" in train(store, out)
    scorer = load_scorer(out / "scorer.safetensors")
    assert scorer.hidden_size == 128 and scorer.info.model == "reasoner"
    figures = json.loads((out / "metrics.json").read_text())
    assert figures
    assert {p.name for p in out.rglob("*.png")} >= {"loss.png", "roc.png", "ranking.png"}
    shown = run("inspect", out / "scorer.safetensors", "--on", store)
    assert "running mean" in shown


@pytest.mark.full
def test_its_own_server_dies_in_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    process = start(
        *("collect", "reasoner:scorer-train", "-o", folder, "-n", N, "--limit", QUESTIONS),
        *("--concurrency", 1, "--top-logprobs", 0, "--", "--max-total-tokens", 8192),
    )

    def kill_the_server() -> None:
        children = psutil.Process(process.pid).children(recursive=True)
        server = next(c for c in children if "launch_server" in " ".join(c.cmdline()))
        os.kill(server.pid, signal.SIGKILL)

    message = stopped_when(process, folder, kill_the_server)
    assert process.returncode == 1
    shown = " ".join(message.split())
    assert "complete and stay" in shown and "run the same command again" in shown
    reader = Reader(folder)
    assert 2 <= len(reader.shards) < QUESTIONS
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    assert not left
