"""Every snippet of docs/ that a CPU can run is run as it stands there; the others have a reason.

What a page leaves to its reader is put in: the model, the questions. Numbers that make hours are
made small.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from step_sglang.reasoner import questions
from tests.server.test_readme import environment

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# By page, a word of the snippet, and why it is not run here.
ELSEWHERE = {
    ("groups.md", "launch_router"): "needs a router; server/test_router.py starts the same",
    ("kernel.md", "step_score_(hidden"): "a signature; the op's tests call it",
    ("kernel.md", "ends_step ="): "the op's meaning; step_sglang/scoring/reference.py runs it",
    ("scorers.md", "--calibrate"): "needs a checkpoint; unit/test_calibration.py runs it",
    ("scorers.md", "step-sglang push"): "needs an account on the Hub; unit/test_hub.py runs it",
    ("training.md", "--step-sample"): "a server that serves on; test_sample.py runs the commands",
    ("training.md", "Qwen/Qwen3-8B"): "GPU hours; the same commands run on the reasoner here",
    ("paper.md", "step-sglang bench"): "GPU hours; test_bench.py runs them with small models",
    (
        "results.md",
        "bench/shares.py",
    ): "its file of traces is not ours; unit/test_shares.py runs it",
    ("results.md", "--question-seed 31"): "an hour of a core; its twin runs shortened here",
    ("results.md", "bench/refill_model.py"): "hours of a core",
    ("results.md", "bench/scheduler_cost.py"): "minutes, and its figures want a quiet machine",
    (
        "results.md",
        "step-sglang simulate",
    ): "its file of traces is not ours; unit/test_simulate.py plays others",
}
BY_CLIENTS = "wants packages of its own; server/test_clients.py runs it"
ELSEWHERE |= {
    ("clients.md", words): BY_CLIENTS
    for words in (
        "cat > questions.jsonl", "task: reasoner", "lm_eval --model", "inspect_ai",
        "import litellm", "import ChatOpenAI",
    )
}  # fmt: skip
ELSEWHERE["clients.md", "step-sglang serve"] = "the README's server, with a flag more"
HERE = {("training.md", "step-sglang inspect"), ("results.md", "--question-seed 28")}


def blocks() -> list[tuple[str, str]]:
    """The page's name and the text of every snippet."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    return [(page.name, text) for page in pages for _, text in BLOCK.findall(page.read_text())]


def block(page: str, words: str) -> str:
    (found,) = [text for name, text in blocks() if name == page and words in text]
    return found


def run(text: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment(),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (text, done.stdout, done.stderr[-3000:])
    return done.stdout


def test_no_snippet_is_forgotten() -> None:
    known = [*ELSEWHERE, *HERE]
    for page, text in blocks():
        assert [1 for name, words in known if name == page and words in text], (page, text)
    for name, words in known:
        assert any(page == name and words in text for page, text in blocks()), (name, words)


@pytest.mark.server
@pytest.mark.full
@pytest.mark.timeout(1500)
def test_train_a_scorer(tmp_path: Path) -> None:
    """The page's three commands, with the embedded reasoner and 4 traces of 24 questions."""
    lines = [
        json.dumps({"question": q.question, "answer": str(q.answer)})
        for q in questions("scorer-train", 24)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    text = block("training.md", "step-sglang inspect")
    text = text.replace("--model M", "--model reasoner").replace("-n 64", "-n 4")
    shown = run(text, tmp_path)
    assert "AUC within the question" in shown and "hidden size" in shown
    assert (tmp_path / "scorer" / "scorer.safetensors").is_file()


@pytest.mark.server
@pytest.mark.full
@pytest.mark.timeout(1500)
def test_methods_on_one_engine(tmp_path: Path) -> None:
    """The page's commands, with three methods, 8 traces of 4 questions."""
    text = block("results.md", "--question-seed 28")
    methods = text[text.index("--methods ") :].split()[1]
    assert {"sc", "step", "random"} < {*methods.split(",")}
    for long, short in (
        ("taskset -c 0 ", ""), ("--limit 100 --n 64", "--limit 4 --n 8"),
        (methods, "sc,random,step"),
    ):  # fmt: skip
        assert long in text
        text = text.replace(long, short)
    shown = run(text, tmp_path)
    assert "Accuracy, tokens and latency" in shown
    assert (tmp_path / "A" / "latency.png").is_file(), sorted(tmp_path.rglob("*.png"))
