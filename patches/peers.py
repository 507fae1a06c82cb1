"""Lets the tokenizer workers of one server ask each other about their requests.

With ``--tokenizer-worker-num`` above 1 several processes answer HTTP, and each knows the requests
that came to it alone. What may be about a request of any of them is asked of all: each listens at a
socket in a folder of this server, and answers one question a connection, both as a line of JSON.
With one worker there is nobody to ask.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_PATIENCE = 10.0  # seconds that an answer may take
_MAX_LINE = 1 << 26  # bytes

Answer = Callable[[Mapping[str, Any]], Awaitable[Any]]


class Peers:
    """The workers of this server, seen from one of them.

    Args:
        folder: where their sockets are; its owner alone may enter it.
        answer: answers the others' questions.
    """

    def __init__(self, folder: Path, answer: Answer) -> None:
        self._folder, self._answer = folder, answer
        self._own = folder / f"{os.getpid()}.sock"
        self._tasks: set[asyncio.Task[Any]] = set()  # a loop keeps no task alive

    async def listen(self) -> None:
        """Answer questions from now on, in the running event loop."""
        self._own.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(
            self._serve, path=str(self._own), limit=_MAX_LINE
        )

    async def ask(self, question: Mapping[str, Any]) -> list[Any]:
        """The answers of all others. One that has ended since has none.

        Raises:
            TimeoutError: one does not answer.
        """
        sockets = [path for path in sorted(self._folder.glob("*.sock")) if path != self._own]
        answers = await asyncio.gather(*(self._ask_one(path, question) for path in sockets))
        return [answer[0] for answer in answers if answer is not None]

    def tell(self, question: Mapping[str, Any]) -> None:
        """Ask all others, and do not wait for it."""
        task = asyncio.get_running_loop().create_task(self._tell(question))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, question: Mapping[str, Any]) -> None:
        try:
            await self.ask(question)
        except TimeoutError:
            logger.error("STEP: a tokenizer worker does not answer %s", list(question))

    async def _ask_one(self, path: Path, question: Mapping[str, Any]) -> tuple[Any] | None:
        async with asyncio.timeout(_PATIENCE):
            try:
                reader, writer = await asyncio.open_unix_connection(str(path), limit=_MAX_LINE)
            except OSError:
                return None
            try:
                writer.write(json.dumps(question).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            except OSError:
                return None
            finally:
                writer.close()
        return (json.loads(line),) if line else None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = json.loads(await reader.readline())
            writer.write(json.dumps(await self._answer(question)).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError):
            logger.exception("STEP could not answer another tokenizer worker")
        finally:
            writer.close()


_peers: Peers | None = None  # one worker per process


async def join(folder: Path, answer: Answer) -> None:
    """Make this process one of the workers of a server."""
    global _peers  # noqa: PLW0603
    _peers = Peers(folder, answer)
    await _peers.listen()


def several() -> bool:
    """Whether this process is one of several workers."""
    return _peers is not None


async def ask_others(question: Mapping[str, Any]) -> list[Any]:
    """The answers of the other workers; see :meth:`Peers.ask`."""
    return [] if _peers is None else await _peers.ask(question)


def tell_others(question: Mapping[str, Any]) -> None:
    """The same without an answer."""
    if _peers is not None:
        _peers.tell(question)
