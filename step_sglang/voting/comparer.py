"""The child that compares: JSON lines in and out, one question at a time, within its limits.

Dies with its parent, and of a question that takes more CPU time than allowed. Imports
neither torch nor the engine.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from step_sglang.voting.classes import FormQuestion, PairQuestion, Question, reply_to
from step_sglang.voting.forms import Form

MEMORY_LIMIT = 512 << 20  # bytes of address space; 80 MB are the interpreter's and math-verify's
READY = "ready"
_PR_SET_PDEATHSIG = 1
_GROWN = 256 << 20  # bytes; a child that has become this large asks to be replaced
_NICENESS = 5  # the engine goes first


def encode(question: Question, limit: float) -> str:
    """The line that asks a question, to be answered in so many seconds of CPU time."""
    if isinstance(question, FormQuestion):
        return json.dumps({"form": question.answer, "limit": limit}) + "\n"
    return json.dumps({"pair": [question.one, question.other], "limit": limit}) + "\n"


def decode(line: str) -> tuple[Form | bool | None, float, bool]:
    """A reply, the CPU time that it took, and whether the child has grown too large.

    Raises:
        ValueError, KeyError, TypeError: it is no reply.
    """
    fields = json.loads(line)
    reply = fields["reply"]
    if isinstance(reply, dict):
        reply = Form.from_json(reply)
    elif reply is not None:
        reply = bool(reply)
    return reply, float(fields["seconds"]), bool(fields["grown"])


def main() -> None:
    """Serve questions until standard input ends."""
    _die_with(int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid())
    logging.disable(logging.CRITICAL)
    _limit()
    for question in (FormQuestion("\\sqrt{x}+1"), PairQuestion("\\frac{1}{2}y", "y/2")):
        with suppress(Exception):
            reply_to(question)  # builds the parser's tables
    print(READY, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


def _answer(fields: dict[str, Any]) -> dict[str, Any]:
    started = time.process_time()
    limit = float(fields["limit"])
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The timer's signal ends the process, even in the middle of one long operation. Should it
    # fail, the resource limit does, which knows whole seconds only.
    signal.setitimer(signal.ITIMER_PROF, limit)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    whole = math.ceil(used.ru_utime + used.ru_stime + limit) + 1
    if hard == resource.RLIM_INFINITY or whole < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (whole, hard))
    reply: object
    try:
        if "form" in fields:
            found = reply_to(FormQuestion(str(fields["form"])))
        else:
            found = reply_to(PairQuestion(*map(str, fields["pair"])))
        reply = found.to_json() if isinstance(found, Form) else found
    except (Exception, RecursionError, MemoryError):  # math-verify meets arbitrary text
        reply = None
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - started
    return {"reply": reply, "seconds": seconds, "grown": _resident() > _GROWN}


def _resident() -> int:
    """Bytes; not the peak, which begins with the parent's."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # Linux only
        return 0


def _limit() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, which the parent deals with
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        os.nice(_NICENESS)


def _die_with(parent: int) -> None:
    """End when the thread that started this process ends, or right now if it is gone already."""
    with suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL("libc.so.6", use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
