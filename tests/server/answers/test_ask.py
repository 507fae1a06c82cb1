"""The command `step-sglang ask` against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from step_sglang.reasoner import Question, model_path, questions
from step_sglang.scoring.boundary import boundary_ids
from tests.server.answers.live import until
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


def test_ask_shows_scores_the_pool_and_the_winning_reasoning(
    server: Server, question: Question
) -> None:
    done = ask(question.question, "-n", "4", "--url", f"{server.url}/v1", "--show", *SAMPLING)
    assert done.returncode == 0, done.stderr
    assert "mean score" in done.stdout and "KV pool of 8192" in done.stdout
    answer = done.stdout.splitlines()[-1].removeprefix("answer: ")
    assert f"\\boxed{{{answer}}}" in done.stdout and "the best trace, score 0." in done.stdout


def test_a_question_that_the_reasoner_was_not_made_for(server: Server) -> None:
    done = ask("What is 7 * 8?", "-n", "2", "--url", server.url, "--max-new-tokens", "20")
    assert "knows chains of arithmetic modulo 13" in done.stderr
    assert "no trace has a score" in done.stderr and done.returncode == 3


def test_pruning_without_a_single_score_is_told_once(server: Server, question: Question) -> None:
    """As with a wrong delimiter: here no trace may write a boundary token."""
    boundaries = boundary_ids(AutoTokenizer.from_pretrained(model_path()), ["\n\n"])
    params = {"n": 64, "max_new_tokens": 250, "ignore_eos": True, "temperature": 1.0}
    params["logit_bias"] = {str(token): -100 for token in boundaries}
    for number in (1, 2):
        group = {"step": {"group": f"unscored-{number}"}}
        answers = server.generate(
            text=question.question, sampling_params={**params, "custom_params": group}
        )
        steps = [answer["meta_info"]["step"] for answer in answers]
        assert all(step["num_steps"] == 0 for step in steps)
        assert any(step["pruned"] for step in steps)
    assert server.log_text().count("STEP prunes without scores") == 1
    # Its prunings are summed up, in a line that comes when the interval is over.
    until(lambda: "s: pruned " in server.log_text(), 15)
    assert "STEP pruned rid=" not in server.log_text()


def test_a_file_of_questions(server: Server, tmp_path: Path) -> None:
    asked, results = tmp_path / "q.jsonl", tmp_path / "r.jsonl"
    known = questions("test", 12)[8:]
    lines = [json.dumps({"question": q.question, "answer": q.answer}) for q in known]
    asked.write_text("\n".join(lines[:2]))
    command = ("--file", str(asked), "-o", str(results), "-n", "8", "--url", server.url, *SAMPLING)
    assert ask(*command, "--concurrency", "2").returncode == 0
    before = results.read_text()
    asked.write_text("\n".join(lines))
    done = ask(*command)
    assert done.returncode == 0 and "2 of 4 questions have a result" in done.stderr
    assert results.read_text().startswith(before)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["question"] for line in found} == {q.question for q in known}
    for line in found:
        assert line["status"] == "voted" and len(line["traces"]) == 8
        assert line["correct"] == (line["answer"] == line["expected"])
        assert any(trace["score"] is not None for trace in line["traces"])
        assert f"\\boxed{{{line['answer']}}}" in line["text"]


def test_server_info_shows_what_is_in_effect(server: Server) -> None:
    step = server.info()["internal_states"][0]["step"]
    assert (step["scope"], step["admit"], step["delimiters"]) == ("thinking", "fair", ["\n\n"])
