"""The one way to a server: its address and key, its answers, and what can go wrong with them.

`Client` blocks, `AsyncClient` awaits; the rules are the same. What an answer means is its caller's
affair. A server of our own is started by `client.launch`, which asks here whether it is up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any
from uuid import uuid4

import httpx

from step_sglang import protocol
from step_sglang.errors import RequestRefused, ServerError

API_KEY_VARIABLE = "STEP_SGLANG_API_KEY"  # read where no key is given
CONNECT_TIMEOUT = 10.0  # seconds
DEFAULT_TIMEOUT = 60.0  # seconds
FLUSH_TIMEOUT = 60.0  # seconds that a server may need to become idle
# SGLang's router keeps requests of one key on one server (`--policy consistent_hashing`, `manual`).
ROUTING_KEY = "X-SMG-Routing-Key"
WORKERS_PATH = "/workers"  # of the router: its servers
STREAM_ERROR = "stream_error"  # what a router's last chunk says when its server went away
# What a router says when it has no place for a request, or none came free in time: of no request
# alone. Another time it takes the same one.
BUSY = (408, 425, 429)
MODEL_PATHS = ("/model_info", "/get_model_info")  # a router knows the older one alone


def server_url(url: str) -> str:
    """A server's own address; the one that OpenAI clients take, with ``/v1``, is as good."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def known_key(api_key: str | None) -> str | None:
    """The key that was given, else that of the environment, else None."""
    return (os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key) or None


def no_response_error(url: str, error: Exception) -> ServerError:
    """What to raise for a server that did not answer; ``error`` is httpx's."""
    if isinstance(error, httpx.ReadTimeout):
        return ServerError(f"the server at {url} did not answer in time")
    return ServerError(
        f"the server at {url} does not answer ({str(error) or type(error).__name__})"
    )


class _Connection:
    """The rules that both faces share."""

    def __init__(self, url: str, timeout: float, api_key: str | None) -> None:
        self.url = server_url(url)
        if not self.url.startswith(("http://", "https://")):
            raise ServerError(f"{url!r} is no server's address, such as http://127.0.0.1:30000")
        key = known_key(api_key)
        self._options: dict[str, Any] = {
            "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT)),
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            # A question may be asked in as many requests as its caller likes, all at once.
            "limits": httpx.Limits(max_connections=None),
        }

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise no_response_error(self.url, error) from error
        except UnicodeEncodeError as error:
            before = error.object[max(0, error.start - 20) : error.start]
            raise RequestRefused(
                f"after {before!r} the request has {error.object[error.start]!r}, half of a "
                "surrogate pair, which no request can carry: leave it out"
            ) from error

    def _check(self, answer: httpx.Response, text: str | None = None) -> None:
        """Raise unless the answer is a success; ``text`` is its body where it was streamed."""
        status = answer.status_code
        if status == 200:
            return
        problem = f"{_message(answer.text if text is None else text)} (HTTP {status})"
        if status in (401, 403):
            raise ServerError(
                f"the server at {self.url} wants an API key, or another one: pass api_key or set "
                f"{API_KEY_VARIABLE}. It says: {problem}"
            )
        if status in (404, 405):
            raise self._unfit(problem)
        if status in BUSY:
            raise ServerError(f"the server at {self.url} takes no more requests now: {problem}")
        if 400 <= status < 500:
            raise RequestRefused(f"the server refused the request: {problem}")
        raise ServerError(f"the server at {self.url} failed: {problem}")

    def _json(self, answer: httpx.Response) -> Any:
        self._check(answer)
        try:
            return answer.json()
        except ValueError as error:
            raise self._unfit("it answers no JSON") from error

    def _member(self, answer: httpx.Response, name: str) -> Any:
        try:
            return self._json(answer)[name]
        except (KeyError, TypeError, IndexError) as error:
            raise self._unfit(f"its answer lacks {name!r}") from error

    def _object(self, answer: httpx.Response) -> dict[str, Any]:
        value = self._json(answer)
        if not isinstance(value, dict):
            raise self._unfit("its answer is no JSON object")
        return value

    def _workers(self, answer: httpx.Response) -> list[str]:
        """The servers behind a router, those first that it thinks well; of a server none."""
        if answer.status_code != 200:
            return []
        try:
            workers = sorted(answer.json()["workers"], key=lambda one: not one.get("is_healthy", 1))
            # With `--dp-aware` each data-parallel rank is one, by its server's address and "@RANK".
            urls = [re.sub(r"@\d+$", "", str(worker["url"])) for worker in workers]
            return list(dict.fromkeys(urls))
        except (ValueError, KeyError, TypeError, AttributeError):
            return []

    def _unreached(self, what: str, problems: Sequence[ServerError]) -> ServerError:
        """What to raise when servers behind the router, which must be asked, do not answer."""
        return ServerError(
            f"{self.url} is SGLang's router, which {what}: its servers have to be reached from "
            f"here too. {'; '.join(map(str, problems))}"
        )

    def _unfit(self, why: str) -> ServerError:
        return ServerError(f"{self.url} is no SGLang server of this version: {why}")


class Client(_Connection):
    """Asks and waits. A context manager."""

    def __init__(
        self, url: str, timeout: float = DEFAULT_TIMEOUT, api_key: str | None = None
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: such as ``http://127.0.0.1:30000``; a trailing ``/v1`` is left out.
            timeout: seconds without anything from the server.
            api_key: of the server; None: what ``STEP_SGLANG_API_KEY`` says.
        """
        super().__init__(url, timeout, api_key)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def model(self) -> str:
        """GET /model_info: the model path that it serves; raises ServerError."""
        for path in MODEL_PATHS:
            answer = self._send("GET", path)
            if answer.status_code != 404:
                break
        if answer.status_code >= 500:  # a router asks any of its servers, also one that is gone
            for worker in self._workers(self._send("GET", WORKERS_PATH)):
                with suppress(ServerError):
                    return self._at(worker).model()
        return str(self._member(answer, "model_path"))

    def info(self) -> dict[str, Any]:
        """GET /server_info; raises ServerError."""
        return self._object(self._send("GET", "/server_info"))

    def metrics(self) -> str:
        """GET /metrics, in Prometheus' text format; raises ServerError, without any too."""
        answer = self._send("GET", "/metrics")
        self._check(answer)
        return answer.text

    def healthy(self) -> bool:
        """GET /health: whether it is up; never raises."""
        try:
            return self._send("GET", "/health").status_code == 200
        except ServerError:
            return False

    def abort_group(self, group: str) -> int:
        """POST /step/abort_group: how many requests were aborted.

        Of SGLang's router all servers are asked: only one has the group, but which is the
        router's affair. One that does not answer is no error where another had the group.

        Raises:
            RequestRefused: the group id is none.
            ServerError: the server does not answer, or runs without STEP.
        """
        answer = self._send("POST", protocol.ABORT_GROUP_PATH, {protocol.GROUP: group})
        if answer.status_code == 404:
            workers = self._workers(self._send("GET", WORKERS_PATH))
            if not workers:
                raise ServerError(f"the server at {self.url} runs without STEP (HTTP 404)")
            ended, problems = 0, []
            for worker in workers:
                try:
                    ended += self._at(worker).abort_group(group)
                except RequestRefused:
                    raise
                except ServerError as error:
                    problems.append(error)
            if problems and not ended:
                raise self._unreached("ends no groups", problems)
            return ended
        aborted = self._member(answer, protocol.ABORTED)
        if not isinstance(aborted, int):
            raise self._unfit(f"{protocol.ABORTED!r} is no number in its answer")
        return aborted

    def feed(self) -> Iterator[bytes]:
        """GET /step/events: the feed's updates as JSON, as they come; see `step_sglang.live`.

        Raises:
            ServerError: the server does not answer, has no live page, or breaks off.
        """
        with (
            self._reaching(),
            self._http.stream("GET", self.url + protocol.EVENTS_PATH) as answer,
        ):
            if answer.status_code == 404:
                workers = self._workers(self._send("GET", WORKERS_PATH))
                raise ServerError(
                    f"{self.url} is SGLang's router, which has no live page: look at one of its "
                    f"servers, {', '.join(workers)}"
                    if workers
                    else f"the server at {self.url} has no live page: it runs without STEP, or "
                    "with --step-page off (HTTP 404)"
                )
            if answer.status_code != 200:
                self._check(answer, answer.read().decode(errors="replace"))
            rest = b""
            for data in answer.iter_bytes():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: "):
                        yield line[6:]
        raise ServerError(f"the server at {self.url} ended the feed in the middle")

    def _at(self, url: str) -> Client:
        """The same, of another server."""
        other = copy(self)
        other.url = server_url(url)
        return other

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        with self._reaching():
            return self._http.request(method, self.url + path, json=body)


class AsyncClient(_Connection):
    """The same for asyncio programs; samples traces. A context manager, and a `TraceSource`."""

    def __init__(
        self, url: str, timeout: float = DEFAULT_TIMEOUT, api_key: str | None = None
    ) -> None:
        """As :class:`Client`'s."""
        super().__init__(url, timeout, api_key)
        self._http = httpx.AsyncClient(**self._options)
        self._routed: bool | None = None  # behind a router; None: not asked yet

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; what still runs is cancelled by the server."""
        await self._http.aclose()

    async def generate(self, body: dict[str, Any]) -> Any:
        """POST /generate, answered as a whole.

        Raises:
            RequestRefused: the server refused this one request (4xx).
            ServerError: it does not answer, or failed.
        """
        body = await self._packed(body)
        return self._json(await self._send("POST", "/generate", body, _routing(body)))

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """POST /generate, streaming: the chunks as they come.

        Raises:
            RequestRefused: the server refused the request.
            ServerError: it does not answer, fails, or breaks off.
        """
        body = await self._packed({**body, "stream": True})
        headers = _routing(body)
        with self._reaching():
            async with self._http.stream(
                "POST", f"{self.url}/generate", json=body, headers=headers
            ) as answer:
                if answer.status_code != 200:
                    self._check(answer, (await answer.aread()).decode(errors="replace"))
                # Split by hand: a client library's line reader also ends a line at U+2028 and
                # its like, which a trace's text holds as they are.
                rest = b""
                async for data in answer.aiter_bytes():
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if line.rstrip() == b"data: [DONE]":
                            return
                        if line.startswith(b"data: "):
                            yield _chunk(line[6:])
        raise ServerError(f"the server at {self.url} ended the answer in the middle")

    async def model(self) -> str:
        """GET /model_info: the model path that it serves; raises ServerError."""
        for path in MODEL_PATHS:
            answer = await self._send("GET", path)
            if answer.status_code != 404:
                break
        if answer.status_code >= 500:  # a router asks any of its servers, also one that is gone
            for worker in await self._servers():
                with suppress(ServerError):
                    return await self._at(worker).model()
        return str(self._member(answer, "model_path"))

    async def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """POST /v1/tokenize: token ids of a chat under the model's own template.

        SGLang's router knows no templates: one of its servers is asked.

        Raises:
            RequestRefused: the server refused the chat.
            ServerError: it does not answer, or failed.
        """
        body = {"messages": list(messages), "add_special_tokens": True}
        answer = await self._send("POST", "/v1/tokenize", body)
        if answer.status_code in (404, 422):  # a router wants other members, where it has it at all
            problems = []
            for worker in await self._servers():
                try:
                    return await self._at(worker).render(messages)
                except RequestRefused:
                    raise
                except ServerError as error:
                    problems.append(error)
            if problems:
                raise self._unreached("renders no chats", problems)
        tokens = self._member(answer, "tokens")
        if not isinstance(tokens, list):
            raise self._unfit("its tokens are no list")
        return tokens

    async def end_traces(self, ids: Sequence[str]) -> None:
        """POST /step/end_traces: end single traces by their ids.

        Of SGLang's router all servers are asked, as of the end of a group.

        Raises:
            ServerError: the server does not answer, runs without STEP, or wants another key.
        """
        answer = await self._send("POST", protocol.END_TRACES_PATH, {protocol.TRACES: list(ids)})
        if answer.status_code == 404:
            workers = await self._servers()
            if not workers:
                raise ServerError(f"the server at {self.url} ends no single traces (HTTP 404)")
            problems = []
            for worker in workers:
                try:
                    await self._at(worker).end_traces(ids)
                except ServerError as error:
                    problems.append(error)
            if len(problems) == len(workers):
                raise self._unreached("ends no single traces", problems)
            return
        self._member(answer, protocol.ENDED)

    async def flush(self) -> None:
        """POST /flush_cache: empty the radix cache, as soon as the server is idle.

        Raises:
            ServerError: it does not answer, or does not become idle in a minute.
        """
        deadline = time.monotonic() + FLUSH_TIMEOUT
        while (answer := await self._send("POST", "/flush_cache")).status_code != 200:
            if answer.status_code != 400:  # which is what a busy server says
                self._check(answer)
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the server at {self.url} does not become idle, so its cache cannot be "
                    f"flushed: {answer.text.strip()[:200]}"
                )
            await asyncio.sleep(0.1)

    async def _servers(self) -> list[str]:
        """The servers behind a router; of a server none."""
        return self._workers(await self._send("GET", WORKERS_PATH))

    async def _packed(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body, saying twice what a router would drop: what it says of STEP, and nulls."""
        params = body.get("sampling_params")
        if not isinstance(params, dict):
            return body
        step = (params.get("custom_params") or {}).get(protocol.REQUEST_KEY)
        if step is None:  # a server without STEP would refuse them
            return body
        if self._routed is None:
            self._routed = bool(await self._servers())
        if not self._routed:
            return body
        sampling = {key: params[key] for key in params if key not in ("custom_params", "n")}
        session = {
            **(body.get("session_params") or {}),
            protocol.REQUEST_KEY: step,
            protocol.SAMPLING_KEY: sampling,
        }
        return {**body, "session_params": session}

    def _at(self, url: str) -> AsyncClient:
        """The same, of another server."""
        other = copy(self)
        other.url = server_url(url)
        return other

    async def _send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        with self._reaching():
            return await self._http.request(method, self.url + path, json=body, headers=headers)


def served_model(url: str) -> str:
    """The model path that ``url`` serves; raises ServerError."""
    with Client(url) as client:
        return client.model()


def server_info(url: str) -> dict[str, Any]:
    """What ``url`` says of itself; raises ServerError."""
    with Client(url) as client:
        return client.info()


def _routing(body: Mapping[str, Any]) -> dict[str, str]:
    """Headers that keep the requests of one group on one server, behind SGLang's router."""
    try:
        group = body["sampling_params"]["custom_params"][protocol.REQUEST_KEY][protocol.GROUP]
    except (KeyError, TypeError):
        group = uuid4().hex
    name = str(group)
    # A header holds no other letters, nor spaces at its ends; a hash tells groups apart as well.
    fits = name.isascii() and name.isprintable() and name == name.strip()
    return {ROUTING_KEY: name if fits else _hashed(name)}


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _message(text: str) -> str:
    """What an error's body says, in any of SGLang's forms of it."""
    try:
        value = json.loads(text)
        text = value.get("message") or value["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return str(text).strip()[:500] or "no message"


def _chunk(line: bytes) -> dict[str, Any]:
    try:
        chunk: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ServerError("the server sent a chunk that is no JSON") from error
    if "error" in chunk:
        value = chunk["error"]
        message = value.get("message", value) if isinstance(value, dict) else value
        if isinstance(value, dict) and value.get("type") == STREAM_ERROR:
            raise ServerError(f"the router lost its server: {str(message)[:500]}")
        raise RequestRefused(f"the server refused the request: {str(message)[:500]}")
    return chunk
