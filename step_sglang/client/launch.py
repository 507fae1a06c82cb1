"""Starts a server as a child process, and always stops it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from step_sglang.client.http import Client
from step_sglang.config import escape
from step_sglang.errors import ServerError

START_TIMEOUT = 1800.0  # seconds; large weights load slowly
STOP_TIMEOUT = 15.0
# A killed `collect` must not leave a server behind: PR_SET_PDEATHSIG survives the exec. Linux only.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
os.execv(sys.argv[1], sys.argv[1:])
"""


def server_command(model: str, port: int, flags: Sequence[str]) -> list[str]:
    """The launch command; of contradicting flags the last wins."""
    return [
        sys.executable, "-m", "sglang.launch_server", "--model-path", model,
        "--host", "127.0.0.1", "--port", str(port), *flags,
    ]  # fmt: skip


def capture_flags(delimiters: Sequence[str], scope_all: bool) -> list[str]:
    """Flags of a server that collects training data."""
    return [
        "--enable-step", "--step-capture",
        "--step-delimiter", *(escape(text) for text in delimiters),
        *(("--step-scope", "all") if scope_all else ()),
    ]  # fmt: skip


def plain_cpu(more: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Environment and flags for a machine without a GPU, unless the user chose a device."""
    if os.environ.get("SGLANG_PLATFORM", "step_cpu") != "step_cpu" or "--device" in more:
        return {}, []
    import torch

    if torch.cuda.is_available():
        return {}, []
    return {"SGLANG_PLATFORM": "step_cpu", "OMP_NUM_THREADS": "1"}, [
        "--device", "cpu", "--dtype", "float32", "--skip-server-warmup",
        "--max-running-requests", "256", "--max-total-tokens", "65536",
        # An idle scheduler spins, and would take a core from whoever works.
        "--sleep-on-idle",
    ]  # fmt: skip


@contextmanager
def running_server(model: str, more: Sequence[str], log: Path) -> Iterator[str]:
    """Start a server, wait until it answers, yield its URL, stop it with all its processes.

    Args:
        model: path or name.
        more: flags; they come last, so they win.
        log: file that its output is added to.

    Raises:
        ServerError: it does not come up; the end of its log is in the message.
    """
    environment, flags = plain_cpu(more)
    port = free_port()
    command = server_command(model, port, [*flags, *more])
    command = [sys.executable, "-c", DIE_WITH_PARENT, *command]
    with log.open("ab") as sink:  # what an earlier server said stays
        sink.write(f"--- a server starts, {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        sink.flush()
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        if not wait_until_healthy(url, lambda: process.poll() is None, START_TIMEOUT):
            raise ServerError(f"the server did not start; the end of {log}:\n{tail(log)}")
        yield url
    finally:
        stop(process)


def wait_until_healthy(url: str, alive: Callable[[], bool], seconds: float) -> bool:
    """Poll GET /health; False when ``alive()`` turns false or the time is over."""
    deadline = time.monotonic() + seconds
    with Client(url, timeout=5) as client:
        while time.monotonic() < deadline and alive():
            if client.healthy():
                return True
            time.sleep(0.5)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server's whole process group: SIGTERM first, then SIGKILL."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_TIMEOUT)


def tail(log: Path, lines: int = 20) -> str:
    """The end of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """A port that is free now, below those that the kernel hands out by itself.

    A server binds it only when its model is loaded; until then its own sockets, those between
    tensor-parallel ranks above all, could take any of the others.
    """
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(10_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
