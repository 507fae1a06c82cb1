"""Talks to a running server; every failure becomes one clear error."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from step_sglang.errors import RequestRefused, ServerError

CONNECT_TIMEOUT = 10.0  # seconds


class Client:
    """POST /generate and the few questions asked before. Use as an async context manager."""

    def __init__(self, url: str, timeout: float) -> None:
        """``timeout``: seconds without an answer to one request."""
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT),
            limits=httpx.Limits(max_connections=None),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def generate(self, body: dict[str, Any]) -> Any:
        """POST /generate.

        Raises:
            RequestRefused: the server refused this one request (4xx).
            ServerError: the server died, hangs, or failed.
        """
        answer = await self._send("POST", "/generate", body)
        if 400 <= answer.status_code < 500:
            raise RequestRefused(f"the server refused a request: {_message(answer)}")
        if answer.status_code != 200:
            raise ServerError(f"the server at {self.url} failed: {_message(answer)}")
        try:
            return answer.json()
        except ValueError as error:
            raise ServerError(f"the server at {self.url} answers no JSON") from error

    async def model(self) -> str:
        """The model path it serves."""
        answer = await self._send("GET", "/model_info", None)
        try:
            return str(answer.json()["model_path"])
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url} is not an SGLang server: {_message(answer)}") from error

    async def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            return await self._http.request(method, self.url + path, json=body)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise no_response_error(self.url, error) from error


def no_response_error(url: str, error: Exception) -> ServerError:
    """What to raise for a server that did not answer; ``error`` is httpx's."""
    if isinstance(error, httpx.ReadTimeout):
        return ServerError(f"the server at {url} did not answer in time")
    return ServerError(
        f"the server at {url} does not answer ({str(error) or type(error).__name__})"
    )


def wait_until_healthy(url: str, alive: Any, seconds: float) -> bool:
    """Poll GET /health; False when ``alive()`` turns false or the time is over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and alive():
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    return False


def served_model(url: str) -> str:
    """The model path that ``url`` serves; raises ServerError."""

    async def ask() -> str:
        async with Client(url, 30.0) as client:
            return await client.model()

    return asyncio.run(ask())


def _message(answer: httpx.Response) -> str:
    try:
        value = answer.json()
        message = value.get("message") or value["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = answer.text
    return f"{message.strip()[:500] or 'no message'} (HTTP {answer.status_code})"
