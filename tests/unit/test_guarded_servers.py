"""A test process that is killed takes the servers that it started along."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests.server.launch import GUARD

PROGRAM = """
import subprocess, sys, time
server = subprocess.Popen([*sys.argv[1:], "sleep", "1000"], start_new_session=True)
print(server.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(not GUARD, reason="needs setpriv of util-linux")
def test_a_server_ends_with_its_test_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *GUARD], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    server = psutil.Process(int(process.stdout.readline()))
    deadline = time.monotonic() + 30
    while server.name() != "sleep":  # the guard has become it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
