"""The command `step-sglang ask` against a real server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from step_sglang.reasoner import Question
from tests.server.launch import Server

pytestmark = pytest.mark.server

SAMPLING = ("--temperature", "1", "--top-p", "1", "--top-k", "-1", "--max-new-tokens", "900")


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "step_sglang", "ask", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_ask_prints_the_answer(server: Server, question: Question) -> None:
    done = ask(question.question, "-n", "4", "--url", server.url, *SAMPLING)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("answer: ") and "finished" in lines[-2]


def test_ask_json_and_no_answer(server: Server, question: Question) -> None:
    flags = ("-n", "2", "--url", server.url, "--json", *SAMPLING[:-1], "5")
    done = ask(question.question, *flags)
    result = json.loads(done.stdout)
    assert done.returncode == 3 and result["status"] == "no_answer" and result["answer"] is None
    assert len(result["traces"]) == 2 and result["traces"][0]["tokens"] == 5


def test_ask_with_bad_input(server: Server) -> None:
    done = ask("1;A+1", "--vote", "loudest", "--url", server.url)
    assert done.returncode == 1 and "weighted, majority, best" in done.stderr
    done = ask("1;A+1", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "does not answer" in done.stderr
    assert "Traceback" not in done.stderr
