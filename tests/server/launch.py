"""Starts real SGLang servers on the CPU platform, and always stops them."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from step_sglang.client.launch import free_port
from tests.server.warm import READ_LATE, Program, WarmParent, WarmProcess

START_TIMEOUT = 240  # seconds; a loaded two-core machine needs a minute
# There SGLang captures graphs, and the first start on a machine compiles kernels.
START_TIMEOUT_CUDA = 900
COLD = "STEP_TEST_COLD"  # set: every server is started as users start it

Process = subprocess.Popen[bytes] | WarmProcess


@dataclass
class Server:
    """A running server."""

    url: str
    process: Process
    log: Path

    def generate(self, **body: Any) -> Any:
        """POST /generate; raises on an error status."""
        answer = requests.post(f"{self.url}/generate", json=body, timeout=300)
        assert answer.status_code == 200, (answer.status_code, answer.text, self.tail())
        return answer.json()

    def post(self, path: str, body: Any) -> requests.Response:
        """POST anything, whatever the status."""
        return requests.post(f"{self.url}{path}", json=body, timeout=300)

    def info(self) -> dict[str, Any]:
        """GET /server_info."""
        return dict(requests.get(f"{self.url}/server_info", timeout=60).json())

    def tail(self, lines: int = 60) -> str:
        """End of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def log_text(self) -> str:
        """Whole log."""
        return self.log.read_text(errors="replace")


def environment(**extra: str) -> dict[str, str]:
    """Environment of a CPU server; one thread each, as two cores serve several processes."""
    return {
        **os.environ,
        "SGLANG_PLATFORM": "step_cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2",
        **extra,
    }


def one_core_each() -> str:
    """For SGLANG_CPU_OMP_THREADS_BIND: a core for each of two ranks, of those that may be used."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"


# A test process that is killed cannot stop its server, so Linux does; SGLang's own follow it.
GUARD = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()

# For `serve` on a GPU: the platform that SGLang finds itself. Later flags win.
ON_CUDA = ("--device", "cuda", "--dtype", "bfloat16")
CUDA_PLATFORM = {"SGLANG_PLATFORM": ""}

LAUNCH_SERVER = ("-m", "sglang.launch_server")
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")


def arguments(port: int, *flags: str) -> list[str]:
    """Flags of a CPU server; with STEP its log has a line for every pruning, which tests read."""
    if "--enable-step" in flags and "--step-log" not in flags:
        flags = (*flags, "--step-log", "each")
    return [
        "--host", "127.0.0.1", "--port", str(port),
        "--device", "cpu", "--dtype", "float32", "--skip-server-warmup",
        # Without it a tiny model's pool takes most of the machine's memory; flags may override it.
        "--max-total-tokens", "8192",
        # An idle scheduler spins, and would take a core from the server that works.
        "--sleep-on-idle", *flags,
    ]  # fmt: skip


def start_command(*arguments: object) -> subprocess.Popen[str]:
    """Start `step-sglang` with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "step_sglang", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


@contextlib.contextmanager
def serve(
    model: Path,
    *flags: str,
    log: Path,
    entry: Sequence[str] = LAUNCH_SERVER,
    port: int | None = None,
    **extra_env: str,
) -> Iterator[Server]:
    """Start a server, wait until it answers, and stop its whole process tree at the end.

    It is forked from a process that has imported SGLang (:mod:`tests.server.warm`), unless its
    environment is its own and read at once.
    """
    port = port or free_port()
    argv = arguments(port, "--model-path", str(model), *flags)
    process = _start(entry, argv, log, extra_env)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server, START_TIMEOUT_CUDA if "cuda" in flags else START_TIMEOUT)
        yield server
    finally:
        stop(process)


def run_to_end(entry: Sequence[str], *argv: object, log: Path, **extra_env: str) -> tuple[int, str]:
    """Exit status and output of a module, as ("-m", "name"), or a script, as ("path",)."""
    process = _start(entry, [str(word) for word in argv], log, extra_env)
    try:
        return process.wait(timeout=400), log.read_text(errors="replace")
    finally:
        stop(process)


def _start(
    entry: Sequence[str], argv: Sequence[str], log: Path, extra_env: dict[str, str]
) -> Process:
    if can_be_warm(**extra_env):
        target, *more = entry[1:] if entry[0] == "-m" else entry
        return start_warm(target, *more, *argv, output=log, **extra_env)
    with log.open("wb") as sink:
        return subprocess.Popen(
            [*GUARD, sys.executable, "-W", "ignore", *entry, *argv],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(**extra_env),
            start_new_session=True,
        )


def can_be_warm(**extra_env: str) -> bool:
    """Whether a server in this environment may be a child of the warm parent, whose it is.

    What came into this process's environment since counts as nothing: SGLang adds to it when it is
    imported, as it does in the parent. A variable for a server is an argument of `serve`.
    """
    wanted = environment(**extra_env)
    return COLD not in os.environ and all(
        wanted.get(name) == _STANDARD.get(name) for name in {*_STANDARD, *extra_env} - READ_LATE
    )


def start_warm(target: str, *argv: str, output: Path, **extra_env: str) -> WarmProcess:
    """Start a module or a script from this test process's warm parent."""
    program = Program(target, argv, str(output.resolve()), os.getcwd(), extra_env)
    return _parent().start(program)


@functools.cache
def _parent() -> WarmParent:
    return WarmParent(_STANDARD, GUARD)


# pytest's own variables change with every test.
_STANDARD = {name: value for name, value in environment().items() if not name.startswith("PYTEST_")}


def stop(process: Process) -> None:
    """End a server and every process it started, at once: its own way to end takes ten seconds."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.kill()
    process.wait()
    for child in children:
        # Python's tracker frees what the others leave in shared memory, and ends by itself.
        with contextlib.suppress(psutil.NoSuchProcess):
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()
    psutil.wait_procs(children, timeout=10)
    # Whoever is left has lost its parent: a server is a process group of its own.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _wait_until_ready(server: Server, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"server ended with {server.process.returncode}\n{server.tail()}")
        try:
            if requests.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"server not ready after {timeout} s\n{server.tail()}")
