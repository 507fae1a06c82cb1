"""Answers that never compare: no request waits for them, nor does the server's end."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from step_sglang.reasoner import model_path
from tests.server.answers.conftest import FLAGS
from tests.server.launch import Server, serve

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

ATTACKERS, MANY, TRACES = 3, 8, 4  # one more than children compare; each costs its budget, 10 s
TOWER = r"\\boxed\{[1-9][0-9]\^\{9\^\{9\^9\}\}\}"  # math-verify would compute it


def start(log: Path) -> AbstractContextManager[Server]:
    return serve(model_path(), *FLAGS, "--grammar-backend", "xgrammar", log=log)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For all but the last test; the last but one ends it."""
    with start(tmp_path_factory.mktemp("log") / "hostile.log") as running:
        yield running


def voted(traces: int = TRACES, **params: Any) -> dict[str, Any]:
    step = {"traces": traces, "early": "off"}
    return {
        "text": "1;A+1",
        "sampling_params": {
            "temperature": 1.0, "max_new_tokens": 60, "custom_params": {"step": step}, **params,
        },
    }  # fmt: skip


def post(server: Server, path: str, body: dict[str, Any], seconds: float) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=seconds)


def attack(
    server: Server, pool: ThreadPoolExecutor, seconds: float, attackers: int = MANY
) -> list[Future[Any]]:
    """Send the towers, and return once children compare them."""
    body = voted(regex=TOWER)
    sent = [pool.submit(post, server, "/generate", body, seconds) for _ in range(attackers)]
    wait_until_comparing(server)
    return sent


def wait_until_comparing(server: Server) -> None:
    deadline = time.monotonic() + 120
    while not any(busy(child) for child in verifiers(server)):
        assert time.monotonic() < deadline, "nothing was compared"


def verifiers(server: Server) -> list[psutil.Process]:
    found = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in found if is_verifier(child)]


def is_verifier(child: psutil.Process) -> bool:
    try:
        return "step_sglang.voting.verifier" in child.cmdline()
    except psutil.Error:
        return False


def busy(child: psutil.Process) -> bool:
    try:
        return child.cpu_percent(0.3) > 20 and child.cpu_times().user > 1.3  # more than its start
    except psutil.Error:
        return False


def ordinary(server: Server, seconds: float) -> requests.Response:
    chat = {"model": "default", "messages": [{"role": "user", "content": "1;A+1"}]}
    return post(server, "/v1/chat/completions", {**chat, "max_tokens": 8}, seconds)


@pytest.mark.parametrize("attackers", [ATTACKERS, pytest.param(MANY, marks=pytest.mark.full)])
def test_others_are_answered_and_the_attackers_too(server: Server, attackers: int) -> None:
    with ThreadPoolExecutor(64) as pool:
        sent = attack(server, pool, 600, attackers)
        # More than an executor of the event loop has threads, all at once.
        chats = [pool.submit(ordinary, server, 60) for _ in range(24)]
        assert {chat.result().status_code for chat in chats} == {200}
        # Another vote, whose answers need math-verify.
        other = post(server, "/generate", voted(regex=r"\\boxed\{[12]/[24]\}"), 120)
        vote = other.json()["meta_info"]["step"]["vote"]
        assert vote["status"] == "voted" and vote["text_only"] == 0
        assert sum(answer["count"] for answer in vote["answers"]) == TRACES
        assert len(vote["answers"]) <= 3  # 1/2 = 2/4, 1/4, 2/2
        for attacker in sent:
            vote = attacker.result().json()["meta_info"]["step"]["vote"]
            # By text: every other spelling is an answer of its own.
            assert vote["text_only"] == len({a["answer"] for a in vote["answers"]}) > 0


@pytest.mark.full
def test_the_work_ends_when_the_clients_leave(server: Server) -> None:
    address = server.url.removeprefix("http://")
    clients = [http.client.HTTPConnection(address) for _ in range(MANY)]
    for client in clients:
        body = json.dumps(voted(regex=TOWER))
        client.request("POST", "/generate", body, {"Content-Type": "application/json"})
    wait_until_comparing(server)
    for client in clients:
        client.close()
    # All of the work would take the eight groups' budgets, 40 s and more of both children.
    deadline = time.monotonic() + 20
    while any(busy(child) for child in verifiers(server)):
        assert time.monotonic() < deadline, "still comparing for nobody"


def test_sigterm_ends_the_server_and_its_children(server: Server) -> None:
    with ThreadPoolExecutor(MANY) as pool:
        attack(server, pool, 120)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        # SGLang itself looks every five seconds whether it shall end, then ends its schedulers.
        server.process.wait(timeout=45)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


@pytest.mark.full
def test_a_killed_server_leaves_no_child(tmp_path: Path) -> None:
    with start(tmp_path / "killed.log") as server, ThreadPoolExecutor(MANY) as pool:
        attack(server, pool, 120)
        children = verifiers(server)
        server.process.kill()
        assert children
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
