"""What the live page's feed costs a scheduler, on the CPU that runs it.

    python bench/feed_cost.py

While somebody looks, a scheduler is asked 5 times a second, whatever a decode step takes; so the
share of its time is five times that of one answer, and of what it notes in between. Requests are
plain objects with the members that are read; the traces, the feed and its encoding are the
server's own. While nobody looks, what is left is one look at an attribute for each scored step.
"""

from __future__ import annotations

import statistics
import time
import timeit
from types import SimpleNamespace

from step_sglang.live.hub import PERIOD
from step_sglang.patches.feed import _next_update
from step_sglang.patches.state import set_trace, trace_of
from step_sglang.pruning.groups import GroupRegistry

TOKENS_A_STEP = 100  # of text; shorter steps note more
TOKENS_A_SECOND = 50  # of each trace: 20 ms a decode step


def scheduler_of(traces: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    """A scheduler's members that the feed reads, with so many running traces in one group."""
    groups, reqs = GroupRegistry(), []
    for number in range(traces):
        req = SimpleNamespace(
            rid=f"request-{number}",
            output_ids=list(range(2000)),
            origin_input_ids=list(range(200)),
            kv=SimpleNamespace(cache_protected_len=200, kv_allocated_len=2200),
        )
        set_trace(req, groups.join("q", rid=req.rid, samples=traces))
        reqs.append(req)
    scheduler = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=reqs),
        waiting_queue=[],
        chunked_req=None,
        page_size=1,
        max_total_num_tokens=10**7,
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 1000),
    )
    return scheduler, SimpleNamespace(groups=groups)


def main() -> None:
    """Print a table."""
    print("| traces | an answer, ms | noting a step, us | share of the time, % |")
    print("|---|---|---|---|")
    for traces in (64, 256, 1024):
        scheduler, state = scheduler_of(traces)
        _next_update(scheduler, state)  # the first holds everything
        steps_a_period = int(traces * TOKENS_A_SECOND / TOKENS_A_STEP * PERIOD)
        answers, notes = [], []
        for _ in range(200):
            watcher = state.groups.watcher
            began = time.perf_counter()
            for req in scheduler.running_batch.reqs[:steps_a_period]:
                watcher.scored(trace_of(req), 1999, 0.5, req.output_ids)
            noted = time.perf_counter()
            _next_update(scheduler, state)
            answers.append(time.perf_counter() - noted)
            notes.append((noted - began) / steps_a_period)
        answer, note = statistics.median(answers), statistics.median(notes)
        share = (answer + note * steps_a_period) / PERIOD
        print(f"| {traces} | {1e3 * answer:.2f} | {1e6 * note:.1f} | {100 * share:.2f} |")
    groups = GroupRegistry()
    seconds = timeit.timeit(lambda: groups.watcher is not None, number=10**6) / 10**6
    print(f"nobody looks: {1e9 * seconds:.0f} ns a scored step, the call that measures it included")


if __name__ == "__main__":
    main()
