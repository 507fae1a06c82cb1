"""What STEP's own code takes of a scheduler step, by the number of traces and by their length.

SGLang's real requests, batch, allocator and tables, without a model: STEP's hooks are called on
them in the order of a decode step, as the scheduler calls them, with results of which every 64th
row ended a step. Timed is what a hook takes; what it has SGLang do for a victim (release its
memory, filter the batch, send the answer) is left out. With `--prune` the pool is full, and a trace
is pruned as often as that makes it necessary.

    python bench/scheduler_cost.py --traces 64 256 1024 --tokens 1000 30000 --prune
"""

from __future__ import annotations

import argparse
import logging
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

PROMPT = 100  # tokens, shared by all
BETWEEN = 64  # tokens between two boundary tokens of a trace


@dataclass
class Stopwatch:
    """Seconds of CPU time of this step, without those of SGLang's own work."""

    own: float = 0.0
    others: float = 0.0

    def leave_out(self, owner: Any, name: str) -> None:
        """Do not count what a function takes that a hook calls."""
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.others += time.thread_time() - started

        setattr(owner, name, call)

    def run(self, hook: Any, *args: Any) -> None:
        """Count what a hook takes."""
        self.others, started = 0.0, time.thread_time()
        hook(*args)
        self.own += time.thread_time() - started - self.others


class Rig:
    """A scheduler's objects around STEP's hooks.

    Args:
        traces: of one group.
        tokens: that each has generated.
        room: KV tokens that are free; None: more than will be used.
        prune_at: share of the pool that the group asked for; 1: all.
    """

    def __init__(self, traces: int, tokens: int, room: int | None, prune_at: float = 1.0) -> None:
        from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
        from sglang.srt.sampling.sampling_params import SamplingParams

        from step_sglang.baselines import EngineContext
        from step_sglang.config import StepConfig
        from step_sglang.patches import forward
        from step_sglang.patches.state import SchedulerStep, set_state, set_trace
        from step_sglang.pruning.groups import GroupRegistry
        from step_sglang.pruning.log import PruningLog

        held = traces * (tokens + PROMPT)
        pool = held + (traces * 4000 if room is None else room)
        self.allocator = TokenToKVPoolAllocator(pool, torch.bfloat16, "cpu", None, False)
        self.allocator.free_pages = self.allocator.free_pages[held:]
        groups = GroupRegistry()
        config = StepConfig("scorer")
        slots: Any = SimpleNamespace(think_end_id=7, captures=False)
        context = EngineContext(frozenset({5}), 7, lambda text: {})
        log = PruningLog(each=False)
        self.state = SchedulerStep(config, slots, context, 8, torch.bfloat16, groups, log)
        params = SamplingParams(max_new_tokens=10**6)
        prompt = array("q", range(PROMPT))
        self.reqs = []
        draw = np.random.default_rng(0)
        for index in range(traces):
            req = Req(f"r{index}", "", prompt, params)
            req.output_ids = array("q", [9]) * (tokens + index % BETWEEN)
            req.kv.req_pool_idx = index + 1
            req.kv.kv_committed_len = req.kv.kv_allocated_len = PROMPT + len(req.output_ids)
            req.kv.cache_protected_len = PROMPT
            trace = groups.join("g", samples=traces, prune_at=prune_at)
            for step in range(1, tokens // BETWEEN + 1):
                trace.score_sum, trace.num_steps = float(draw.random()) * step, step
            trace.group.scored = True
            set_trace(req, trace)
            self.reqs.append(req)
        self.batch = ScheduleBatch(reqs=list(self.reqs))
        self.batch.token_to_kv_pool_allocator = self.allocator
        self.batch.filter_batch = self._filter  # type: ignore[method-assign]
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        self.batch.spec_algorithm = SpeculativeAlgorithm.NONE
        cache = SimpleNamespace(supports_prefix_sharing=lambda: False)
        self.batch.tree_cache = cache  # type: ignore[assignment]
        self.scheduler = SimpleNamespace(
            enable_skip_finishing_decode=True,
            result_queue=[(self.batch, None)],
            running_batch=self.batch,
            waiting_queue=[],
            grammar_manager=SimpleNamespace(has_waiting_grammars=lambda: False),
            enable_priority_preemption=False,
            is_hybrid_swa=False,
            attn_tp_group=SimpleNamespace(world_size=1),
            tree_cache=cache,
            max_total_num_tokens=pool,
            output_streamer=SimpleNamespace(stream_output=lambda reqs, *_: None),
        )
        self.scheduler._reqs_finishing_inflight = self._finishing
        set_state(self.scheduler, self.state)
        forward.activate(slots, groups, None, alone=True)
        self.watch = Stopwatch()
        self.pruned = 0
        self._leave_sglang_out()

    def _leave_sglang_out(self) -> None:
        self.watch.leave_out(self.batch, "filter_batch")
        self.watch.leave_out(self.scheduler.output_streamer, "stream_output")

    def _finishing(self, batch: Any) -> Any:
        from sglang.srt.managers.scheduler import Scheduler

        return Scheduler._reqs_finishing_inflight(self.scheduler, batch)

    def _filter(self, *_: Any, **__: Any) -> None:
        left = [req for req in self.batch.reqs if not req.finished()]
        self.pruned += len(self.batch.reqs) - len(left)
        self.batch.reqs = left

    def release(self, req: Any, *_: Any, **__: Any) -> None:
        """In the place of `release_kv_cache`: as many tokens come free."""
        started = time.thread_time()
        freed = req.kv.kv_allocated_len - req.kv.cache_protected_len
        pages = self.allocator.free_pages
        self.allocator.free_pages = torch.cat((pages, torch.zeros(freed, dtype=pages.dtype)))
        self.watch.others += time.thread_time() - started

    def step(self, number: int) -> float:
        """Seconds of STEP's own code in one decode step."""
        from step_sglang.patches import forward, pruning, queue

        self.watch.own = 0.0
        self.watch.run(queue.get_new_batch_prefill, lambda *_: None, self.scheduler, self.batch)
        self.watch.run(pruning.update_running_batch, self.scheduler, self.batch)
        reqs = self.batch.reqs
        # What SGLang does: memory for a token each, the pass, and the results.
        self.allocator.free_pages = self.allocator.free_pages[len(reqs) :]
        values = torch.full((len(reqs), 1, 2), torch.nan)
        for req in reqs:
            req.kv.kv_allocated_len += 1
            req.kv.kv_committed_len += 1
            req.output_ids.append(9)
        ended = [i for i, req in enumerate(reqs) if len(req.output_ids) % BETWEEN == 0]
        values[ended, 0, 0] = 0.5
        commits = [SimpleNamespace(output_index=len(r.output_ids) - 1, token_ids=[9]) for r in reqs]
        output = forward.StepHostOutput(values, None, None, (), None)
        self.watch.run(output.consume, self.batch, commits)
        self.watch.run(
            _stream, self.state, [r for i, r in enumerate(reqs) if i % 16 == number % 16]
        )
        return self.watch.own


def _stream(state: Any, reqs: list[Any]) -> None:
    """What STEP adds where every trace is streamed, every 16 tokens."""
    from step_sglang.patches.state import trace_of
    from step_sglang.patches.streaming import metas

    metas([trace_of(req) for req in reqs], state.groups)


def measure(
    traces: int, tokens: int, steps: int, *, prune: bool, prune_at: float = 1.0
) -> tuple[np.ndarray, int]:
    """Seconds of every step, and how many traces were pruned."""
    from sglang.srt.mem_cache import common

    original = common.release_kv_cache
    rig = Rig(traces, tokens, room=traces * 2 if prune else None, prune_at=prune_at)
    common.release_kv_cache = rig.release
    try:
        for number in range(10):
            rig.step(number)
        return np.asarray([rig.step(number) for number in range(steps)]), rig.pruned
    finally:
        common.release_kv_cache = original


def prepare() -> None:
    """What SGLang's objects ask the process for."""
    from sglang.srt.runtime_context import get_context
    from sglang.srt.server_args import ServerArgs

    with suppress(Exception):
        get_context().set_server_args(ServerArgs(model_path="none", device="cpu"))


def main() -> None:
    """Print a row per number of traces and length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1000, 30_000])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--prune", action="store_true")
    options = parser.parse_args()
    logging.getLogger("step_sglang").setLevel(logging.WARNING)
    prepare()
    print("| traces | tokens each | pruned | median, ms | 99 %, ms | most, ms |")
    print("|---|---|---|---|---|---|")
    for traces in options.traces:
        for tokens in options.tokens:
            seconds, pruned = measure(traces, tokens, options.steps, prune=options.prune)
            half, late, most = 1e3 * np.percentile(seconds, [50, 99, 100])
            print(
                f"| {traces} | {tokens:,} | {pruned} | {half:.3f} | {late:.3f} | {most:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
