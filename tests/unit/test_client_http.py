"""Whoever talks to a server takes the same addresses and keys, and fails with the same words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.client import solve
from step_sglang.client.abort import abort_group
from step_sglang.client.http import API_KEY_VARIABLE, AsyncClient, served_model
from step_sglang.client.launch import wait_until_healthy
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Job
from step_sglang.errors import RequestRefused, ServerError, StepError
from step_sglang.evaluation.methods import methods_named
from step_sglang.evaluation.results import ResultWriter
from step_sglang.evaluation.run import Bench, Plan
from step_sglang.evaluation.serving import PoolSize, probe_server
from step_sglang.evaluation.watch import PoolWatch
from step_sglang.live.events import Update, encode
from step_sglang.reasoner import model_path
from step_sglang.training.collect import CollectSettings, collect
from step_sglang.training.prompts import load_prompter
from step_sglang.training.store import Writer
from tests.stand_in import Handler, serving
from tests.training_samples import Generator, meta

PATHS = {
    "/flush_cache", "/generate", "/health", "/metrics", "/model_info", "/server_info",
    "/step/abort_group", "/step/events", "/v1/tokenize", "/workers",
}  # fmt: skip
SAMPLING = Sampling(1.0, 1.0, -1, 50)


@dataclass
class StandIn:
    """A server with STEP; ``answer`` instead of all its answers: status and body."""

    url: str = ""
    answer: tuple[int, bytes] | None = None
    paths: list[str] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


@pytest.fixture
def server() -> Iterator[StandIn]:
    state, generator = StandIn(), Generator(128)
    info = {
        "max_total_num_tokens": 512,
        "max_req_input_len": 95,
        "internal_states": [{"step": {"policy": "fair", "capture": False}}],
    }
    answers: dict[str, Any] = {
        "/model_info": {"model_path": "m"},
        "/server_info": info,
        "/v1/tokenize": {"tokens": [1, 2, 3]},
        "/step/abort_group": {"aborted": 2},
    }

    class Answers(Handler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.reply(json.loads(data) if data else {})

        def reply(self, body: dict[str, Any]) -> None:
            state.paths.append(self.path)
            state.keys.add(self.headers.get("Authorization"))
            if state.answer is not None:
                self.raw(*state.answer)
            elif self.path not in PATHS:
                self.answer({"detail": "Not Found"}, 404)
            elif self.path == "/metrics":
                self.raw(200, b'sglang:token_usage{model_name="m"} 0.25\n')
            elif self.path == "/step/events":
                self.raw(200, b": hello\n\ndata: " + encode(Update(1.0, True)) + b"\n\n")
            elif self.path != "/generate":
                self.answer(answers.get(self.path, {}))
            elif not body.get("stream"):
                self.answer(generator.generate(body))
            else:
                info = {
                    "completion_tokens": 3,
                    "finish_reason": {"type": "stop"},
                    "step": {
                        "score": 0.5,
                        "num_steps": 1,
                        "step_scores": [0.5],
                        "pruned": False,
                    },
                }
                chunks = [
                    {"index": i, "text": "\\boxed{2}", "meta_info": info}
                    for i in range(body["sampling_params"]["n"])
                ]
                lines = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]
                self.raw(200, b"".join([*lines, b"data: [DONE]\n\n"]))

        def raw(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with serving(Answers) as state.url:
        yield state


def collecting(url: str, folder: Path) -> None:
    prompter = load_prompter(str(model_path()), ["\n\n"])
    job = Job("q", "1;A+1", "7.0")
    with Writer(folder / "store", meta(n=2, hidden_size=prompter.hidden_size)) as writer:
        done = collect(url, writer, [job], prompter, CollectSettings(SAMPLING, top_logprobs=2))
    assert done.questions == 1


def benching(url: str, folder: Path) -> None:
    """All but the look at the server, which has its own row."""

    @contextlib.contextmanager
    def serve(serving: Any) -> Iterator[Any]:
        from step_sglang.evaluation.serving import ServerHandle

        yield ServerHandle(url, 512, "fair", 100)

    plan = Plan(
        ((0, Job("q", "1+1?", "2")),), methods_named("step"), (2,), 1, (PoolSize(),), SAMPLING,
        watch_interval=0,
    )  # fmt: skip
    with ResultWriter(folder / "bench", {"model": "m"}) as writer:
        assert Bench(plan, writer, serve).run() == ()
        assert len(writer.done) == 1


def flushing(url: str, folder: Path) -> None:
    async def flush() -> None:
        async with AsyncClient(url) as client:
            await client.flush()

    asyncio.run(flush())


def asking(url: str, folder: Path) -> None:
    ran = CliRunner().invoke(app, ["ask", "1+1?", "-n", "2", "--url", url, "--json"])
    if ran.exception is not None and ran.exit_code:
        raise ran.exception
    assert json.loads(ran.stdout)["answer"] == "2"


def solving(url: str, folder: Path) -> None:
    assert solve("1+1?", 2, url=url).answer == "2"


def aborting(url: str, folder: Path) -> None:
    assert abort_group(url, "g") == 2


def looking(url: str, folder: Path) -> None:
    assert probe_server(url, "fair").pool == 512


def naming(url: str, folder: Path) -> None:
    assert served_model(url) == "m"


def watching(url: str, folder: Path) -> None:
    command = ["watch", "--url", url, "--seconds", "0", "--save", str(folder / "run.html")]
    ran = CliRunner().invoke(app, command)
    if ran.exception is not None and ran.exit_code:
        raise ran.exception
    assert "a recorded run" in (folder / "run.html").read_text()


CONSUMERS = [collecting, benching, flushing, asking, solving, aborting, looking, naming, watching]
every_consumer = pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda c: c.__name__)
Consumer = Callable[[str, Path], None]


@every_consumer
@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_each_takes_any_form_of_the_address(
    consumer: Consumer, ending: str, server: StandIn, tmp_path: Path
) -> None:
    consumer(server.url + ending, tmp_path)
    assert server.paths and set(server.paths) <= PATHS


@every_consumer
def test_each_sends_the_key_of_the_environment(
    consumer: Consumer, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    consumer(server.url, tmp_path)
    assert server.keys == {"Bearer secret"}


def test_a_given_key_wins(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "other")
    abort_group(server.url, "g", api_key="mine")
    solve("1+1?", 2, url=server.url, api_key="mine")
    assert server.keys == {"Bearer mine"}


@every_consumer
def test_each_says_that_nothing_listens(consumer: Consumer, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServerError, match=rf"the server at {url} does not answer"):
            consumer(f"{url}/v1/", tmp_path)


@every_consumer
@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b'{"error":"Unauthorized"}', rf"wants an API key.*{API_KEY_VARIABLE}.*HTTP 401"),
        (404, b"<html>nothing here</html>", r"no SGLang server.*HTTP 404|without STEP"),
        (500, b"Internal Server Error", r"failed: Internal Server Error \(HTTP 500\)"),
    ],
)
def test_each_says_what_the_server_answered(
    consumer: Consumer, status: int, body: bytes, message: str, server: StandIn, tmp_path: Path
) -> None:
    server.answer = status, body
    with pytest.raises(ServerError, match=message) as raised:
        consumer(f"{server.url}/v1/", tmp_path)
    assert not isinstance(raised.value, RequestRefused)  # it is not about this one question
    assert server.url in str(raised.value)


@pytest.mark.parametrize(
    "consumer", [c for c in CONSUMERS if c not in (flushing, benching)], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("body", [b"<html>hello</html>", b"[]", b'{"a": 1}', b"\xff\x00"])
def test_each_says_that_this_is_no_server_of_ours(
    consumer: Consumer, body: bytes, server: StandIn, tmp_path: Path
) -> None:
    server.answer = 200, body
    with pytest.raises(StepError, match=r"SGLang server|in the middle|traces instead of"):
        consumer(server.url, tmp_path)


def test_one_refused_request_is_not_the_servers_fault(server: StandIn) -> None:
    server.answer = 400, b'{"error": {"message": "too long"}}'
    with pytest.raises(RequestRefused, match=r"refused the request: too long \(HTTP 400\)"):
        solve("1+1?", 2, url=server.url)


def test_half_of_a_surrogate_pair_cannot_be_sent(server: StandIn) -> None:
    chat = [{"role": "user", "content": "one \ud83d half"}]
    for question in ("one \ud83d half", chat):
        with pytest.raises(
            RequestRefused, match=r"after '[^']*one ' the request has '\\ud83d', half"
        ):
            solve(question, 2, url=server.url)


def test_the_pool_is_watched_at_any_form_of_the_address(server: StandIn) -> None:
    with PoolWatch(f"{server.url}/v1/", interval=0.01) as watch:
        while not watch.usage:
            pass
    assert watch.usage[0].share == 0.25
    server.answer = 404, b"no metrics"
    with PoolWatch(server.url, interval=0.01) as watch:
        before = len(server.paths)
        while len(server.paths) < before + 2:
            pass
    assert watch.usage == ()


def test_a_server_is_healthy_when_it_says_so(server: StandIn) -> None:
    assert wait_until_healthy(f"{server.url}/v1/", lambda: True, 5)
    server.answer = 503, b""
    assert not wait_until_healthy(server.url, lambda: len(server.paths) < 3, 5)
