"""`ask --file`: many questions, several servers, a run that stops and goes on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.client import servers
from step_sglang.client.abort import abort_group
from step_sglang.client.batch import Progress, ResultFile, ask_all
from step_sglang.client.errors import ClientError
from step_sglang.client.http import ROUTING_KEY, AsyncClient, served_model
from step_sglang.client.solve import solve
from step_sglang.data.questions import Job
from step_sglang.errors import ServerError
from tests.stand_in import Handler, serving

STEP = {"score": 0.5, "num_steps": 1, "step_scores": [0.5], "pruned": False}


@dataclass
class StandIn:
    """A server whose traces all answer with the question's number of words."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of /generate
    open: int = 0
    most_open: int = 0
    down: bool = False
    model_down: bool = False
    lost: int = 0  # answers that break off
    busy: list[int] = field(default_factory=list)  # statuses of the next requests
    aborts: list[tuple[str, int | None]] = field(default_factory=list)  # of the next traces
    bad: set[int] = field(default_factory=set)  # questions that it fails on, after a while
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def stand_in(delay: float = 0.0, workers: list[str] | None = None) -> Iterator[StandIn]:
    state = StandIn()

    class Answers(Handler):
        def do_GET(self) -> None:
            if self.path == "/workers" and workers is not None:
                self.answer({"workers": [{"url": url} for url in workers], "total": len(workers)})
            else:
                known = "/model_info" if workers is None else "/get_model_info"
                status = 500 if state.model_down else 200
                self.answer({"model_path": "m"}, status if self.path == known else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.keys.append(self.headers.get(ROUTING_KEY))
            if state.down:
                self.answer({"message": "down"}, 503)
            elif state.busy:
                self.answer({"error": {"message": "queue"}}, state.busy.pop())
            elif self.path == "/v1/tokenize" and workers is not None:
                self.answer({"message": "missing field `prompt`"}, 422)
            elif self.path == "/v1/tokenize":
                words = len(body["messages"][0]["content"].split())
                if words in state.bad:
                    time.sleep(delay / 2)
                    self.answer({"message": "boom"}, 500)
                else:
                    self.answer({"tokens": [words]})
            elif self.path.startswith("/step/"):
                known = workers is None
                self.answer({"aborted": 2, "ended": 1} if known else {}, 200 if known else 404)
            else:
                self.solved(body)

        def solved(self, body: dict[str, Any]) -> None:
            state.bodies.append(body)
            if state.lost > 0:
                state.lost -= 1
                error = {"message": "Stream error: body", "type": "stream_error"}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(
                    f"data: {json.dumps({'error': error})}\n\ndata: [DONE]\n\n".encode()
                )
                return
            words = body["input_ids"][0]
            with state.lock:
                state.asked.append(str(words))
                state.open += 1
                state.most_open = max(state.most_open, state.open)
            if words > 90:
                self.answer({"error": {"message": "too long"}}, 400)
            else:
                self.send_response(200)
                self.end_headers()
                self.chunk(0, "", {"completion_tokens": 1, "finish_reason": None, "step": STEP})
                time.sleep(delay)
                for index in range(body["sampling_params"]["n"]):
                    self.trace(index, words)
                self.wfile.write(b"data: [DONE]\n\n")
            with state.lock:
                state.open -= 1

        def trace(self, index: int, words: int) -> None:
            """Its end; one that never ran has no step data."""
            if state.aborts:
                message, status = state.aborts.pop()
                reason = {"type": "abort", "message": message, "status_code": status}
                self.chunk(index, "", {"finish_reason": reason})
            else:
                info = {"completion_tokens": 3, "finish_reason": {"type": "stop"}, "step": STEP}
                self.chunk(index, f"\\boxed{{{words}}}", info)

        def chunk(self, index: int, text: str, info: dict[str, Any]) -> None:
            data = json.dumps({"index": index, "text": text, "meta_info": info})
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

    with serving(Answers) as state.url:
        yield state


@pytest.fixture(autouse=True)
def no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    servers._failed.clear()
    monkeypatch.setattr("step_sglang.client.batch._PAUSE", 0.01)


def job(words: int, answer: str = "") -> Job:
    return Job(f"q{words}", " ".join("w" * words), answer)


def ask(
    path: Path, jobs: list[Job], *urls: str, concurrency: int = 4, retries: int = 1
) -> tuple[int, list[Progress]]:
    results, told = ResultFile(path, {"n": 2}), list[Progress]()
    try:
        missing = asyncio.run(
            ask_all(
                jobs, 2, results, concurrency=concurrency, retries=retries,
                on_result=told.append, url=urls, suffix="",
            )
        )  # fmt: skip
    finally:
        results.close()
    return missing, told


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_are_asked_together_and_all_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in(delay=0.2) as server:
        missing, told = ask(path, [job(w, str(w % 2 + 1)) for w in range(1, 7)], server.url)
    assert missing == 0 and len(told) == 6 and server.most_open == 4
    found = {line["id"]: line for line in lines(path)}
    assert len(found) == 6
    one = found["q1"]
    assert (one["answer"], one["status"], one["share"], one["text"]) == (
        "1", "voted", 1.0, "\\boxed{1}"
    )  # fmt: skip
    assert one["expected"] == "2" and one["correct"] is False
    assert found["q2"]["answer"] == "2" and found["q2"]["correct"] is False
    assert one["traces"][1] == {
        "fate": "finished", "answer": "1", "score": 0.5, "num_steps": 1, "tokens": 3,
    }  # fmt: skip
    assert one["answers"] == [{"answer": "1", "weight": 1.0, "traces": [0, 1]}]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        ask(path, [job(1), job(2)], server.url)
        path.write_text(path.read_text() + '{"id": "torn')
        ask(path, [job(w) for w in (1, 2, 3)], server.url)
    assert sorted(server.asked) == ["1", "2", "3"]
    assert [line["id"] for line in lines(path)][2:] == ["q3"]


def test_a_result_that_was_cut_off_is_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        ask(path, [job(1)], server.url)
        path.write_text(path.read_text()[:60])  # the first, within its line
        ask(path, [job(1)], server.url)
    assert server.asked == ["1", "1"] and [line["id"] for line in lines(path)] == ["q1"]


def test_a_refused_question_is_kept_and_the_rest_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        missing, told = ask(path, [job(99), job(2)], server.url, concurrency=1)
        ask(path, [job(99), job(2)], server.url)
    assert missing == 0 and "too long" in told[0].problem and told[1].result is not None
    assert lines(path)[0]["status"] == "refused" and "too long" in lines(path)[0]["message"]
    assert server.asked == ["99", "2"]


def test_several_servers_share_the_questions(tmp_path: Path) -> None:
    with stand_in(0.1) as one, stand_in(0.1) as other:
        ask(tmp_path / "r.jsonl", [job(w) for w in range(1, 9)], one.url, other.url)
    assert len(one.asked) == len(other.asked) == 4


def test_a_server_that_does_not_answer_is_passed_over(tmp_path: Path) -> None:
    with stand_in() as one, stand_in() as other:
        one.down = True
        missing, _ = ask(tmp_path / "r.jsonl", [job(w) for w in range(1, 6)], one.url, other.url)
        assert missing == 0 and len(other.asked) == 5
        assert len(one.keys) < 5  # it is the last choice, once it failed
        servers._failed.clear()
        assert solve("w w", 2, url=[one.url, other.url], suffix="").answer == "2"


def test_nobody_answers(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server:
        server.down = True
        with pytest.raises(ServerError, match="down"):
            ask(path, [job(w) for w in range(1, 50)], server.url)
        assert len(server.keys) < 49  # the others were not tried
    assert lines(path) == []


@pytest.mark.parametrize("status", [408, 425, 429])
def test_a_full_server_refuses_nothing(status: int, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server, stand_in() as other:
        server.busy = [status] * 2
        missing, told = ask(path, [job(2)], server.url)
        assert (
            missing == 1 and f"takes no more requests now: queue (HTTP {status})" in told[0].problem
        )
        assert lines(path) == []
        server.busy = [status]
        assert ask(path, [job(2)], server.url)[0] == 0 and lines(path)[0]["answer"] == "2"
        servers._failed.clear()
        server.busy = [status]
        assert solve("w", 2, url=[server.url, other.url], suffix="").answer == "1"
        assert other.asked == ["1"]


@pytest.mark.parametrize(
    ("message", "status"), [("The request queue is full.", 503), ("Aborted", None)]
)
def test_a_vote_without_traces_that_the_server_aborted_is_none(
    message: str, status: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    with stand_in() as server, stand_in() as other:
        server.aborts = [(message, status)] * 4
        missing, told = ask(path, [job(2)], server.url)
        assert missing == 1 and told[0].problem == f"the server aborted 2 of 2 traces: {message}"
        server.aborts = [(message, status)] * 2
        assert ask(path, [job(2), job(3)], server.url)[0] == 0
        assert all(len(line["answers"][0]["traces"]) == 2 for line in lines(path))
        servers._failed.clear()
        server.aborts = [(message, status)]
        assert ask(path, [job(4)], server.url, other.url)[0] == 0 and other.asked == ["4"]


def test_a_trace_that_a_server_cannot_end_is_a_result(tmp_path: Path) -> None:
    with stand_in() as server:
        server.aborts = [("Out of memory even after retracting all other requests", 500)]
        assert ask(tmp_path / "r.jsonl", [job(2)], server.url)[0] == 0
    assert [t["fate"] for t in lines(tmp_path / "r.jsonl")[0]["traces"]] == ["aborted", "finished"]


def test_every_server_is_tried_once(tmp_path: Path) -> None:
    with stand_in() as dead, stand_in() as other:
        dead.down = True
        urls = (dead.url, other.url)
        servers._failed[other.url] = time.monotonic()  # as after one hiccup
        assert solve("w", 2, url=urls, suffix="").answer == "1" and len(dead.keys) == 1
        # Both are avoided now. That which failed last is more likely to be gone.
        assert solve("w", 2, url=urls, suffix="").answer == "1" and len(dead.keys) == 1


def test_a_question_that_no_server_survives_does_not_end_the_run(tmp_path: Path) -> None:
    with stand_in() as server:
        server.bad = {3}
        for concurrency in (1, 4):
            path = tmp_path / f"{concurrency}.jsonl"
            for _ in range(2):
                missing, told = ask(
                    path,
                    [job(w) for w in (3, 4, 5)],
                    server.url,
                    concurrency=concurrency,
                    retries=0,
                )
                # Of those that are asked together any may be answered first.
                assert missing == 1 and sorted(line["id"] for line in lines(path)) == ["q4", "q5"]
            assert "boom (HTTP 500)" in told[0].problem


def test_questions_that_fail_do_not_end_one_that_runs(tmp_path: Path) -> None:
    with stand_in(delay=1.0) as server:
        server.bad = set(range(3, 12))
        missing, _ = ask(
            tmp_path / "r.jsonl",
            [job(w) for w in range(2, 12)],
            server.url,
            concurrency=10,
            retries=0,
        )
        assert missing == 9 and server.asked == ["2"]
        with pytest.raises(ServerError, match="boom"):
            ask(tmp_path / "r.jsonl", [job(w) for w in range(2, 12)], server.url, retries=0)


def test_fewer_than_no_retries(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="retries must be at least 0, not -1"):
        ask(tmp_path / "r.jsonl", [job(1)], "http://127.0.0.1:9", retries=-1)


def test_a_key_for_the_router_is_sent() -> None:
    async def sent(*groups: str | None) -> None:
        async with AsyncClient(server.url) as client:
            for group in groups:
                step = {} if group is None else {"group": group}
                params = {"n": 1, "custom_params": {"step": step}}
                stream = client.stream({"input_ids": [1], "sampling_params": params})
                assert [chunk async for chunk in stream]

    with stand_in() as server:
        asyncio.run(sent("q7", "q7", None, None, "größe", " q7 "))
    same, again, one, other, *hashed = server.keys
    assert same == again == "q7" and one and other and one != other
    assert len(set(hashed)) == 2
    assert all(key and key.isascii() and len(key) == 64 for key in hashed)


def test_behind_a_router_every_server_is_asked() -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(stand_in()) for _ in range(2)]
        router = stack.enter_context(stand_in(workers=[worker.url for worker in workers]))
        assert abort_group(router.url, "q7") == 4

        async def end() -> None:
            async with AsyncClient(router.url) as client:
                await client.end_traces(["a"])

        asyncio.run(end())
        assert [len(worker.keys) for worker in workers] == [2, 2]
        # One that is gone had none of the traces, where another had some.
        workers[0].down = True
        assert abort_group(router.url, "q7") == 2
        asyncio.run(end())
        workers[1].down = True
        with pytest.raises(ServerError, match="SGLang's router, which ends no groups") as caught:
            abort_group(router.url, "q7")
        assert all(worker.url in str(caught.value) for worker in workers)
        with pytest.raises(ServerError, match="which ends no single traces"):
            asyncio.run(end())
        empty = stack.enter_context(stand_in(workers=[]))
        with pytest.raises(ServerError, match="without STEP"):
            abort_group(empty.url, "q7")


def test_a_servers_ranks_are_one_server() -> None:
    """As a router with `--dp-aware` names them."""
    with stand_in() as worker:
        ranks = [f"{worker.url}@{rank}" for rank in range(2)]
        with stand_in(workers=ranks) as router:
            assert abort_group(router.url, "q7") == 2
            assert solve("w", 2, url=router.url, suffix="").answer == "1"


def test_questions_go_through_a_router(tmp_path: Path) -> None:
    """It has another path for the model, no chat templates, and drops custom_params."""
    with stand_in() as worker, stand_in() as other:
        with stand_in(workers=[other.url, worker.url]) as router:
            other.down = True
            missing, _ = ask(tmp_path / "r.jsonl", [job(w) for w in (3, 5)], router.url)
            assert missing == 0 and sorted(router.asked) == ["3", "5"] and not worker.asked
            for body in router.bodies:
                step = body["sampling_params"]["custom_params"]["step"]
                assert body["session_params"]["step"] == step and step["step_scores"]
                # A router drops nulls, which would leave SGLang's default of 128 tokens.
                assert body["session_params"]["step_sampling"]["max_new_tokens"] is None
            worker.down = True
            with pytest.raises(ServerError, match="router, which renders no chats: its servers"):
                solve("w w", 2, url=router.url, suffix="")
            assert solve([4], 2, url=router.url).answer == "4"
            worker.down = False
            router.model_down = True  # it asked a server that is gone
            assert solve("w w", 2, url=router.url).answer is not None
            assert served_model(router.url) == "m"
        solve("w w", 2, url=worker.url, suffix="")
        assert "session_params" not in worker.bodies[0]


def test_a_router_that_lost_its_server_refuses_nothing(tmp_path: Path) -> None:
    """It says so in the stream, where SGLang says what it refuses: the question is asked again."""
    with stand_in() as worker, stand_in(workers=[worker.url]) as router:
        router.lost = 1
        missing, told = ask(tmp_path / "r.jsonl", [job(4)], router.url)
        assert missing == 0 and told[0].result is not None and router.asked == ["4"]
        router.lost = 9
        missing, told = ask(tmp_path / "s.jsonl", [job(4)], router.url)
        assert missing == 1 and "the router lost its server: Stream error" in told[0].problem
        assert lines(tmp_path / "s.jsonl") == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"id": "q1", "settings": {"n": 3}}\n', "other settings (n 3, now 2)"),
        ('{"question": "x"}\n', "line 1, is no result"),
        ("text\n", "line 1, is no result"),
        ('{"my": "notes"}', "line 1, is no result"),
        ('{"question": "w"}\n{"question": "w w"}', "line 1, is no result"),
        ("\n\nmy notes", "line 3, is no result"),
        ('{"id": "q1", "settings": 5}\n', "line 1, is no result"),
        ("[" * 100_000 + "\n", "line 1, is no result"),
    ],
    ids=["settings", "questions", "text", "one line", "torn questions", "torn", "number", "deep"],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(ClientError) as caught:
        ResultFile(path, {"n": 2})
    assert says in str(caught.value) and "name another file" in str(caught.value)
    assert path.read_text() == content


@pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d\x1c", "\ud800"], ids=["ends", "half"])
def test_what_a_line_may_hold(text: str, tmp_path: Path) -> None:
    """Characters at which programs end a line, and half of one, which UTF-8 has not."""
    path = tmp_path / "r.jsonl"
    for _ in range(2):
        results = ResultFile(path, {"suffix": "\u2028"})
        if not results.done:
            results.add_refused(Job("q1", text, ""), "no")
        assert results.done["q1"]["question"] == text
        results.close()


def test_two_writers(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "r.jsonl", {})
    with pytest.raises(ClientError, match="another process"):
        ResultFile(tmp_path / "r.jsonl", {})
    results.close()
    ResultFile(tmp_path / "r.jsonl", {}).close()


def test_the_command(tmp_path: Path) -> None:
    asked, path = tmp_path / "q.jsonl", tmp_path / "r.jsonl"
    # As editors on Windows write it.
    asked.write_text('\ufeff{"question": "w w", "answer": 2}\r\n{"question": "w"}\r\nnone\r\n')
    with stand_in() as server:
        command = ["ask", "--file", str(asked), "-o", str(path), "--url", server.url, "-n", "2"]
        done = CliRunner().invoke(app, [*command, "--suffix", ""])
        assert done.exit_code == 0, done.output
        assert f"2 questions, 2 with an answer, 1 of 1 correct: {path}" in done.output
        assert "line 3 is not JSON" in done.output
        again = CliRunner().invoke(app, [*command, "--suffix", ""])
        assert "2 of 2 questions have a result" in again.output and len(server.asked) == 2
        asked.write_text('{"question": "w w", "answer": 3}\n{"question": "w", "answer": 1}\n')
        corrected = CliRunner().invoke(app, [*command, "--suffix", ""])
        assert "2 results are not graded by the answer that their question" in corrected.output
        assert "2 with an answer, 1 of 2 correct" in corrected.output and len(server.asked) == 2
        other = CliRunner().invoke(app, [*command, "--suffix", "", "--vote", "best"])
        assert isinstance(other.exception, ClientError)
        assert "(vote 'calibrated', now 'best')" in str(other.exception)
    assert [line["settings"]["model"] for line in lines(path)] == ["m", "m"]
    both = CliRunner().invoke(app, ["ask", "1+1?", "--file", "f.jsonl"])
    assert "either a question or --file" in str(both.exception)
