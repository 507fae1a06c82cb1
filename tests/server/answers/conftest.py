"""One server with the embedded reasoner for all tests of answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from step_sglang.reasoner import Question, model_path, questions, scorer_path
from tests.server.launch import Server, serve

FLAGS = ("--enable-step", "--step-scorer", str(scorer_path()), "--max-running-requests", "256")


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "answers.log"
    with serve(
        model_path(), *FLAGS, "--enable-metrics", "--enable-streaming-session",
        "--step-log", "summary", log=log,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="session")
def question() -> Question:
    return questions("test", 8)[3]


def groups_and_traces(server: Server) -> tuple[int, int]:
    """Groups and live traces that the server knows of."""
    step = server.info()["internal_states"][0]["step"]
    return step["groups"], step["live_traces"]


def wait_until_empty(server: Server, seconds: float = 20.0) -> float:
    """Seconds until the server has no group left."""
    started = time.monotonic()
    while groups_and_traces(server) != (0, 0):
        assert time.monotonic() - started < seconds, groups_and_traces(server)
        time.sleep(0.1)
    return time.monotonic() - started
