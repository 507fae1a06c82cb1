"""Kills a process of a real server in the middle of pruning, and says whether it ended well."""

from __future__ import annotations

import threading
import time

import psutil
import requests

from tests.server.launch import Server


def kill_while_pruning(server: Server, title: str | None) -> None:
    """SIGKILL the child with this title, or the HTTP process, once a trace of ours was pruned."""
    main = psutil.Process(server.process.pid)
    children = main.children(recursive=True)
    assert len(children) >= 2
    victims = [main] if title is None else [c for c in children if title in " ".join(c.cmdline())]
    assert len(victims) == 1, [child.cmdline() for child in children]
    outcome: list[str] = []

    def ask() -> None:
        params = {"n": 64, "max_new_tokens": 3000, "ignore_eos": True}
        body = {"text": "So", "sampling_params": params}
        try:
            answer = requests.post(f"{server.url}/generate", json=body, timeout=560)
            outcome.append(f"status {answer.status_code}")
        except requests.RequestException:
            outcome.append("connection closed")

    before = server.log_text().count("STEP pruned")
    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 240
    while server.log_text().count("STEP pruned") == before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.log_text().count("STEP pruned") > before
    assert not outcome
    victims[0].kill()
    asking.join(timeout=200)
    assert outcome in (["connection closed"], ["status 500"], ["status 503"])
    gone, alive = psutil.wait_procs([main, *children], timeout=100)
    assert len(gone) == len(children) + 1 and not alive
