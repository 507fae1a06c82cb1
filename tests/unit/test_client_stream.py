"""A streamed answer, cut where a network cuts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from step_sglang.client.errors import ServerError
from step_sglang.client.http import AsyncClient
from tests.stand_in import Handler, serving

# JSON may hold the first three as they are; a program that reads lines may end one at each.
TEXTS = ["one\u2028two", "three\u2029four", "five\u0085six", "seven\x1c\x0beight", "nine\r\nten"]


@contextmanager
def streaming(data: bytes, size: int) -> Iterator[str]:
    """A server that answers everything with ``data``, in pieces of ``size`` bytes."""

    class Pieces(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for start in range(0, len(data), size):
                self.wfile.write(data[start : start + size])
                self.wfile.flush()

    with serving(Pieces) as url:
        yield url


def chunks(data: bytes, size: int) -> list[dict[str, Any]]:
    async def read(url: str) -> list[dict[str, Any]]:
        async with AsyncClient(url) as client:
            return [chunk async for chunk in client.stream({})]

    with streaming(data, size) as url:
        return asyncio.run(read(url))


def events(*texts: str) -> bytes:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    return "".join(f"data: {line}\n\n" for line in lines).encode()


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
def test_only_a_newline_ends_a_line(size: int) -> None:
    data = events(*TEXTS) + b"data: [DONE]\n\n"
    assert [chunk["text"] for chunk in chunks(data, size)] == TEXTS


def test_an_answer_that_breaks_off_is_an_error() -> None:
    with pytest.raises(ServerError, match="in the middle"):
        chunks(events(*TEXTS), 7)
    with pytest.raises(ServerError, match="no JSON"):
        chunks(b"data: {]\n\n", 7)
