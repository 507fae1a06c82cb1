"""Where the traces come from: a server's URL or an in-process engine; both yield chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import httpx

from step_sglang.client.errors import ClientError, RequestRefused, ServerError
from step_sglang.client.http import CONNECT_TIMEOUT, no_response_error

Messages = Sequence[Mapping[str, Any]]


class Source(Protocol):
    """Renders prompts and streams traces."""

    async def render(self, messages: Messages) -> list[int]:
        """Token ids of a chat under the model's own template."""
        ...

    def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of ``/generate`` for that body. Closing it cancels what still runs."""
        ...

    async def close(self) -> None:
        """Release what it holds."""
        ...


class UrlSource:
    """A running server."""

    def __init__(self, url: str, timeout: float, api_key: str | None) -> None:
        """``timeout``: seconds without anything from the server."""
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT), headers=headers
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def render(self, messages: Messages) -> list[int]:
        """POST /v1/tokenize."""
        body = {"messages": list(messages), "add_special_tokens": True}
        try:
            answer = await self._http.post(f"{self.url}/v1/tokenize", json=body)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise no_response_error(self.url, error) from error
        if answer.status_code != 200:
            raise self._refused(answer, answer.text)
        try:
            return list(answer.json()["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url} is not an SGLang server of this version") from error

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """POST /generate, streaming.

        Raises:
            RequestRefused: the server refused the request.
            ServerError: it does not answer, fails, or breaks off.
        """
        body = {**body, "stream": True}
        try:
            async with self._http.stream("POST", f"{self.url}/generate", json=body) as answer:
                if answer.status_code != 200:
                    raise self._refused(answer, (await answer.aread()).decode(errors="replace"))
                # Only "\n" ends a line: a text may hold U+2028 and its like as they are.
                rest = b""
                async for data in answer.aiter_bytes():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.rstrip() == b"data: [DONE]":
                            return
                        if line.startswith(b"data: "):
                            yield _chunk(line[6:])
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise no_response_error(self.url, error) from error
        raise ServerError(f"the server at {self.url} ended the answer in the middle")

    def _refused(self, answer: httpx.Response, text: str) -> ServerError:
        status = answer.status_code
        message = f"{text.strip()[:500] or 'no message'} (HTTP {status})"
        if 400 <= status < 500:
            return RequestRefused(f"the server refused the request: {message}")
        return ServerError(f"the server at {self.url} failed: {message}")


class EngineSource:
    """An ``sgl.Engine`` of this process. It serves one event loop: its own, or the caller's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def close(self) -> None:
        """The engine is the caller's."""

    async def render(self, messages: Messages) -> list[int]:
        """The tokenizer's chat template."""
        tokenizer = self._engine.tokenizer_manager.tokenizer
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise ClientError("the engine's model has no chat template: pass input_ids, or a text")
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer.encode(text, add_special_tokens=False))

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """``Engine.async_generate``, streaming."""
        arguments = {"prompt" if key == "text" else key: value for key, value in body.items()}
        try:
            chunks = await self._engine.async_generate(**arguments, stream=True)
            try:
                async for chunk in chunks:
                    yield chunk
            finally:
                await chunks.aclose()
        except ValueError as error:
            raise RequestRefused(f"the engine refused the request: {error}") from error


@contextmanager
def reading_chunks() -> Iterator[None]:
    """Turns what a malformed chunk raises while it is read into one ServerError."""
    try:
        yield
    except (KeyError, TypeError, IndexError) as error:
        raise ServerError(
            f"the server sent an unusable chunk ({type(error).__name__} {error}); is it an SGLang "
            "server of this version?"
        ) from error


def _chunk(line: bytes) -> dict[str, Any]:
    try:
        chunk: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ServerError("the server sent a chunk that is no JSON") from error
    if "error" in chunk:
        value = chunk["error"]
        message = value.get("message", value) if isinstance(value, dict) else value
        raise RequestRefused(f"the server refused the request: {str(message)[:500]}")
    return chunk
