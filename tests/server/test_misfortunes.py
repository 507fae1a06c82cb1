"""What goes wrong outside of STEP: the model's numbers, the scorer file, a client, a process."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import build_model
from tests.server.death import kill_while_pruning
from tests.server.expected import step_positions, step_scores
from tests.server.launch import Server, serve

pytestmark = [pytest.mark.server, pytest.mark.full]

PROMPT = list(range(40, 80))
CONTEXT = 32768


@dataclass(frozen=True)
class Unlucky:
    """A server, its model, and the boundary tokens whose embeddings are not finite."""

    server: Server
    model: Path
    spoilt: frozenset[int]
    scorer: Path  # the file that it was started with
    backup: Path


@pytest.fixture(scope="module")
def unlucky(tmp_path_factory: pytest.TempPathFactory, scorer: Path) -> Iterator[Unlucky]:
    folder = tmp_path_factory.mktemp("unlucky")
    model = build_model(folder / "model", context=CONTEXT)
    spoilt = spoil(model)
    used = Path(shutil.copy(scorer, folder / "used.safetensors"))
    with serve(
        model,
        *("--enable-step", "--step-scorer", str(used), "--enable-metrics"),
        *("--max-total-tokens", "24000", "--max-running-requests", "128"),
        log=folder / "unlucky.log",
        SGLANG_SANITIZE_NAN_LOGITS="1",  # SGLang's own; without it sampling would fail
    ) as server:
        yield Unlucky(server, model, spoilt, used, scorer)


def spoil(folder: Path) -> frozenset[int]:
    """Give every second boundary token of a model an embedding of infinity or NaN."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    boundaries = [i for i in range(len(tokenizer)) if "\n\n" in tokenizer.decode([i])]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for number, token in enumerate(boundaries[::2]):
            model.model.embed_tokens.weight[token] = (torch.inf, torch.nan)[number % 2]
    model.save_pretrained(folder)
    return frozenset(boundaries[::2])


def sample(unlucky: Unlucky, n: int, tokens: int) -> list[dict]:
    answers: list[dict] = unlucky.server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": n,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "custom_params": {"step": {"step_scores": True}},
        },
    )
    return answers


def assert_scored(unlucky: Unlucky, answers: list[dict]) -> tuple[int, int]:
    """Steps before a trace's first spoilt token are scored right, and none after it.

    Returns:
        How many were scored, and how many not.
    """
    scored = unscored = 0
    for answer in answers:
        output, step = answer["output_ids"], answer["meta_info"]["step"]
        ended = step_positions(unlucky.model, output)
        first = min((i for i, t in enumerate(output) if t in unlucky.spoilt), default=len(output))
        good = [position for position in ended if position < first]
        assert step["positions"] == good and step["num_steps"] == len(good)
        unscored += len(ended) - len(good)
        scored += len(good)
        if good:
            expected = step_scores(unlucky.model, unlucky.backup, PROMPT, output[:first], good)
            torch.testing.assert_close(
                torch.tensor(step["step_scores"]), torch.tensor(expected), rtol=0, atol=1e-5
            )
            assert abs(step["score"] - sum(expected) / len(expected)) < 1e-5
        else:
            assert step["score"] is None
    return scored, unscored


def metric(server: Server, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    found = re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_steps_that_are_not_finite_are_counted_and_not_scored(unlucky: Unlucky) -> None:
    def counted() -> tuple[int, float]:
        state = unlucky.server.info()["internal_states"][0]["step"]
        assert state["failures"] == {}
        return state["steps_unscored"], metric(unlucky.server, "step_steps_unscored_total")

    before = counted()
    answers = sample(unlucky, 64, 60)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [60] * 64
    scored, unscored = assert_scored(unlucky, answers)
    print(f"{scored} steps scored, {unscored} not finite")
    assert scored >= 10 and unscored >= 10
    after = counted()
    assert after == (before[0] + unscored, before[1] + unscored)


def test_a_scorer_file_replaced_or_deleted_while_running(unlucky: Unlucky) -> None:
    """The server goes on with what it loaded."""
    unlucky.scorer.write_bytes(b"no scorer")
    assert assert_scored(unlucky, sample(unlucky, 24, 60))[0] > 0
    unlucky.scorer.unlink()
    assert assert_scored(unlucky, sample(unlucky, 24, 60))[0] > 0
    assert unlucky.server.info()["internal_states"][0]["step"]["failures"] == {}


CLIENT = """
import sys, requests
params = {"max_new_tokens": 20000, "ignore_eos": True, "custom_params": {"step": True}}
body = {"text": "So", "stream": True, "sampling_params": params}
with requests.post(sys.argv[1] + "/generate", json=body, stream=True) as answer:
    for number, line in enumerate(answer.iter_lines()):
        if number == 20:
            print("streaming", flush=True)
"""


def test_a_client_that_stops_reading_harms_nobody(unlucky: Unlucky) -> None:
    server = unlucky.server

    def live() -> int:
        return int(server.info()["internal_states"][0]["step"]["live_traces"])

    aborted = metric(server, "sglang:num_aborted_requests_total")
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.url], stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None and client.stdout.readline() == "streaming\n"
        client.send_signal(signal.SIGSTOP)
        for _ in range(3):
            assert assert_scored(unlucky, sample(unlucky, 24, 60))[0] > 0
        assert live() == 1 and client.poll() is None
    finally:
        client.kill()
        client.wait()
    # 20,000 tokens would take minutes more; and it did not come to its end, but was aborted.
    deadline = time.monotonic() + 90
    while live() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert live() == 0
    assert metric(server, "sglang:num_aborted_requests_total") == aborted + 1
    assert assert_scored(unlucky, sample(unlucky, 24, 60))[0] > 0


@pytest.mark.timeout(1200)
def test_sigkill_of_the_detokenizer(unlucky: Unlucky) -> None:
    kill_while_pruning(unlucky.server, "sglang::detokenizer")
