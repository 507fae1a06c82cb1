"""STEP's settings on SGLang's ``ServerArgs``, which carries them into every process."""

from __future__ import annotations

from typing import Any, NoReturn

from step_sglang.config import StepConfig
from step_sglang.errors import StepError

# An attribute with a leading underscore survives the pickling to the scheduler.
_CONFIG = "_step_config"
_FROM_CLI = "_step_from_cli"


def attach(server_args: Any, config: StepConfig, *, from_cli: bool) -> None:
    """Turn STEP on for the server that these arguments describe."""
    setattr(server_args, _CONFIG, config)
    setattr(server_args, _FROM_CLI, from_cli)


def config_of(server_args: Any) -> StepConfig | None:
    """The STEP configuration of a server, or None when STEP is off."""
    return getattr(server_args, _CONFIG, None)


def replicas() -> int:
    """How many parts of this server have requests of their own: replicas, or attention-DP ranks."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().num_dp_ranks)


def ranks_of_a_batch() -> int:
    """How many tensor-parallel ranks share the attention of one batch, and decide about it."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().attn_tp_size)


def refuse(server_args: Any, error: StepError) -> NoReturn:
    """End a command line with the message alone; raise for a program that made an engine."""
    if getattr(server_args, _FROM_CLI, False):
        raise SystemExit(f"step-sglang: {error}") from error
    raise error
