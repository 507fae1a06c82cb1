"""Every program in examples/ runs, and says what it promises to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from step_sglang.reasoner import Question
from step_sglang.scoring.scorer import load_scorer
from tests.server.launch import Server, environment

pytestmark = pytest.mark.server
EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name: str, *arguments: object, timeout: int = 240) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_all_of_them_are_tested() -> None:
    known = {"demo.py", "fork.py", "openai_client.py", "solve.py", "train_scorer.py"}
    assert {file.name for file in EXAMPLES.glob("*.py")} == known


def test_solve(server: Server, question: Question) -> None:
    shown = run("solve.py", question.question, "-n", 8, "--url", server.url)
    # Which answer is a matter of chance, and of the model.
    assert re.search(r"^answer: [\d.-]+ \(\d+% of the weight\)", shown, re.M)
    assert re.search(r"\d finished", shown)


def test_openai_client(server: Server, question: Question) -> None:
    shown = run("openai_client.py", question.question, "-n", 4, "--url", server.url)
    assert len(re.findall(r"^trace \d: \w+, \d+ steps, score 0\.\d+$", shown, re.M)) == 4
    assert re.search(r"^answer: '.*boxed\{.*', \d+ tokens$", shown, re.M)


def test_fork(server: Server, question: Question) -> None:
    shown = run("fork.py", question.question, "-n", 4, "--url", f"{server.url}/v1/")
    assert re.search(r"^answer: [\d.-]+ of fork \d, \d+%", shown, re.M)


def test_demo(server: Server) -> None:
    shown = run("demo.py", "--questions", 1, "-n", 8, "--url", server.url)
    assert "vote:" in shown and "traces pruned a question" in shown
    assert "KV pool of" in shown and ("never full" in shown) is ("; 0 pruned" in shown)
    assert re.search(r"^STEP took \d+% of the time", shown, re.M)


@pytest.mark.full
def test_train_scorer(tmp_path: Path) -> None:
    """It starts a server of its own, the only kind here that captures hidden states."""
    shown = run("train_scorer.py", tmp_path, "--questions", 12, "-n", 6, timeout=500)
    assert "12 questions, 72 traces" in shown
    assert re.search(r"^running mean: AUC [01]\.\d+ within a question$", shown, re.M)
    scorer = load_scorer(tmp_path / "scorer" / "scorer.safetensors")
    assert scorer.info.model == "reasoner"
