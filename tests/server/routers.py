"""SGLang's router, as users install it, in front of servers of the tests.

`sglang-router` is the released one; `smg`, its continuation under another name, is newer. Both are
optional, as are the tests that need them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from step_sglang.client.launch import free_port
from tests.server.launch import GUARD, Server

# Which policy keeps requests of one key together; sglang-router 0.3.2 knows consistent_hashing, but
# its command line does not.
POLICIES = {"sglang_router": "manual", "smg": "consistent_hashing"}
PACKAGES = {"sglang_router": "sglang-router==0.3.2", "smg": "smg==1.13.0"}
START_TIMEOUT = 150  # seconds


@dataclass
class Router:
    """A running router."""

    kind: str
    url: str
    workers: Sequence[Server]
    log: Path

    def where(self, server: Server) -> int:
        """Which of its workers that is."""
        return list(self.workers).index(server)


def skip_without(kind: str) -> None:
    """Skip the test where that router is not installed."""
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"no router: pip install {PACKAGES[kind]}")


@contextlib.contextmanager
def route(kind: str, workers: Sequence[Server], log: Path, *flags: str) -> Iterator[Router]:
    """Start a router, wait until it knows all of its workers, and end it at the end."""
    port, urls = free_port(), [worker.url for worker in workers]
    command = [
        sys.executable, "-W", "ignore", "-m", f"{kind}.launch_router", "--host", "127.0.0.1",
        "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port",
        str(free_port()), "--worker-startup-check-interval", "1", "--policy", POLICIES[kind],
        "--log-level", "warn", "--worker-urls", *urls, *flags,
    ]  # fmt: skip
    with log.open("wb") as sink:
        process = subprocess.Popen([*GUARD, *command], stdout=sink, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while not _ready(url, len(urls)):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        yield Router(kind, url, workers, log)
    finally:
        process.kill()
        process.wait()


def _ready(url: str, workers: int) -> bool:
    try:
        answer = requests.get(f"{url}/readiness", timeout=5)
        return answer.status_code == 200 and answer.json()["healthy_workers"] == workers
    except (requests.RequestException, ValueError, KeyError):
        return False
