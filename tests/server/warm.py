"""Runs programs in children of a process that has imported SGLang: a launch is nearly all imports.

``python -m tests.server.warm`` is that parent: it imports what a server's processes import, once,
and then only forks. A child becomes ``python -W ignore -m MODULE`` or ``python -W ignore SCRIPT``;
the processes that SGLang starts in it are forks too. The same code runs on the same arguments: only
the start method differs, so a part of the tests starts cold (CONTRIBUTING.md says which).

Forking is safe because the parent has imported and done nothing else; it checks that it has no
thread, no child and no module that must find a prepared environment.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import multiprocessing.util
import os
import runpy
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module, invalidate_caches
from pathlib import Path

IMPORTED = (
    "sglang.srt.server_args",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)
# Variables that nothing reads before a program begins, so that a child may have its own.
READ_LATE = {
    "PYTHONPATH", "SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_PLUGINS", "STEP_TEST_FAULTS",
    "STEP_TEST_REPLAYS",
}  # fmt: skip
# It decides how to count when it is imported, by what SGLang's main process has prepared.
NOT_IMPORTED = ("prometheus_client",)
# pyarrow's allocator, which knows of forks.
HARMLESS_THREADS = {"jemalloc_bg_thd"}
START_TIMEOUT = 240.0  # seconds for the imports, on a loaded machine
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Program:
    """What a child becomes."""

    target: str  # a module's name, or a script's path
    arguments: tuple[str, ...]
    output: str  # path of a file that takes its standard output and errors
    folder: str  # where it starts
    environment: dict[str, str]  # what differs from the parent's


# What follows runs in the test process.


class WarmProcess:
    """A forked program: what tests use of `subprocess.Popen`."""

    def __init__(self, parent: WarmParent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """Exit status (negative: the signal), or None while it runs."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._look(0.5)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"warm process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _look(self, seconds: float) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.status(self.pid, seconds)
        return self.returncode


class WarmParent:
    """The parent of this test process's programs; ends with it."""

    def __init__(self, environment: dict[str, str], guard: Sequence[str]) -> None:
        self._statuses: dict[int, int] = {}
        self._unread = b""
        self._process = subprocess.Popen(
            [*guard, sys.executable, "-W", "ignore", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parent.parent.parent,
            bufsize=0,
        )
        atexit.register(self._process.kill)
        self._next(START_TIMEOUT)  # it says when it is ready

    def start(self, program: Program) -> WarmProcess:
        """Start a program in a session of its own."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(program)).encode() + b"\n")
        while "started" not in (answer := self._next(START_TIMEOUT)):
            self._statuses[answer["ended"]] = answer["status"]
        return WarmProcess(self, answer["started"])

    def status(self, pid: int, seconds: float) -> int | None:
        """Exit status of one of its children; waits that long at most for news."""
        while pid not in self._statuses:
            try:
                answer = self._next(seconds)
            except TimeoutError:
                return None
            self._statuses[answer["ended"]] = answer["status"]
        return self._statuses[pid]

    def _next(self, seconds: float) -> dict[str, int]:
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    raise TimeoutError(f"the warm parent says nothing in {seconds} s")
            more = self._process.stdout.read(65536)
            if not more:
                raise RuntimeError("the warm parent has ended; its output above says why")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, int] = json.loads(line)
        return answer


# What follows runs in the parent, and in what it forks.


def main() -> None:
    """Import, then fork a child for every line on standard input, until that ends."""
    program = _serve_forks()
    if program is not None:  # a child, which has left the parent's loop and ends as others do
        _become(program)


def _serve_forks() -> Program | None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    _import()

    def answer(**fields: int) -> None:
        os.write(answers, json.dumps(fields).encode() + b"\n")

    answer(ready=os.getpid())
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data, 0)
                    answer(ended=key.data, status=os.waitstatus_to_exitcode(status))
                elif line := sys.stdin.readline():
                    pid = os.fork()
                    if pid == 0:
                        os.close(answers)
                        return Program(**json.loads(line))
                    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                    answer(started=pid)
                else:
                    return None


def _import() -> None:
    for name in IMPORTED:
        import_module(name)
    imported = [name for name in NOT_IMPORTED if name in sys.modules]
    assert not imported, f"{imported} must find what SGLang's main process prepares"
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    threads = {(task / "comm").read_text().strip() for task in tasks}
    assert threads <= HARMLESS_THREADS, f"a fork would lose the threads {threads}"
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    assert not children, f"imports started the processes {children}"
    # Memory is shared as long as nobody writes to it, and the collector would.
    gc.collect()
    gc.freeze()


def _become(program: Program) -> None:
    parent = os.getppid()
    ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the warm parent has ended")
    os.setsid()
    output = os.open(program.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, standard in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(file, standard)
    os.close(nothing)
    os.close(output)
    os.chdir(program.folder)
    os.environ.update(program.environment)
    if "PYTHONPATH" in program.environment:
        _customize(program.environment["PYTHONPATH"])
    _fork_its_processes()
    sys.argv = [program.target, *program.arguments]
    if Path(program.target).is_file():
        sys.path[0] = str(Path(program.target).parent)
        runpy.run_path(program.target, run_name="__main__")
    else:
        runpy.run_module(program.target, run_name="__main__", alter_sys=True)


def _customize(paths: str) -> None:
    """What Python does with the variable when it starts."""
    sys.path[1:1] = paths.split(os.pathsep)
    invalidate_caches()
    with contextlib.suppress(ModuleNotFoundError):
        import_module("sitecustomize")


def _fork_its_processes() -> None:
    """SGLang asks for spawned processes; these are forked, and load the plugins anew."""
    import numpy
    from sglang.srt import plugins

    numpy.random.seed()  # Python's own generator does so by itself; torch's starts with a constant
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *args, **kwargs: None
    multiprocessing.util.register_after_fork(
        plugins, lambda module: setattr(module, "_plugins_loaded", False)
    )


if __name__ == "__main__":
    main()
