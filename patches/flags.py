"""STEP's flags and engine arguments, and what asking for STEP sets in motion."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig, add_cli_arguments, take_options
from step_sglang.errors import ConfigError, StepError
from step_sglang.patches import contract, engine_check, hooks, preflight
from step_sglang.patches.server_args import attach
from step_sglang.scoring.locate import locate_scorer

logger = logging.getLogger(__name__)


def add_cli_args(result: None, parser: argparse.ArgumentParser) -> None:
    """AFTER ``ServerArgs.add_cli_args``."""
    add_cli_arguments(parser)


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ``ServerArgs.from_cli_args``: the record takes no fields that it does not declare."""
    try:
        config = take_options(vars(args))
        if config is not None:
            config = _with_scorer(config, args.model_path)
        server_args = original(cls, args)
        if config is not None:
            _enable(server_args, config, from_cli=True)
    except StepError as error:
        raise SystemExit(f"step-sglang: {error}") from error
    return server_args


def accept_engine_arguments() -> None:
    """Let ``sgl.Engine(enable_step=True, step_scorer=...)`` through.

    ``Engine.__init__`` itself loads the plugins, so a hook on it would miss the first engine of a
    process; the class attribute that it builds its record with is read afterwards.
    """
    from sglang.srt.entrypoints.engine import Engine

    Engine.server_args_class = staticmethod(partial(_build_record, Engine.server_args_class))


def _build_record(record_class: Callable[..., Any], **kwargs: Any) -> Any:
    config = take_options(kwargs)
    if config is not None:
        config = _with_scorer(config, kwargs.get("model_path"))
    server_args = record_class(**kwargs)
    if config is not None:
        _enable(server_args, config, from_cli=False)
    return server_args


def enable(server_args: Any, **options: Any) -> None:
    """Turn STEP on for a `ServerArgs` made by the caller, before ``Engine(server_args=...)``.

    Args:
        server_args: a fresh ``ServerArgs``.
        options: ``step_scorer`` and the other engine arguments of STEP.

    Raises:
        ConfigError: an option is wrong or unknown, or something in the record is not supported.
    """
    config = take_options(wanted := {"enable_step": True, **options})
    if wanted:
        raise ConfigError(f"unknown STEP options: {', '.join(sorted(wanted))}")
    assert config is not None
    config = _with_scorer(config, server_args.model_path)
    _enable(server_args, config, from_cli=False)


def _with_scorer(config: StepConfig, model: str | None) -> StepConfig:
    """With the scorer's file, found or downloaded before SGLang looks at the model."""
    return replace(config, scorer=locate_scorer(config.scorer, model or ""))


def _check_engine() -> None:
    found = engine_check.differences()
    if not found:
        return
    text = "\n".join(str(difference) for difference in found)
    if not engine_check.accepted(found):
        may = (
            ""
            if any(d.fatal for d in found)
            else (f"\nIf you have made sure that it works, start with {protocol.UNTESTED_ENV}=1")
        )
        raise ConfigError(
            f"the installed SGLang is not one this version was tested with:\n{text}{may}"
        )
    logger.warning("STEP runs on an SGLang that it was not tested with:\n%s", text)


def hook_tokenizer_manager(*, http: bool) -> None:
    """Hook this process, which has a tokenizer manager, and an HTTP server too if it says so."""
    hooks.install(hooks.TOKENIZER)
    if http:
        hooks.install(hooks.HTTP)
    if protocol.VIRTUAL_GPU_ENV in os.environ:
        from step_sglang.patches.virtual.hooks import IN_TOKENIZER_MANAGER, take_over_time

        take_over_time(IN_TOKENIZER_MANAGER)


def _enable(server_args: Any, config: StepConfig, *, from_cli: bool) -> None:
    wrong = contract.mismatches()
    if wrong:
        raise ConfigError(
            "the installed SGLang is not the one this version was made for:\n"
            + "\n".join(str(finding) for finding in wrong)
        )
    _check_engine()
    preflight.refuse_unsupported(server_args)
    if server_args.tokenizer_worker_num > 1 and not from_cli:
        raise ConfigError(
            "not supported with enable_step: several tokenizer workers (tokenizer_worker_num) of "
            "an engine: start a server with --tokenizer-worker-num, or leave them out"
        )
    hook_tokenizer_manager(http=from_cli)
    os.environ[protocol.HOOKS_ENV] = "1"
    attach(server_args, config, from_cli=from_cli)
