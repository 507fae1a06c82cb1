"""Runs the kits of one setup against one server, and tells which tests passed."""

from __future__ import annotations

import re
import time
import unittest
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import requests

from tests.server.kits.catalogue import Setup
from tests.server.kits.traces import as_traces
from tests.server.launch import Server, serve

Outcomes = dict[str, str]  # of each test, by name: the reason why it failed, "" when it passed


@contextmanager
def kit_server(
    setup: Setup, model: Path, log: Path, scorer: Path | None = None
) -> Iterator[Server]:
    """The server of a setup: with STEP, scored by ``scorer``, or stock without one."""
    step = () if scorer is None else ("--enable-step", "--step-scorer", str(scorer))
    with serve(model, "--enable-metrics", *setup.flags, *step, log=log, **setup.env) as server:
        yield server


def run_kits(
    setup: Setup,
    server: Server,
    model: Path,
    *,
    traces: bool = False,
    quick: bool = False,
    only: frozenset[str] | None = None,
    attempts: int = 1,
) -> Outcomes:
    """Run the kits of a setup against its server.

    Args:
        setup: the kits.
        server: see :func:`kit_server`.
        model: folder of its model.
        traces: turn every request of the kits into a trace of a group.
        quick: only the tests of the default run.
        only: only the tests of these names.
        attempts: how often a test that fails is tried; some expect much of random text.
    """
    outcomes: Outcomes = {}
    with as_traces() if traces else nullcontext():
        for kit in setup.kits:
            for test in kit.tests(quick=quick):
                name = f"{kit.mixin.__name__}.{test}"
                if only is None or name in only:
                    for _ in range(attempts):
                        outcomes[name] = _run(kit.case(server, model, test))
                        _settle(server, name)
                        if not outcomes[name]:
                            break
    return outcomes


def traces_ended(server: Server) -> int:
    """How many requests that ended were traces."""
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    found = re.search(
        r'^step_waiting_seconds_count{.*kind="step".*} ([0-9.]+)$', text, re.MULTILINE
    )
    return int(float(found[1])) if found else 0


def _run(case: unittest.TestCase) -> str:
    result = unittest.TestResult()
    case.run(result)
    problems = [*result.errors, *result.failures, *result.skipped]
    return problems[0][1].strip().splitlines()[-1][:200] if problems else ""


def _settle(server: Server, name: str) -> None:
    """Wait until nothing of the last test runs; a server that died would fail all that follow."""
    assert server.process.poll() is None, f"the server died in {name}\n{server.tail()}"
    requests.post(f"{server.url}/continue_generation", json={}, timeout=60)
    requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=60)
    deadline = time.monotonic() + 60
    while requests.post(f"{server.url}/flush_cache", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, f"something still runs after {name}"
        time.sleep(0.1)
