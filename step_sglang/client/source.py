"""Where traces come from: `http.AsyncClient`, a server, or `engine.EngineSource`, an engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from step_sglang.errors import ServerError

Messages = Sequence[Mapping[str, Any]]


class TraceSource(Protocol):
    """Renders prompts and streams traces."""

    async def model(self) -> str:
        """The path or name of the model that is served."""
        ...

    async def render(self, messages: Messages) -> list[int]:
        """Token ids of a chat under the model's own template."""
        ...

    def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of ``/generate`` for that body. Closing it cancels what still runs."""
        ...

    async def end_traces(self, ids: Sequence[str]) -> None:
        """End single traces, by the ids in their ``meta_info``, before their stream ends."""
        ...

    async def close(self) -> None:
        """Release what it holds."""
        ...


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
