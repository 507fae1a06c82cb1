"""Ask a question, get a voted answer: :func:`solve`, and :func:`asolve` for asyncio programs."""

from step_sglang.client.errors import (
    ClientError,
    NoStepError,
    RequestRefused,
    ServerError,
    ServerGoneError,
)
from step_sglang.client.result import Answer, Progress, Result, Timing, Trace
from step_sglang.client.solve import asolve, solve
from step_sglang.gather import Status, TraceFate

__all__ = [
    "Answer",
    "ClientError",
    "NoStepError",
    "Progress",
    "RequestRefused",
    "Result",
    "ServerError",
    "ServerGoneError",
    "Status",
    "Timing",
    "Trace",
    "TraceFate",
    "asolve",
    "solve",
]
