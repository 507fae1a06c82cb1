"""Several tokenizer workers: whichever has a request, and whichever is asked about it."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from step_sglang.gathering.choice import is_chosen
from step_sglang.reasoner import model_path, questions, scorer_path
from step_sglang.reasoner.tokenizer import prompt_text
from tests.server.idle import free_tokens, step_state
from tests.server.launch import Server, serve

pytestmark = [pytest.mark.server, pytest.mark.full]

WORKERS, TRACES, POOL = 2, 8, 24_000
Answer = dict[str, Any]


@dataclass
class Worker:
    """One of them, by a connection that it keeps: the kernel gives out new ones as it likes."""

    pid: int
    connection: HTTPConnection
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        """Status and text of the answer."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        content = None if body is None else json.dumps(body)
        self.connection.request(method, path, content, headers)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        assert not answer.will_close, "the connection would not be the same any more"
        return answer.status, text

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status, and what is in the JSON."""
        status, text = self.ask("POST", path, body)
        return status, json.loads(text) if text.startswith(("{", "[", '"')) else text

    def generate(self, body: Answer) -> Any:
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        return answer

    def begin(self, body: Answer) -> Future[Any]:
        """Send it on this connection, which is busy until it is answered."""
        return self.threads.submit(self.generate, body)


def connect(server: Server) -> Worker:
    """A new connection, to whichever worker."""
    url = urlsplit(server.url)
    connection = HTTPConnection(str(url.hostname), url.port, timeout=120)
    worker = Worker(0, connection)
    assert worker.ask("GET", "/model_info")[0] == 200
    here = connection.sock.getsockname()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            if any(other.raddr == here for other in process.net_connections(kind="tcp")):
                worker.pid = process.pid
                return worker
    raise AssertionError("nobody is at the other end")


def each(server: Server, seconds: float = 60) -> list[Worker]:
    """A connection to every worker."""
    found: dict[int, Worker] = {}
    deadline = time.monotonic() + seconds
    while len(found) < WORKERS:
        assert time.monotonic() < deadline, f"{len(found)} workers answer"
        worker = connect(server)
        found.setdefault(worker.pid, worker)
    return list(found.values())


# So few that no other group of these tests is kept.
SHARE = 1e-5
CHOSEN = [name for name in map(str, range(300_000)) if is_chosen(name, SHARE)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def server(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--max-total-tokens", str(POOL)),
        *("--tokenizer-worker-num", str(WORKERS), "--enable-metrics"),
        *("--step-sample", str(kept), "--step-sample-share", str(SHARE)),
        log=tmp_path_factory.mktemp("log") / "workers.log",
        SGLANG_TIMEOUT_KEEP_ALIVE="600",
        # A worker says nothing while it imports, which takes long on a loaded machine.
        SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT="200",
    ) as running:
        yield running


@pytest.fixture
def workers(server: Server) -> list[Worker]:
    return each(server)


@pytest.fixture(autouse=True)
def nothing_is_left(server: Server) -> Iterator[None]:
    yield
    until(lambda: step_state(server)["groups"] == step_state(server)["live_traces"] == 0)
    assert free_tokens(server) == POOL
    assert step_state(server)["failures"] == {}


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def body(n: int = 1, tokens: int = 1000, **step: Any) -> Answer:
    params = {"n": n, "temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    return {
        "text": questions("test", 4)[0].question,
        "sampling_params": {**params, "custom_params": {"step": step or True}},
    }


def test_samples_of_a_request_are_a_group_of_their_own(workers: list[Worker]) -> None:
    parts = [worker.begin(body(TRACES, 30)) for worker in workers for _ in range(3)]
    groups = [{a["meta_info"]["step"]["group"] for a in part.result()} for part in parts]
    assert all(len(names) == 1 for names in groups)
    assert len(set.union(*groups)) == len(parts)


def test_a_named_group_meets_from_every_worker(server: Server, workers: list[Worker]) -> None:
    """Its minimum counts for all of it: more than a part alone would keep."""
    wanted = body(24, 300, group="both", min_survivors=7, prune_at=0.1)
    parts = [worker.begin(wanted) for worker in workers]
    until(lambda: step_state(server)["live_traces"] > 24)
    assert step_state(server)["groups"] == 1
    answers = [answer for part in parts for answer in part.result()]
    pruned = [answer["meta_info"]["step"]["pruned"] for answer in answers]
    assert len(answers) == 48 and any(pruned) and pruned.count(False) >= 7
    assert {answer["meta_info"]["step"]["group"] for answer in answers} == {"both"}


@pytest.mark.parametrize("stream", [False, True])
def test_every_worker_votes(workers: list[Worker], stream: bool) -> None:
    chat = {
        "model": "default", "temperature": 1.0, "max_tokens": 500, "skip_special_tokens": False,
        "messages": [{"role": "user", "content": questions("test", 4)[0].question}],
        "custom_params": {"step": {"traces": TRACES, "early": "off"}}, "stream": stream,
        "return_meta_info": not stream,
    }  # fmt: skip
    path = "/v1/chat/completions"
    for part in [worker.threads.submit(worker.post, path, chat) for worker in workers]:
        status, answer = part.result()
        assert status == 200, answer
        if stream:
            assert answer.rstrip().endswith("data: [DONE]")
            continue
        (choice,) = answer["choices"]
        vote = choice["meta_info"]["step"]["vote"]
        assert vote["status"] == "voted" and vote["traces"] == TRACES
        assert vote["finished"] + vote["pruned"] == TRACES
        assert sum(tally["count"] for tally in vote["answers"]) <= vote["finished"]


@pytest.mark.parametrize("asked", [0, 1])
def test_a_group_is_aborted_wherever_its_requests_are(
    server: Server, workers: list[Worker], asked: int
) -> None:
    samples = workers[0].begin(body(TRACES, group="doomed"))
    voted = workers[1].begin(body(traces=TRACES, group="doomed") | {"rid": "voted"})
    other = connect(server).begin(body(2, 200, group="other"))
    until(lambda: step_state(server)["live_traces"] >= 2 * TRACES)
    asker = each(server)
    asker.sort(key=lambda worker: worker.pid != workers[asked].pid)
    status, answer = asker[0].post("/step/abort_group", {"group": "doomed"})
    # The samples, the prompt that is computed before them if it was still there, and the vote.
    assert status == 200 and TRACES + 1 <= answer["aborted"] <= 2 * TRACES + 2
    for sample in samples.result():
        assert sample["meta_info"]["finish_reason"]["type"] == "abort"
    info = voted.result()["meta_info"]
    assert info["id"] == "voted" and info["finish_reason"]["message"] == "Aborted"
    vote = info["step"]["vote"]
    assert vote["cancelled"] + vote["aborted"] + vote["pruned"] == TRACES
    assert all(a["meta_info"]["finish_reason"]["type"] != "error" for a in other.result())
    assert asker[0].post("/step/abort_group", {"group": "doomed"})[1]["aborted"] == 0


@pytest.mark.parametrize("everything", [False, True])
def test_a_vote_is_aborted_by_its_id_on_another_worker(
    server: Server, workers: list[Worker], everything: bool
) -> None:
    voted = workers[0].begin(body(traces=TRACES) | {"rid": "mine"})
    until(lambda: step_state(server)["live_traces"] == TRACES)
    time.sleep(0.5)
    assert workers[1].post("/abort_request", {"rid": "nobody's"})[0] == 200
    time.sleep(0.5)
    assert not voted.done()
    how = {"abort_all": True} if everything else {"rid": "mine"}
    assert workers[1].post("/abort_request", how)[0] == 200
    info = voted.result()["meta_info"]
    assert info["id"] == "mine" and info["finish_reason"]["type"] == "abort"
    assert info["step"]["vote"]["cancelled"] + info["step"]["vote"]["aborted"] == TRACES


def test_traces_are_ended_on_another_worker(server: Server, workers: list[Worker]) -> None:
    rids = [f"trace {i}" for i in range(4)]
    bodies = [body(1, group="some") | {"rid": rid} for rid in rids]
    mine = [worker.pid for worker in workers]
    begun = []
    for place, one in enumerate(bodies):  # two on each worker
        worker = connect(server)
        while worker.pid != mine[place % 2]:
            worker = connect(server)
        begun.append(worker.begin(one))
    until(lambda: step_state(server)["live_traces"] == 4)
    asked = {"traces": [*rids[:3], "unknown"]}
    assert workers[0].post("/step/end_traces", asked)[1] == {"ended": 3}
    for future in begun[:3]:
        assert future.result()["meta_info"]["finish_reason"]["type"] == "abort"
    assert not begun[3].done()
    assert workers[1].post("/step/end_traces", {"traces": rids})[1] == {"ended": 1}
    begun[3].result()


def test_a_sessions_turn_is_answered_without_a_vote(workers: list[Worker]) -> None:
    _, session = workers[0].post("/open_session", {"capacity_of_str_len": 4096})
    turn = body(tokens=12, traces=TRACES) | {"session_params": {"id": session, "rid": None}}
    for worker in workers:
        answer = worker.generate(turn)
        vote = answer["meta_info"]["step"]["vote"]
        assert vote["status"] == "not_voted" and "tokenizer workers" in vote["message"]
    assert workers[1].post("/close_session", {"session_id": session})[0] == 200


def test_each_worker_keeps_groups_in_a_file_of_its_own(workers: list[Worker], kept: Path) -> None:
    for worker, name in zip(workers, CHOSEN, strict=False):
        wanted = body(TRACES, 300, group=name)
        wanted["text"] = prompt_text(wanted["text"])
        del wanted["sampling_params"]["ignore_eos"]
        answers = worker.generate(wanted)
        assert all(answer["meta_info"]["step"]["sampled"] for answer in answers)
    until(lambda: len(list(kept.glob("*.jsonl"))) == WORKERS)
    pids = {file.stem.rsplit("-", 1)[1] for file in kept.glob("*.jsonl")}
    assert pids == {str(worker.pid) for worker in workers}
    rows = [json.loads(line) for file in kept.glob("*.jsonl") for line in file.open()]
    assert {row["group"]: len(row["traces"]) for row in rows} == dict.fromkeys(
        CHOSEN[:WORKERS], TRACES
    )


def test_metrics_are_the_same_from_every_worker(server: Server, workers: list[Worker]) -> None:
    wanted = body(40, 200, prune_at=0.1)
    answers = [answer for worker in workers for answer in worker.generate(wanted)]
    until(lambda: step_state(server)["live_traces"] == 0)
    pages = [worker.ask("GET", "/metrics/")[1] for worker in workers]
    said: list[Counter[str]] = []
    for page in pages:
        said.append(Counter())
        for name, value in re.findall(r"^(step_\w+)\{[^}]*\} (\S+)$", page, re.MULTILINE):
            said[-1][name] += float(value)
    assert said[0] == said[1]
    infos = [answer["meta_info"]["step"] for answer in answers]
    assert said[0]["step_steps_scored_total"] >= sum(info["num_steps"] for info in infos)
    pruned = sum(info["pruned"] for info in infos)
    assert said[0]["step_traces_pruned_total"] >= pruned > 20


def test_bad_input_is_refused_on_every_worker(workers: list[Worker]) -> None:
    for worker in workers:
        status, text = worker.ask("POST", "/generate", body(grup="x"))
        assert status == 400 and "grup" in text
        assert worker.post("/step/abort_group", {"groups": "x"})[0] == 400
        status, text = worker.ask("GET", "/step")
        assert status == 501 and "--tokenizer-worker-num 1" in text


def test_a_worker_that_died_is_not_waited_for(server: Server, workers: list[Worker]) -> None:
    """Its requests are gone with it; SGLang starts another one in its place."""
    workers[1].connection.close()
    psutil.Process(workers[1].pid).kill()
    asker = connect(server)
    for name in ("dead", "fresh"):
        samples = workers[0].begin(body(TRACES, group=name))
        until(lambda: step_state(server)["live_traces"] == TRACES)
        assert asker.post("/step/abort_group", {"group": name})[1]["aborted"] >= TRACES
        samples.result()
        if name == "dead":
            asker = next(w for w in each(server, 240) if w.pid != workers[0].pid)
    assert asker.pid != workers[1].pid


def test_the_log_has_no_error(server: Server) -> None:
    lines = server.log_text().splitlines()
    # SGLang logs a refused request as an error, too.
    errors = [line for line in lines if "ERROR" in line and "custom_params.step" not in line]
    assert not errors, errors[:5]
