"""What must hold of a server once nothing runs: all of its memory is free again."""

from __future__ import annotations

import re
import time
from typing import Any

import requests

from tests.server.launch import Server

LEAK = re.compile(r"memory leak detected|Mem Leak")


def step_state(server: Server) -> dict[str, Any]:
    """What STEP says of itself in the server's information."""
    return dict(server.info()["internal_states"][0]["step"])


def idle_free_tokens(server: Server) -> int:
    """Wait until no trace lives, then as :func:`free_tokens`."""
    deadline = time.monotonic() + 120
    while step_state(server)["live_traces"]:
        assert time.monotonic() < deadline, "traces live on"
        time.sleep(0.05)
    return free_tokens(server)


def free_tokens(server: Server, seconds: float = 180) -> int:
    """Wait until every KV token is free or only cached, then empty the cache.

    In this order: a flush makes the pool anew, so that nothing could be missing after it.

    Returns:
        How many tokens were free or cached.

    Raises:
        AssertionError: something runs on, or memory did not come back.
    """
    deadline = time.monotonic() + seconds
    asked = time.time()
    server.info()  # wakes an idle scheduler, which then says anew what it holds
    while (load := _load(server))["timestamp"] < asked or not _empty(load):
        assert time.monotonic() < deadline, load
        time.sleep(0.05)
    while requests.post(f"{server.url}/flush_cache", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "the cache cannot be flushed"
        time.sleep(0.1)
    leaks = [line for line in server.log_text().splitlines() if LEAK.search(line)]
    assert not leaks, leaks[:5]
    return int(load["max_total_num_tokens"] - load["num_used_tokens"])


def _load(server: Server) -> dict[str, Any]:
    (load,) = requests.get(f"{server.url}/v1/loads", timeout=60).json()["loads"]
    return dict(load)


def _empty(load: dict[str, Any]) -> bool:
    return load["num_running_reqs"] == load["num_waiting_reqs"] == load["num_used_tokens"] == 0
