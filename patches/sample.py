"""Keeps chosen groups for training, in the process that has the requests of a whole group.

A chosen group is made to run to its end: none of it is pruned, and its vote ends with its last
trace. It lives on SGLang's own request objects, copies of which are its samples, so one that ends
otherwise is forgotten with them.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.gathering.choice import MIN_TRACES, is_chosen
from step_sglang.gathering.metrics import GatheringMetrics
from step_sglang.gathering.record import GroupInProgress, KeptTrace
from step_sglang.gathering.writer import BEGUN, Writer
from step_sglang.patches import guard
from step_sglang.patches.parsed import parsed_of
from step_sglang.patches.server_args import config_of
from step_sglang.pruning.request import StepRequest, spared
from step_sglang.voting.answers import extractor_named

logger = logging.getLogger(__name__)

_GROUP = "step_kept_group"  # on a request object


class _Keeper:
    """What this process keeps groups with."""

    def __init__(self, manager: Any, config: StepConfig) -> None:
        self.manager = manager
        self._folder = config.sample
        self.writer = Writer(Path(config.sample), config.sample_limit, self.count, self._failed)
        atexit.register(self.writer.close)

    def count(self, fate: str) -> None:
        if _metrics is not None:
            _metrics.group(fate)

    def _failed(self, error: Exception) -> None:
        if guard.count(protocol.IN_SAMPLING, error):
            logger.warning(
                "STEP cannot keep a group in --step-sample %s (%s: %s), and serves on without; "
                "further failures are only counted",
                self._folder,
                type(error).__name__,
                error,
            )


_keeper: _Keeper | None = None  # one tokenizer manager per process
_metrics: GatheringMetrics | None = None


def count_with(metrics: GatheringMetrics) -> None:
    """Count kept groups of this process in these metrics."""
    global _metrics  # noqa: PLW0603
    _metrics = metrics


def spare_if_chosen(result: Any, manager: Any, obj: Any, step_request: StepRequest) -> None:
    """Keep this group if it is chosen; nothing of it will be pruned then.

    Args:
        result: what goes to the scheduler, of which the samples are copies.
        manager: the tokenizer manager.
        obj: the prompt's request, of which theirs are copies.
        step_request: what it said, with its group.
    """
    config, params = config_of(manager.server_args), result.sampling_params
    if config is None or not config.sample or not _can_be_kept(result, step_request):
        return
    group = step_request.group
    if group is None or manager.tokenizer is None or not is_chosen(group, config.sample_share):
        return
    with guard.guard(protocol.IN_SAMPLING):
        keeper = _the_keeper(manager, config)
        extract = extractor_named(parsed_of(obj).extract or config.extract)
        prompt = array("i", result.input_ids)
        setattr(obj, _GROUP, GroupInProgress(group, params.n, prompt, extract))
        params.custom_params = spared(params.custom_params)
        keeper.count(BEGUN)


def _can_be_kept(result: Any, step_request: StepRequest) -> bool:
    """Whether the model alone, from token ids alone, would have the same hidden states again."""
    params = result.sampling_params
    return (
        step_request.sample
        and step_request.baseline is None  # ends traces by its own rule
        and params.n >= MIN_TRACES
        and params.top_k != 1  # at temperature 0, too: all traces are the same
        and result.input_ids is not None
        and result.mm_inputs is None
        and result.input_embeds is None
        and result.positional_embed_overrides is None
        and result.lora_id is None
        and result.session_id is None
        and result.session_params is None
    )


def is_kept(obj: Any) -> bool:
    """Whether a request is a sample of a group that is kept."""
    return hasattr(obj, _GROUP)


def trace_finished(meta_info: Mapping[str, Any], state: Any, finish: str) -> None:
    """A trace's last chunk was put together, but for its text and its last tokens."""
    group: GroupInProgress | None = getattr(state.obj, _GROUP, None)
    if group is not None:
        with guard.guard(protocol.IN_SAMPLING):
            loop = asyncio.get_running_loop()
            loop.call_soon(
                _take, group, meta_info["id"], meta_info[protocol.META_KEY], state, finish
            )


@guard.guard(protocol.IN_SAMPLING)
def _take(
    group: GroupInProgress, rid: str, step: Mapping[str, Any], state: Any, finish: str
) -> None:
    tokens, score = array("i", state.output_ids), step[protocol.META_SCORE]
    complete = group.add(KeptTrace(rid, state.get_text(), tokens, finish, score))
    if complete and _keeper is not None:
        group.question = str(_keeper.manager.tokenizer.decode(group.prompt.tolist()))
        _keeper.writer.put(group)


def _the_keeper(manager: Any, config: StepConfig) -> _Keeper:
    global _keeper  # noqa: PLW0603
    if _keeper is None or _keeper.manager is not manager:
        _keeper = _Keeper(manager, config)
    return _keeper
