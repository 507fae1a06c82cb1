"""Runs mixed traffic against one server for some minutes, and judges what is left."""

from __future__ import annotations

import math
import re
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import requests

from tests.server.idle import free_tokens
from tests.server.launch import Server, serve
from tests.soak.memory import MemoryWatch, Slope
from tests.soak.tally import Tally
from tests.soak.traffic import CLIENTS, TIMEOUT, Client

POOL = 6144  # KV tokens; a quarter of what the clients ask for at once, see `demand`
JUDGED = 10  # minutes that a soak must last before growth is told from warming up
GROWTH, PER_HOUR = 16.0, 16.0  # MiB that a process may certainly have grown by in its second half
SHORT_GROWTH = 128.0  # the same of a shorter soak
FATE = re.compile(r"STEP (pruned|branched) rid='([^']*)' group='([^']*)'")
BAD_LINE = re.compile(r"traceback|exception|leak|error", re.IGNORECASE)
FINE_LINE = re.compile(
    r"Error: Request is disconnected from the client side"
    r"|socket\.send\(\) raised exception\."  # asyncio's, when a client went away
)


@dataclass
class Report:
    """Figures of one soak, and everything that was wrong."""

    minutes: float
    counts: Counter[str]
    demand: float  # of the pool: how many times as much was asked for, on average
    p50: float  # seconds, of ordinary requests
    p99: float
    slopes: list[Slope]
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.minutes:.1f} minutes, demand {self.demand:.1f} times the pool of {POOL} tokens",
            ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items())),
            f"ordinary requests: p50 {self.p50:.3f} s, p99 {self.p99:.3f} s",
            *(f"memory of {slope}" for slope in self.slopes),
            f"{len(self.problems)} problems",
            *self.problems[:50],
        ]
        return "\n".join(lines)


def soak(
    model: Path,
    scorer: Path | None,
    log: Path,
    *,
    minutes: float,
    seed: int = 0,
    flags: tuple[str, ...] = (),
) -> Report:
    """Serve ``model`` and send mixed traffic to it.

    Args:
        model: folder of the model.
        scorer: file of the scorer; None for a stock server, to compare with.
        log: where the server's log goes.
        minutes: how long requests are begun; the last ones are waited for.
        seed: of what the clients draw.
        flags: further flags of the server.
    """
    step = () if scorer is None else ("--enable-step", "--step-scorer", str(scorer))
    pool = ("--max-total-tokens", str(POOL), "--max-running-requests", "320")
    chunks = ("--chunked-prefill-size", "256")
    with serve(model, *step, *pool, *chunks, *flags, log=log) as server:
        free = free_tokens(server)
        said = server.log.stat().st_size  # starting up has its own noise
        tally = Tally(step=scorer is not None)
        started = time.monotonic()
        with MemoryWatch(server.process.pid) as watch:
            lost = _send(server, tally, seed, started + minutes * 60)
        seconds = time.monotonic() - started
        tally.problems += lost
        tally.problems += left_over(server, free, said, tally)
        slopes = watch.slopes(warm_up=seconds / 2)
        tally.problems += _growing(slopes, minutes)
        p50, p99 = _percentiles(tally)
        demand = tally.demand_seconds / seconds / POOL
        return Report(seconds / 60, tally.counts, demand, p50, p99, slopes, tally.problems)


def _send(server: Server, tally: Tally, seed: int, until: float) -> list[str]:
    """Let every client send until a moment; returns those that never came back."""
    threads = []
    for kind, number in CLIENTS:
        for i in range(number):
            client = Client(server.url, tally, f"{kind.__name__}-{i}", seed)
            threads.append(
                threading.Thread(target=client.run, args=(kind, until), name=f"{kind.__name__} {i}")
            )
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(max(0, until + TIMEOUT - time.monotonic()))
    return [
        f"lost: client {thread.name} is still waiting" for thread in threads if thread.is_alive()
    ]


def left_over(
    server: Server, free: int, said: int, tally: Tally, fine: re.Pattern[str] = FINE_LINE
) -> list[str]:
    """What the server has kept, or said, that it should not; ``fine`` lines of its log aside."""
    problems = []
    try:
        after = free_tokens(server)
        if after != free:
            problems.append(f"leaked: {free - after} of {free} free tokens did not return")
        if tally.step:
            state = server.info()["internal_states"][0]["step"]
            if any(state[k] for k in ("groups", "live_traces", "free_places", "failures")):
                problems.append(f"leaked or failed: {state}")
    except (AssertionError, requests.RequestException) as error:
        problems.append(f"not idle at the end: {error}\n{server.tail()}")
    if server.process.poll() is not None:
        problems.append(f"the server died\n{server.tail()}")
    return problems + in_the_log(server.log, said, tally, fine)


def _growing(slopes: list[Slope], minutes: float) -> list[str]:
    if not slopes:
        return ["no process lived long enough for its memory to be measured"]
    return [
        f"memory grows: {slope}"
        for slope in slopes
        if slope.growth_mib
        > (GROWTH + PER_HOUR * slope.hours if minutes >= JUDGED else SHORT_GROWTH)
    ]


def _percentiles(tally: Tally) -> tuple[float, float]:
    if len(tally.latencies) < 2:
        tally.problems.append(f"only {len(tally.latencies)} ordinary requests")
        return math.nan, math.nan
    cuts = statistics.quantiles(tally.latencies, n=100, method="inclusive")
    return cuts[49], cuts[98]


def in_the_log(log: Path, start: int, tally: Tally, fine: re.Pattern[str]) -> list[str]:
    """Lines after byte ``start`` that should not be there, and prunings that do not match."""
    problems = []
    pruned: Counter[str] = Counter()
    branched: Counter[str] = Counter()
    groups: dict[str, str] = {}
    with log.open(errors="replace") as lines:
        lines.seek(start)
        for line in lines:
            if found := FATE.search(line):
                (pruned if found[1] == "pruned" else branched)[found[2]] += 1
                groups[found[2]] = found[3]
            elif BAD_LINE.search(line) and not fine.search(line):
                problems.append(f"log: {line.rstrip()[:300]}")
    for rid, group in groups.items():
        ends = pruned[rid] - branched[rid]  # a branch takes the place of what was pruned there
        if ends not in (0, 1):
            problems.append(f"doubled: {rid} was pruned {pruned[rid]} times")
        # Whoever waits for a branch may be aborted, and is not answered as pruned then.
        known = tally.answered if branched else tally.pruned
        if ends and rid not in known and group not in tally.left:
            problems.append(f"lost: {rid} of {group} was pruned but never answered")
    problems += [f"pruned without a log line: {rid}" for rid in tally.pruned - pruned.keys()]
    return problems
