"""Every snippet of README.md is run as it stands there, in its order, as a new user would.

Two things are put in: the port, because 30000 may be taken, and what installs, which has happened.
What takes longest runs as it stands in `make test-all`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from step_sglang.client.launch import free_port, wait_until_healthy

pytestmark = [pytest.mark.server, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PORT = "30000"
# The language of a block says what it is: `sh` names what a reader puts in.
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
QUESTION = "11;A*6;B*5;C+6;D+3;E-3;F*2;G-4;H+3"


@dataclass(frozen=True)
class Reader:
    """Somebody at a terminal in an empty folder, with a server in another one."""

    folder: Path
    port: int
    greeting: Path

    def run(self, kind: str, text: str) -> str:
        """Run one block; returns what it printed."""
        text = text.replace(PORT, str(self.port))
        command = [sys.executable, "-W", "ignore", "-c", text]
        if kind == "bash":
            # `ask` alone relies on the default port.
            text = re.sub(
                r"^(step-sglang ask .*)$", rf"\1 --url http://127.0.0.1:{self.port}", text
            )
            command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command, cwd=self.folder, env=environment(), capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (text, done.stdout, done.stderr)
        return done.stdout


def environment() -> dict[str, str]:
    """As on a machine without a GPU, with the command on the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SGLANG_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def block(words: str, kind: str = "bash") -> str:
    """The one block that contains these words."""
    (found,) = [text for language, text in BLOCKS if language == kind and words in text]
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    port = free_port()
    command = f"{block('step-sglang serve reasoner').strip()} --port {port}"
    greeting = folder / "serve.out"
    with greeting.open("wb") as out, (folder / "serve.err").open("wb") as err:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=folder, env=environment(), stdout=out, stderr=err
        )
        try:
            url = f"http://127.0.0.1:{port}"
            assert wait_until_healthy(url, lambda: process.poll() is None, 300), (
                folder / "serve.err"
            ).read_text()[-3000:]
            yield Reader(folder, port, greeting)
        finally:
            tree = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(True))]
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            _, alive = psutil.wait_procs(
                [psutil.Process(p) for p in tree if psutil.pid_exists(p)], 30
            )
            for left in alive:
                left.kill()
            assert not alive, "serve left a process behind"


def test_the_page_is_short_and_its_links_are_there() -> None:
    assert len(README.split()) <= 1000
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_nothing_is_left_untried() -> None:
    known = ("pip install .", "serve reasoner", "curl", "ask", "collect", "bench")
    for kind, text in BLOCKS:
        assert kind == "python" or any(word in text for word in known), text
    assert len(BLOCKS) == 10


def test_serve_prints_a_request_that_it_answers(reader: Reader) -> None:
    deadline = time.monotonic() + 30
    while "curl" not in (greeting := reader.greeting.read_text()):
        assert time.monotonic() < deadline, greeting
        time.sleep(0.5)
    # The server's own log goes on after it.
    (request,) = re.findall(r"curl .*?\}\}\}'\n", greeting, re.DOTALL)
    answer = json.loads(reader.run("bash", request))
    vote = answer["choices"][0]["meta_info"]["step"]["vote"]
    assert vote["status"] == "voted" and vote["traces"] == 64 and vote["pruned"] > 0


def test_curl(reader: Reader) -> None:
    answer = json.loads(reader.run("bash", block("curl")))
    steps = [choice["meta_info"]["step"] for choice in answer["choices"]]
    assert len(steps) == 64 and sum(step["pruned"] for step in steps) > 8
    assert all(step["num_steps"] > 0 for step in steps if not step["pruned"])


def test_the_openai_client(reader: Reader) -> None:
    lines = reader.run("python", block("for choice in", "python")).splitlines()
    assert len(lines) == 64
    assert {line.split()[0] for line in lines} == {"stop", "abort"}


def test_ask(reader: Reader) -> None:
    shown = reader.run("bash", block("step-sglang ask"))
    assert re.fullmatch(r"answer: \d+", shown.splitlines()[-1])
    assert "KV pool of 4096" in shown and "mean score" in shown


def test_solve(reader: Reader) -> None:
    first, *traces = reader.run("python", block("import solve", "python")).splitlines()
    assert re.match(r"\d+ (0|1)\.\d+ Timing\(", first) and "source='server'" in first
    assert len(traces) == 64


def test_one_choice(reader: Reader) -> None:
    shown = reader.run("python", block('"traces": 64', "python"))
    assert "\\boxed{" in shown and "'status': 'voted'" in shown


def test_a_fork_program(reader: Reader) -> None:
    assert re.fullmatch(r"\d+\n", reader.run("python", block("s.fork", "python")))


@pytest.mark.parametrize("limit", [1, pytest.param(4, marks=pytest.mark.full)])
def test_compare_and_report(reader: Reader, limit: int) -> None:
    """As it stands with 4 questions, and in a fourth of the time with one."""
    text = block("step-sglang bench")
    assert "--limit 4 " in text
    shutil.rmtree(reader.folder / "results", ignore_errors=True)
    shown = reader.run("bash", text.replace("--limit 4 ", f"--limit {limit} "))
    assert "Accuracy, tokens and latency" in shown and "STEP" in shown
    report = (reader.folder / "results" / "report.md").read_text()
    assert "![accuracy against latency](latency.png)" in report
    assert f"**Warning:** measured on {limit} question" in report
    for name in ("latency.png", "latency.pdf", "breakdown.png", "report.tex"):
        assert (reader.folder / "results" / name).stat().st_size > 500


@pytest.mark.full
def test_train_a_scorer(reader: Reader) -> None:
    shown = reader.run("bash", block("step-sglang train"))
    assert "24 questions, 96 traces" in shown and "AUC within the question" in shown
    assert "scorer/scorer.safetensors" in shown
    for name in ("scorer.safetensors", "metrics.json", "ranking.png", "ranking.pdf"):
        assert (reader.folder / "scorer" / name).stat().st_size > 500
