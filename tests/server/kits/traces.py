"""Turns the requests that the kits send into traces: each asks for a group of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import aiohttp
import requests

STEP = {"custom_params": {"step": True}}


def with_step(url: str, body: Any) -> Any:
    """The request's body with STEP asked for, whatever endpoint that generates it is for."""
    if not isinstance(body, dict):
        return body
    if url.endswith(("/v1/completions", "/v1/chat/completions")):
        return {**body, **STEP}
    if not url.endswith("/generate"):
        return body
    params = body.get("sampling_params") or {}
    return {
        **body,
        "sampling_params": [{**each, **STEP} for each in params]
        if isinstance(params, list)
        else {**params, **STEP},
    }


@contextmanager
def as_traces() -> Iterator[None]:
    """While it lasts, requests sent with ``requests`` or ``aiohttp`` are traces."""
    send, send_later = requests.Session.request, aiohttp.ClientSession._request

    def request(self: Any, method: str, url: str, **kwargs: Any) -> requests.Response:
        return send(self, method, url, **{**kwargs, "json": with_step(url, kwargs.get("json"))})

    async def request_later(self: Any, method: str, url: Any, **kwargs: Any) -> Any:
        body = with_step(str(url), kwargs.get("json"))
        return await send_later(self, method, url, **{**kwargs, "json": body})

    with (
        mock.patch.object(requests.Session, "request", request),
        mock.patch.object(aiohttp.ClientSession, "_request", request_later),
    ):
        yield
