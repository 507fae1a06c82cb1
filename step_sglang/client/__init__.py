"""Ask a question, get a voted answer: :func:`solve`, and :func:`asolve` for asyncio programs."""

from step_sglang.client.errors import (
    ClientError,
    NoStepError,
    RequestRefused,
    ServerError,
    ServerGoneError,
)
from step_sglang.client.result import Answer, Result, SolveProgress, Timing, TraceResult
from step_sglang.client.solve import asolve, solve
from step_sglang.voting.session import TraceFate, VoteStatus

__all__ = [
    "Answer",
    "ClientError",
    "NoStepError",
    "RequestRefused",
    "Result",
    "ServerError",
    "ServerGoneError",
    "SolveProgress",
    "Timing",
    "TraceFate",
    "TraceResult",
    "VoteStatus",
    "asolve",
    "solve",
]
