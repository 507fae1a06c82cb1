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
from step_sglang.voting.session import TraceFate, VoteStatus

__all__ = [
    "Answer",
    "ClientError",
    "NoStepError",
    "Progress",
    "RequestRefused",
    "Result",
    "ServerError",
    "ServerGoneError",
    "Timing",
    "Trace",
    "TraceFate",
    "VoteStatus",
    "asolve",
    "solve",
]
