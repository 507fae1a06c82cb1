"""A server that votes by default: unmodified clients and a harness; and at last, its death."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import requests

from step_sglang.client import ServerGoneError, SolveProgress, TraceFate, VoteStatus, solve
from step_sglang.reasoner import Question, model_path, questions
from tests.server.answers.conftest import FLAGS, wait_until_empty
from tests.server.launch import Server, serve, stop

pytestmark = pytest.mark.server

TRACES = 4
HARNESS = "lm-eval[api]==0.4.13"
PAGE = Path(__file__).parents[3] / "docs" / "clients.md"


@pytest.fixture(scope="module")
def voting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (
        "--step-traces",
        str(TRACES),
        "--step-temperature",
        "1.0",
        "--enable-streaming-session",
    )
    with serve(model_path(), *FLAGS, *flags, log=tmp_path_factory.mktemp("log") / "v.log") as it:
        yield it


def test_an_unmodified_greedy_client_gets_a_voted_answer(
    voting: Server, question: Question
) -> None:
    client = openai.OpenAI(base_url=f"{voting.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question.question}],
        temperature=0,
        max_tokens=900,
    )
    assert len(answer.choices) == 1 and "boxed" in (answer.choices[0].message.content or "")
    whole = voting.generate(
        text=question.question, sampling_params={"max_new_tokens": 20, "temperature": 0.5}
    )
    assert whole["meta_info"]["step"]["vote"]["traces"] == TRACES


def test_what_says_otherwise_is_not_voted(voting: Server) -> None:
    def ask(n: int = 1, step: object = None, tokens: int = 8) -> list[dict]:
        custom = {} if step is None else {"custom_params": {"step": step}}
        params = {"max_new_tokens": tokens, "n": n, **custom}
        found = voting.generate(text="1;A+1", sampling_params=params)
        return found if isinstance(found, list) else [found]

    assert len(ask(n=3)) == 3
    for answers in (ask(n=3), ask(step={"group": "g"}), ask(step=True)):
        assert all("vote" not in answer["meta_info"]["step"] for answer in answers)
    assert "step" not in ask(step=False)[0]["meta_info"]
    assert "step" not in ask(tokens=0)[0]["meta_info"]
    assert ask(step={"vote": "best"})[0]["meta_info"]["step"]["vote"]["vote"] == "best"
    assert requests.get(f"{voting.url}/health_generate", timeout=60).status_code == 200
    assert voting.info()["internal_states"][0]["step"]["traces"] == TRACES
    wait_until_empty(voting)


@pytest.mark.parametrize("streaming", [False, True])
def test_sessions_of_unmodified_clients(voting: Server, streaming: bool) -> None:
    """A plain session goes on from the trace that won; a streaming one is not voted."""
    opened = {"capacity_of_str_len": 4096, "streaming": streaming}
    session = voting.post("/open_session", opened).json()
    history: list[int] = []
    before = None
    for new in ([20, 21, 22, 23], [24, 25], [26]):
        answer = voting.generate(
            input_ids=new,
            session_params={"id": session, "rid": None if streaming else before},
            sampling_params={"max_new_tokens": 8, "ignore_eos": True},
        )
        history += new
        info = answer["meta_info"]
        before = info["id"]
        assert info["prompt_tokens"] == len(history)
        assert info["step"]["vote"]["status"] == ("not_voted" if streaming else "no_answer")
        history += answer["output_ids"]
    declined = voting.generate(
        input_ids=[26],
        session_params={"id": session, "rid": None if streaming else before},
        sampling_params={"max_new_tokens": 8, "custom_params": {"step": False}},
    )
    assert declined["meta_info"]["prompt_tokens"] == len(history) + 1
    assert "step" not in declined["meta_info"]
    assert voting.post("/close_session", {"session_id": session}).status_code == 200
    wait_until_empty(voting)


def harness(folder: Path) -> Path:
    """The harness in an environment of its own, on top of this one; skips without a network."""
    ready = os.environ.get("STEP_TEST_HARNESS")
    if ready:
        return Path(ready)
    venv.create(folder, with_pip=True)
    inside = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (inside / "outer.pth").write_text(sysconfig.get_path("purelib"))
    install = [folder / "bin" / "pip", "install", "-q", "--no-input", HARNESS]
    done = subprocess.run(install, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot install {HARNESS}: {done.stderr[-300:]}")
    return folder / "bin" / "lm_eval"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_lm_eval_harness_unmodified(voting: Server, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    asked = questions("test", 6)
    data.write_text("".join(json.dumps(q.as_dict()) + "\n" for q in asked))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = PAGE.read_text().partition("```yaml\n")[2].partition("```")[0]
    (tasks / "reasoner.yaml").write_text(task.replace("questions.jsonl", str(data)))
    arguments = f"model=default,base_url={voting.url}/v1/chat/completions,num_concurrent=2"
    before = voting.log_text().count("POST /v1/chat/completions")
    done = subprocess.run(
        [
            harness(tmp_path / "venv"), "--model", "local-chat-completions",
            "--model_args", arguments, "--tasks", "reasoner", "--include_path", tasks,
            "--apply_chat_template", "--output_path", tmp_path / "out", "--log_samples",
        ],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "none"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    accuracy = report["results"]["reasoner"]["exact_match,boxed"]
    assert 0.0 < accuracy <= 1.0
    assert voting.log_text().count("POST /v1/chat/completions") - before == len(asked)


def test_a_server_that_dies_leaves_what_had_arrived(voting: Server, question: Question) -> None:
    def kill(progress: SolveProgress) -> None:
        if progress.tokens > 100 and voting.process.poll() is None:
            stop(voting.process)

    with pytest.raises(ServerGoneError, match="0 of 4 traces had ended") as caught:
        solve(
            question.question, 4, url=voting.url, on_progress=kill,
            sampling={"ignore_eos": True, "max_new_tokens": 1500},
        )  # fmt: skip
    result = caught.value.result
    assert result.status is VoteStatus.NO_FINISHED_TRACE and result.answer is None
    assert "4 did not end" in result.message
    assert result.best is not None and result.best.text and result.best.fate is TraceFate.RUNNING
