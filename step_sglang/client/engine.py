"""An in-process engine as a source of traces, in the place of a server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from step_sglang.client.errors import ClientError, RequestRefused
from step_sglang.client.source import Messages


class EngineSource:
    """An ``sgl.Engine`` of this process. It serves one event loop: its own, or the caller's."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def close(self) -> None:
        """The engine is the caller's."""

    async def end_traces(self, ids: Sequence[str]) -> None:
        """Abort them: the caller asked for it, so it needs no other reason."""
        for rid in ids:
            self._engine.tokenizer_manager.abort_request(rid)

    async def model(self) -> str:
        """Of its server arguments."""
        return str(self._engine.server_args.model_path)

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
