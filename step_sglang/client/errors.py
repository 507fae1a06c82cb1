"""Errors of solving a question."""

from __future__ import annotations

from typing import TYPE_CHECKING

from step_sglang.errors import RequestRefused, ServerError, StepError

if TYPE_CHECKING:
    from step_sglang.client.result import Result

__all__ = ["ClientError", "NoStepError", "RequestRefused", "ServerError", "ServerGoneError"]


class ClientError(StepError):
    """The call itself is wrong, whatever the server."""


class NoStepError(ServerError):
    """The server (or engine) runs without STEP: its traces have no score."""


class ServerGoneError(ServerError):
    """The server went away in the middle. ``result`` holds what had arrived, and its vote."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result
