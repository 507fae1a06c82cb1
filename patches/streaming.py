"""The response's ``meta_info["step"]``, and the end of traces that end in the output stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from step_sglang import protocol
from step_sglang.patches import progress
from step_sglang.patches.guard import guard
from step_sglang.patches.places import keep_source, withheld
from step_sglang.patches.queue import set_limits
from step_sglang.patches.state import SchedulerStep, state_of, trace_of
from step_sglang.pruning.groups import GroupRegistry, Trace, TraceStatus


def get_output_streamer_class(base: type, scheduler: Any) -> type:
    """AFTER ``Scheduler.get_output_streamer_class``."""
    state = state_of(scheduler)
    if state is None:
        return base
    set_limits(scheduler, state)  # the first hook after the decode graphs were captured
    return _step_streamer(base, state)


def _status(req: Any) -> TraceStatus:
    return (
        TraceStatus.ABORTED
        if req.finished_reason.to_json()["type"] == "abort"
        else TraceStatus.FINISHED
    )


def metas(traces: Sequence[Trace | None], groups: GroupRegistry) -> list[dict[str, Any] | None]:
    """``meta_info["step"]`` of each; None of an ordinary request, and where it failed."""
    infos: list[dict[str, Any] | None] = []
    left = iter(traces)
    while len(infos) < len(traces):  # one that fails costs the others nothing
        with guard(protocol.IN_RESPONSES) as failing:
            common = _common_meta(groups)
            for trace in left:
                info = None if trace is None else trace.meta()
                if info is not None and common:
                    info.update(common)
                infos.append(info)
        if failing.failed:
            infos.append(None)
    return infos


def _common_meta(groups: GroupRegistry) -> dict[str, Any]:
    """What is said of every trace."""
    common: dict[str, Any] = {}
    if groups.calibration is not None:
        common[protocol.META_CALIBRATION] = groups.calibration.pair
    if groups.stopped is not None:
        common[protocol.META_STOPPED] = groups.stopped
    return common


@lru_cache(maxsize=4)
def _step_streamer(base: Any, state: SchedulerStep) -> type:
    groups, metrics = state.groups, state.metrics

    class StepOutputStreamer(base):  # type: ignore[misc]
        has_additional_customized_info = True

        def stream_output(
            self, reqs: list[Any], return_logprob: bool, skip_req: Any | None = None
        ) -> None:
            if groups.families:
                with guard(protocol.IN_RESPONSES):
                    if running := progress.due(reqs, skip_req):
                        super().stream_output([progress.Progress(req) for req in running], False)
                reqs = [req for req in reqs if not withheld(req)]
            super().stream_output(reqs, return_logprob, skip_req)

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            fields: dict[str, list[Any]] = super().build_additional_customized_info(reqs)
            traces = [trace_of(req) for req in reqs]
            for req, trace in zip(reqs, traces, strict=True):
                if not req.finished():
                    continue
                if trace is not None:
                    with guard(protocol.IN_RESPONSES):
                        trace.tokens = len(req.output_ids)
                        groups.end(trace, _status(req))
                        if trace.fate is TraceStatus.FINISHED:
                            state.lengths.finished(len(req.output_ids))
                            if trace.refills:
                                keep_source(state, req, trace)
                if metrics is not None and (trace or req.sampling_params.max_new_tokens):
                    with guard(protocol.IN_METRICS):
                        waited = req.time_stats.queue_duration_s
                        metrics.request_waited(waited, is_trace=trace is not None)
            if any(traces):
                fields[protocol.META_KEY] = metas(traces, groups)
            return fields

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == protocol.META_KEY or super().is_request_level_customized_info_key(key)

    return StepOutputStreamer
