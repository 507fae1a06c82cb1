"""`step_sglang.client` against a real server: votes, early finish, times, errors."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from step_sglang.client import (
    ClientError,
    NoStepError,
    RequestRefused,
    ServerError,
    SolveProgress,
    TraceFate,
    VoteStatus,
    asolve,
    solve,
)
from step_sglang.errors import VoteError
from step_sglang.reasoner import Question, model_path, scorer_path
from step_sglang.scoring.scorer import load_scorer
from step_sglang.voting.tally import Ballot, tally, weight_of
from tests.server.answers.conftest import wait_until_empty
from tests.server.launch import Server, run_to_end, serve

pytestmark = pytest.mark.server

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 900}


def test_solve_returns_the_vote_and_every_trace(server: Server, question: Question) -> None:
    seen: list[SolveProgress] = []
    result = solve(
        question.question, 8, url=server.url, early="off", sampling=SAMPLING,
        on_progress=seen.append,
    )  # fmt: skip
    assert result.status is VoteStatus.VOTED and not result.early and result.message == ""
    assert len(result.traces) == 8
    for trace in result.traces:
        assert trace.fate is TraceFate.FINISHED and trace.finish_reason in ("stop", "length")
        assert trace.step_scores is not None and len(trace.step_scores) == trace.num_steps > 0
        assert trace.score == pytest.approx(sum(trace.step_scores) / trace.num_steps, abs=1e-5)
        assert trace.tokens > 0 and trace.text
        times = trace.times
        assert times.source == "server" and times.wait is not None and times.wait >= 0
        assert times.prefill is not None and times.prefill >= 0 and times.decode > 0
    calibration = load_scorer(scorer_path()).info.calibration
    cast = [
        Ballot(trace.answer, weight_of(trace.score, "calibrated", calibration))
        for trace in result.traces
        if trace.answer is not None
    ]
    expected = tally(cast)
    assert result.answer == expected[0].answer
    assert result.share == pytest.approx(expected[0].weight / sum(t.weight for t in expected))
    assert result.best is not None and result.best.answer == result.answer
    assert 0 < result.timing.first_token < result.timing.total
    assert seen[-1].running == 0 and seen[-1].finished == 8
    assert seen[0].tokens <= seen[-1].tokens
    json.dumps(result.as_dict())


def test_early_finish_cancels_the_rest_and_frees_their_memory(
    server: Server, question: Question
) -> None:
    # Any text is the answer "same", so the majority is certain after a little more than half.
    result = solve(
        question.question, 8, url=server.url, vote="majority", extract=lambda text: "same",
        sampling=SAMPLING,
    )  # fmt: skip
    cancelled = [t for t in result.traces if t.fate is TraceFate.CANCELLED]
    assert result.early and result.answer == "same" and result.share == 1.0
    finished = sum(t.fate is TraceFate.FINISHED for t in result.traces)
    assert finished >= 5 and len(cancelled) == 8 - finished > 0
    assert all(t.answer is None and t.step_scores is None for t in cancelled)
    assert wait_until_empty(server) < 10
    posterior = solve(
        question.question, 8, url=server.url, vote="majority", extract=lambda text: "same",
        early="posterior", threshold=0.2, sampling=SAMPLING,
    )  # fmt: skip
    assert sum(t.fate is TraceFate.FINISHED for t in posterior.traces) < 5
    wait_until_empty(server)


def test_the_extractor_is_the_callers_and_no_answer_is_said(
    server: Server, question: Question
) -> None:
    found = solve(
        question.question, 2, url=server.url, extract=lambda text: None, sampling=SAMPLING
    )
    assert found.status is VoteStatus.NO_ANSWER and found.answer is None and found.share == 0
    assert "none of the 2 finished traces has an extractable answer" in found.message
    assert found.best is not None and found.best.fate is TraceFate.FINISHED


def test_one_trace_is_a_group_of_its_own(server: Server, question: Question) -> None:
    result = solve(question.question, 1, url=server.url, sampling=SAMPLING)
    assert len(result.traces) == 1 and result.traces[0].score is not None
    assert result.status is VoteStatus.VOTED and result.share == 1.0


def test_asolve_runs_groups_side_by_side(server: Server, question: Question) -> None:
    async def both() -> list:
        ask = [asolve(question.question, 3, url=server.url, sampling=SAMPLING) for _ in range(2)]
        return await asyncio.gather(*ask)

    assert all(result.status is VoteStatus.VOTED for result in asyncio.run(both()))

    async def blocked() -> None:
        solve(question.question, 2, url=server.url)

    with pytest.raises(ClientError, match="await asolve"):
        asyncio.run(blocked())


def test_prompts_of_every_form(server: Server, question: Question) -> None:
    chat = [{"role": "user", "content": question.question}]
    short = {**SAMPLING, "max_new_tokens": 8}
    tokens = server.post("/v1/tokenize", {"messages": chat, "add_special_tokens": True}).json()
    for prompt in (question.question, chat, tokens["tokens"]):
        result = solve(prompt, 2, url=server.url + "/v1/", sampling=short)
        assert [trace.tokens for trace in result.traces] == [8, 8]
        assert result.status is VoteStatus.NO_ANSWER
    assert solve("12", 2, url=server.url, chat=False, sampling=short).traces[0].tokens == 8


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"vote": "plurality"}, VoteError, "weighted, majority, best"),
        ({"early": "soon"}, VoteError, "exact, posterior, off"),
        ({"early": "posterior", "threshold": 2}, VoteError, "below 0.5"),
        ({"extract": "regex"}, VoteError, "boxed, choice, number"),
        ({"n": 0}, ClientError, "from 1 to 4096"),
        ({"n": 5000}, ClientError, "from 1 to 4096"),
        ({"timeout": float("nan")}, ClientError, "above 0"),
        ({"prune_at": float("nan")}, ClientError, "finite"),
        ({"sampling": {"top_p": float("nan")}}, ClientError, "top_p must be a finite"),
        ({"sampling": {"max_new_tokens": 0}}, ClientError, "at least 1"),
        ({"sampling": {"temperature": 0}}, ClientError, "all traces are the same"),
        ({"url": "127.0.0.1:3"}, ServerError, "no server's address"),
        ({"n": "3"}, ClientError, "not '3'"),
        ({"question": ""}, ClientError, "empty"),
        ({"engine": object()}, ClientError, "either url"),
        ({"sampling": {"n": 3}}, ClientError, "must not hold n"),
        ({"sampling": {"temperature": -1}}, RequestRefused, "temperature"),
        ({"sampling": {"max_new_tokens": 10**9}}, RequestRefused, "HTTP 400|context length"),
        ({"url": "http://127.0.0.1:9"}, ServerError, "does not answer"),
    ],
)
def test_bad_input_is_one_clear_error(
    server: Server, question: Question, options: dict, error: type[Exception], words: str
) -> None:
    arguments = {"question": question.question, "n": 2, "url": server.url, **options}
    with pytest.raises(error, match=words) as caught:
        solve(arguments.pop("question"), arguments.pop("n"), **arguments)
    assert type(caught.value) is error
    assert solve("1;A+1", 1, url=server.url, sampling=SAMPLING).traces


@pytest.mark.full
def test_a_server_without_step_is_refused(tmp_path: Path) -> None:
    with serve(model_path(), log=tmp_path / "stock.log") as stock:
        for n in (1, 3):
            with pytest.raises(NoStepError, match="--enable-step"):
                solve("1;A+1", n, url=stock.url, sampling=SAMPLING)
            done = subprocess.run(
                [
                    *(sys.executable, "-W", "ignore", "-m", "step_sglang", "ask", "1;A+1"),
                    *("-n", str(n), "--url", stock.url),
                ],
                capture_output=True, text=True, timeout=200, check=False,
            )  # fmt: skip
            assert done.returncode == 1 and done.stdout == ""
            assert "error: the server runs without STEP" in done.stderr
            assert "--enable-step --step-scorer S" in done.stderr


ENGINE = """
import asyncio, json, sys
import sglang as sgl
from step_sglang.client import asolve, solve

if __name__ == "__main__":
    model, scorer, question = sys.argv[1:]
    engine = sgl.Engine(
        model_path=model, device="cpu", dtype="float32", max_total_tokens=8192,
        enable_step=True, step_scorer=scorer,
    )
    options = {"engine": engine, "sampling": json.loads(%r)}
    try:
        first = solve(question, 6, vote="majority", extract=lambda text: "same", **options)
        second = engine.loop.run_until_complete(asolve(question, 2, **options))
        live = engine.get_server_info()["internal_states"][0]["step"]["live_traces"]
    finally:
        engine.shutdown()
    print("RESULT", json.dumps([first.as_dict(), second.as_dict(), live]))
""" % json.dumps(SAMPLING)  # noqa: UP031


@pytest.mark.full
def test_engine_in_the_same_process(question: Question, tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    status, said = run_to_end(
        (str(script),), model_path(), scorer_path(), question.question, log=tmp_path / "log"
    )
    assert status == 0, said[-4000:]
    first, second, live = json.loads(said.split("RESULT", 1)[1].splitlines()[0])
    assert first["early"] and first["answer"] == "same"
    assert second["status"] == "voted" and len(second["traces"]) == 2
    assert live == 0
