"""Groups that do not fit into their server's pool, and what must hold of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import requests

from tests.server.idle import free_tokens
from tests.server.launch import Server

PROMPT = list(range(40, 80))
TRACES, TOKENS = 32, 160
POOL = 1600  # a third of what a group asks for
# So that `together` sees who has come.
LOG_REQUESTS = ("--log-requests", "--log-requests-level", "0")

T = TypeVar("T")


def group(server: Server, n: int = TRACES, tokens: int = TOKENS, **params: Any) -> list[dict]:
    """A group that does not fit; ``body`` holds further members of the request's body."""
    body = params.pop("body", {})
    step = {"step_scores": True, **params.pop("step", {})}
    return server.generate(
        input_ids=PROMPT,
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "custom_params": {"step": step},
            **params,
        },
        **body,
    )


def split(answers: list[dict], n: int = TRACES) -> tuple[list[dict], list[dict]]:
    """The pruned and the finished traces of a group, which must be all."""
    assert len({answer["meta_info"]["id"] for answer in answers}) == n
    pruned = [a for a in answers if a["meta_info"]["step"]["pruned"]]
    finished = [a for a in answers if a["meta_info"]["finish_reason"]["type"] != "abort"]
    assert pruned and finished and len(pruned) + len(finished) == n
    for answer in answers:
        assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"]
    return pruned, finished


def prunings(server: Server) -> int:
    return server.log_text().count("STEP pruned")


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def start(server: Server, threads: ThreadPoolExecutor, **more: Any) -> Future[list[dict]]:
    """Begin a group, and wait until a trace of it is pruned."""
    before = prunings(server)
    future = threads.submit(group, server, **more)
    wait_until(lambda: future.done() or prunings(server) > before)
    if future.done():
        future.result()  # what went wrong, if it did
    assert prunings(server) > before
    return future


@contextmanager
def paused(server: Server, mode: str) -> Iterator[None]:
    """A pause that ends, whatever happens in it."""
    try:
        assert server.post("/pause_generation", {"mode": mode}).status_code == 200
        yield
    finally:
        continued = server.post("/continue_generation", {}).status_code
    assert continued == 200


def together(
    server: Server, threads: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]
) -> list[Future[T]]:
    """Make calls of one request each, of which none begins before all have come.

    However slow the clients are: otherwise the first ends before the last comes, and memory never
    fills. The server must have LOG_REQUESTS.
    """
    before = _received(server)
    with paused(server, "in_place"):
        futures = [threads.submit(call) for call in calls]
        wait_until(lambda: _received(server) >= before + len(calls))
    return futures


def _received(server: Server) -> int:
    return server.log_text().count("Receive: obj=")


def flush(server: Server) -> requests.Response:
    return requests.post(f"{server.url}/flush_cache", timeout=60)


def nothing_is_left(server: Server, pool: int = POOL) -> None:
    """All of the pool (KV tokens) comes back, and no group lives."""
    assert free_tokens(server) == pool
    state = server.info()["internal_states"][0]["step"]
    assert state["groups"] == state["live_traces"] == 0
