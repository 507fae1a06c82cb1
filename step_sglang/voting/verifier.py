"""Compares answers of unknown origin in a child process, so that none can stop the caller.

math-verify computes what it is given: an answer such as ``9^(9^(9^9))`` never comes back and holds
the interpreter. `python -m step_sglang.voting.verifier` is the child: JSON lines in and out.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading

from step_sglang.voting.answers import equivalent, quickly_equivalent

TIME_LIMIT = 5.0  # seconds for one comparison
START_LIMIT = 60.0  # seconds for the first: the child imports math-verify


class AnswerVerifier:
    """Answers :meth:`same`; starts its child when it is first needed. Safe to share by threads."""

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        self._time_limit = time_limit
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], bool] = {}

    def same(self, one: str, other: str) -> bool:
        """Whether two answers mean the same; False when that cannot be told in time."""
        quick = quickly_equivalent(one, other)
        if quick is not None:
            return quick
        with self._lock:
            pair = (one, other)
            if pair not in self._known:
                if len(self._known) >= 4096:
                    self._known.clear()
                self._known[pair] = self._ask(one, other)
            return self._known[pair]

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._stop()

    def _ask(self, one: str, other: str) -> bool:
        limit = self._time_limit
        if self._child is None or self._child.poll() is not None:
            self._child = _start()
            limit += START_LIMIT
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps([one, other]) + "\n")
            stdin.flush()
            readable, _, _ = select.select([stdout], [], [], limit)
            if readable:
                return bool(json.loads(stdout.readline()))
        except (OSError, ValueError):
            pass
        self._stop()  # a new one serves the next question
        return False

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()

    def __del__(self) -> None:
        self._stop()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # This very package, wherever the caller found it.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def main() -> None:
    """Serve comparisons until standard input ends, as it does when the parent dies."""
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        one, other = json.loads(line)
        try:
            verdict = equivalent(one, other)
        except Exception:  # math-verify meets arbitrary text
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
