"""The bench command against a stand-in server: what is refused, what a folder accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.results import load_results
from tests.stand_in import Handler, serving

LONG = "too long for the model"


@dataclass
class StandIn:
    """A server that answers 2 and refuses questions that say they are too long."""

    url: str = ""
    pool: int = 1000
    refuse: bool = True
    asked: list[str] = field(default_factory=list)  # /generate


@pytest.fixture
def server() -> Iterator[StandIn]:
    state = StandIn()

    class Answers(Handler):
        def do_GET(self) -> None:
            self.answer(
                {
                    "model_path": "m",
                    "max_total_num_tokens": state.pool,
                    "max_req_input_len": 95,
                    "internal_states": [{}],
                }
            )

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(data) if data else {}
            if self.path == "/v1/tokenize":
                self.answer({"tokens": list(map(ord, body["messages"][0]["content"]))})
                return
            if self.path != "/generate":
                self.answer({})
                return
            prompt = "".join(map(chr, body["input_ids"]))
            state.asked.append(prompt)
            if state.refuse and LONG in prompt:
                self.answer({"error": {"message": LONG}}, 400)
                return
            self.send_response(200)
            self.end_headers()
            for index in range(body["sampling_params"]["n"]):
                info = {"completion_tokens": 3, "finish_reason": {"type": "stop"}}
                chunk = {"index": index, "text": "\\boxed{2}", "meta_info": info}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

    with serving(Answers) as state.url:
        yield state


def bench(server: StandIn, folder: Path, *more: str) -> tuple[BaseException | None, str]:
    """What it raised, and what it printed."""
    dataset = folder.parent / "questions.jsonl"
    arguments = ("--url", server.url, "--dataset", str(dataset), "--n", "4", "--watch", "0")
    ran = CliRunner().invoke(
        app, ["bench", *arguments, "--methods", "sc", *more, "-o", str(folder)]
    )
    return (ran.exception if ran.exit_code else None), ran.output


def write(folder: Path, *questions: str, answer: str = "2") -> None:
    rows = [json.dumps({"question": question, "answer": answer}) for question in questions]
    (folder / "questions.jsonl").write_text("\n".join(rows))


def test_a_refused_question_does_not_stop_the_others(server: StandIn, tmp_path: Path) -> None:
    write(tmp_path, "1+1?", f"{LONG}, 1+1?", "0+2?")
    error, output = bench(server, tmp_path / "out")
    assert isinstance(error, BenchError)
    assert "refused 1 runs" in str(error) and f"sc n=4, '{LONG}" in str(error)
    assert re.search(r"^ *SC +4 +100\.0", output, re.MULTILINE)
    results = load_results([tmp_path / "out"]).results
    assert [(r.correct, r.n, r.pool) for r in results] == [(True, 4, 1000)] * 2
    # It is asked again, and nothing else is.
    server.refuse = False
    server.asked.clear()
    error, _ = bench(server, tmp_path / "out")
    assert error is None and len(server.asked) == 1 and LONG in server.asked[0]
    assert len(load_results([tmp_path / "out"]).results) == 3


def test_a_server_that_refuses_everything(server: StandIn, tmp_path: Path) -> None:
    write(tmp_path, f"{LONG}, 1+1?")
    error, _ = bench(server, tmp_path / "out")
    assert isinstance(error, BenchError) and LONG in str(error)


def test_a_folder_goes_on_with_the_same_questions_and_pool(server: StandIn, tmp_path: Path) -> None:
    write(tmp_path, "1+1?", "0+2?", "2+0?")
    assert bench(server, tmp_path / "out", "--limit", "1")[0] is None
    assert bench(server, tmp_path / "out", "--limit", "2")[0] is None
    assert len(load_results([tmp_path / "out"]).results) == 2
    server.pool = 900
    error, _ = bench(server, tmp_path / "out")
    assert isinstance(error, BenchError)
    assert "has 900 tokens" in str(error) and "measured with 1000" in str(error)
    server.pool = 1000
    write(tmp_path, "1+1?", "0+2?", "2+0?", answer="3")
    error, _ = bench(server, tmp_path / "out")
    assert isinstance(error, BenchError) and "other settings (questions" in str(error)
    write(tmp_path, "1+1?", "0+2?", "2+0?")
    error, _ = bench(server, tmp_path / "out", "--split", "test")
    assert isinstance(error, BenchError) and "split 'train', now 'test'" in str(error)
    assert bench(server, tmp_path / "out")[0] is None
    assert len(load_results([tmp_path / "out"]).results) == 3
