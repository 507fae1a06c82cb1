"""STEP pruning (arXiv 2601.09093) for SGLang.

``step_sglang.solve`` asks a server one question and returns one voted answer; ``asolve`` is for
asyncio programs. Nothing in this package imports SGLang; everything that knows the engine's insides
is installed beside it as ``step_sglang.patches``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step_sglang.client.solve import asolve, solve

__version__ = "0.1.0"
__all__ = ["__version__", "asolve", "solve"]


def __getattr__(name: str) -> Any:
    # Late: every process of a server imports this package.
    if name in ("asolve", "solve"):
        from step_sglang import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
