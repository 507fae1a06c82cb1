"""Requests to /generate that are followed, and aborted, while they run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests

from tests.server.answers.conftest import groups_and_traces, wait_until_empty
from tests.server.idle import free_tokens
from tests.server.launch import Server


def ask(server: Server, body: dict[str, Any]) -> tuple[int, Any, float]:
    """Status, JSON (of a stream the last chunk), and when it was there."""
    answer = requests.post(f"{server.url}/generate", json=body, timeout=120)
    if not body.get("stream"):
        return answer.status_code, answer.json(), time.monotonic()
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return answer.status_code, json.loads(lines[-1]), time.monotonic()


def begin(
    server: Server, threads: ThreadPoolExecutor, body: dict[str, Any], live: int
) -> Future[tuple[int, Any, float]]:
    """Send it, and wait until the server has that many live traces."""
    future = threads.submit(ask, server, body)
    until(lambda: future.done() or groups_and_traces(server)[1] >= live)
    assert not future.done(), future.result()
    return future


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def abort(server: Server, **body: Any) -> float:
    asked = time.monotonic()
    assert server.post("/abort_request", body).status_code == 200
    return asked


def assert_nothing_is_left(server: Server) -> None:
    wait_until_empty(server)
    pool = server.info()["max_total_num_tokens"]
    assert free_tokens(server) == pool
