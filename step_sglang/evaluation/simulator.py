"""A model of the scheduler: a page allocator, running and waiting requests, one token a step.

It calls the real policy in the order of the engine's hooks: first it admits waiting requests, for
which it makes room, then it makes room for the next decode step. Prompts are not shared here: the
caller subtracts a shared one from the pool.

Most steps are quiet: nobody arrives, starts, is pruned or ends. How many follow one another is
known beforehand, so they are passed at once; the outcome is that of one after the other.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from step_sglang.config import StepConfig
from step_sglang.pruning.admission import (
    NEW,
    ORDINARY,
    GroupDemand,
    GroupLimit,
    Line,
    TraceLengths,
    Turns,
    line_of_running,
)
from step_sglang.pruning.groups import Group
from step_sglang.pruning.policy import (
    Candidates,
    GroupView,
    TraceView,
    above_watermark,
    watermark,
)

# SGLang 0.5.23: the share of a request's possible output that admission reserves, see `Reserve`.
_INIT_RATIO, _MIN_RATIO, _DECAY_STEPS, _CLIP, _RETRACT_STEPS = 0.7, 0.7 * 0.14, 600, 4096, 20


class ScoreEvent(NamedTuple):
    """A recorded step score, and when it is known."""

    generated: int  # tokens that the trace must have before the score is known
    score: float


class DecodeStep(NamedTuple):
    """A decode step, or several of the same requests one after the other."""

    running: int  # requests in the batch
    tokens: int  # KV tokens that they hold; in the first of several
    prefilled: int  # tokens computed for those who started just before
    steps: int = 1

    @property
    def attended(self) -> int:
        """KV tokens that the requests hold, summed over the steps."""
        more = self.running * (self.steps - 1)  # of the last
        return self.steps * self.tokens + self.steps * more // 2


@dataclass(eq=False)
class Request:
    """A trace, or an ordinary request (without a group).

    ``steps``: its step scores, in order; None draws them at random. ``rank`` returns the score sum
    and the number of steps to rank it by; None ranks it by its step scores.
    """

    arrival: int  # step
    prompt: int  # tokens of its own
    length: int  # tokens it will generate
    group: Group | None = None
    generated: int = 0
    score_sum: float = 0.0
    num_steps: int = 0
    started: int | None = None
    retractions: int = 0
    fate: str = "waiting"
    steps: Sequence[ScoreEvent] | None = None
    rank: Callable[[Request], tuple[float, int]] | None = None
    queued: int = 0  # step at which it began to wait
    waited: int = 0  # steps
    ended: int = 0  # steps until then

    @property
    def tokens(self) -> int:
        """KV tokens that it holds."""
        return self.prompt + self.generated

    @property
    def prunable(self) -> bool:
        """Whether its group may lose a trace."""
        return self.group is not None and self.group.prunable


@dataclass
class Reserve:
    """The KV that SGLang's admission reserves for requests that cannot be pruned.

    It is a share of what each may still generate. The share falls with every decode step; a
    retraction sets it anew, from what the running requests have decoded.
    """

    max_new_tokens: int
    ratio: float = _INIT_RATIO
    unit: int = 1  # real tokens that one of the model stands for

    def future(self, request: Request) -> int:
        """Tokens that it may still generate, up to SGLang's limit for this estimate."""
        return min(max(self.max_new_tokens - request.generated, 0), _CLIP // self.unit)

    @property
    def _decay(self) -> float:
        return self.unit * (_INIT_RATIO - _MIN_RATIO) / _DECAY_STEPS

    def decay(self, steps: int = 1) -> None:
        """Decode steps passed."""
        self.ratio = max(self.ratio - steps * self._decay, _MIN_RATIO)

    def retracted(self, running: Sequence[Request]) -> None:
        """A request was retracted; ``running`` are left."""
        decoded = sum(r.generated + _RETRACT_STEPS / self.unit for r in running)
        self.ratio = min(1.0, decoded / (self.max_new_tokens * len(running) + 1))


@dataclass
class Simulator:
    """A server.

    ``reserve`` None: admission knows how long each request will be. ``limit`` None: all groups may
    run at once.
    """

    pool: int  # tokens
    page: int
    config: StepConfig
    seed: int = 0
    step_length: int = 10  # tokens between two random scores
    reserve: Reserve | None = None
    running: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    ended: list[Request] = field(default_factory=list)
    pruned: Counter[str] = field(default_factory=Counter)  # by reason
    now: int = 0
    history: list[DecodeStep] = field(default_factory=list)
    limit: GroupLimit | None = None
    # Whom the caller ends early, because these requests finished in one step.
    ended_by: Callable[[Sequence[Request]], Sequence[Request]] | None = None
    turns: Turns = field(default_factory=Turns)
    lengths: TraceLengths = field(default_factory=TraceLengths)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._fresh: list[Request] = []  # admitted in this step
        self._held = 0  # KV tokens of the running, not in whole pages
        self._foreseen = False  # all scores are known beforehand
        self._grouped = False  # any request has a group
        # One was refused. SGLang then tries nobody until a request leaves (`batch_is_full`).
        self._full = False
        self._kv_limit = watermark(self.pool, self.config.prune_at)

    def run(self, arrivals: list[Request], max_steps: int = 20_000) -> None:
        """Serve requests until all have ended."""
        queue = sorted(arrivals, key=lambda r: r.arrival)
        self._foreseen = all(r.steps is not None for r in arrivals)
        self._grouped = any(r.group is not None for r in arrivals)
        while queue or self.waiting or self.running:
            while queue and queue[0].arrival <= self.now:
                request = queue.pop(0)
                if request.group is not None:
                    request.group.live += 1
                self._wait(request)
            self._admit()
            self._decode()
            self.now += 1
            self._pass(self._quiet(queue[0].arrival if queue else None))
            assert self.now < max_steps, "a request starves"

    def _wait(self, request: Request) -> None:
        request.queued = self.now
        self.waiting.append(request)
        if self.config.makes_room and self._grouped:
            self._full = False  # memory that a trace holds may be room for it

    def pages(self, tokens: int) -> int:
        """Tokens in whole pages."""
        return tokens if self.page == 1 else -(-tokens // self.page) * self.page

    @property
    def free(self) -> int:
        """Free KV tokens."""
        if self.page == 1:
            return self.pool - self._held
        return self.pool - sum(self.pages(r.tokens) for r in self.running)

    def _worst(self) -> TraceView | None:
        """The next victim. Only the group that gives it is looked at closely."""
        largest = None
        if self.config.policy != "paper":
            held: dict[Group, int] = {}
            for r in self.running:
                if r.group is not None:
                    tokens = r.prompt + r.generated
                    held[r.group] = held.get(r.group, 0) + self.pages(tokens)
            able = [group for group in held if group.prunable]
            if not able:
                return None
            largest = max(able, key=lambda g: (held[g] / g.weight, g.group_id))
        return self._views(largest).take()

    def _views(self, only: Group | None = None) -> Candidates:
        members: dict[str, list[TraceView]] = {}
        groups: dict[str, Group] = {}
        for i, r in enumerate(self.running):
            if r.group is not None and (only is None or r.group is only):
                self._know(r)
                groups[r.group.group_id] = r.group
                members.setdefault(r.group.group_id, []).append(
                    TraceView(
                        i,
                        self.pages(r.tokens),
                        r.generated,
                        *(r.rank(r) if r.rank else (r.score_sum, r.num_steps)),
                    )
                )
        return Candidates(
            [
                GroupView(n, g.survivors, g.min_survivors, g.weight, members[n])
                for n, g in groups.items()
            ],
            self.config,
        )

    def _prune(self, victims: list[TraceView], reason: str) -> None:
        for request in [self.running[v.handle] for v in victims]:
            assert request.prunable, "an ordinary request, or one below min_survivors"
            self._end(request, "pruned")
            self.pruned[reason] += 1

    def _end(self, request: Request, fate: str) -> None:
        self._know(request)
        self._leave(request)
        self.ended.append(request)
        request.fate, request.ended = fate, self.now + (fate in ("finished", "cancelled"))
        if request.group is not None:
            request.group.live -= 1
            request.group.finished += fate == "finished"
        if fate == "finished":
            self.lengths.finished(request.generated)

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self._held -= request.tokens
        self._full = False

    def _admit(self) -> None:
        self._fresh = []
        if not self.waiting:
            self.turns.order(())
            return
        if self._full:
            return
        tried = self._tried()
        for place, (request, line) in enumerate(tried):
            if not self._start(request):
                if not self.turns.refused(line):
                    self._full = bool(self.running)
                elif not place:
                    self._admit()  # as in the next pass, in which another line comes first
                return
            self.turns.admitted([line])
            self.waiting.remove(request)
            self._held += request.tokens
            request.started = self.now if request.started is None else request.started
            request.waited += self.now - request.queued
            if request.group is not None:
                request.group.began = True
            self.running.append(request)
            self._fresh.append(request)

    def _tried(self) -> list[tuple[Request, Line]]:
        """Who may start now, by turn, and the line of each."""
        if not self._grouped:
            return [(request, ORDINARY) for request in self.waiting]
        held: Counter[Group] = Counter()
        for r in self.running:
            if r.group is not None:
                held[r.group] += self.pages(r.tokens)
        late = self._late_groups(held)
        waiting = [r for r in self.waiting if r.group not in late]

        def line(r: Request) -> Line:
            if r.group is None:
                return ORDINARY
            tokens = held[r.group]
            if not tokens:
                return NEW
            return line_of_running(r.group.group_id, tokens / r.group.weight)

        lines = [line(r) for r in waiting]
        order = self.turns.order(lines) if self.config.makes_room else range(len(waiting))
        return [(waiting[place], lines[place]) for place in order]

    def _late_groups(self, held: Counter[Group]) -> set[Group]:
        """Groups that must not begin yet."""
        if self.limit is None:
            return set()
        began = {r.group: r for r in self.running if r.group is not None}
        late: dict[Group, Request] = {}
        for r in self.waiting:
            if r.group is not None and r.group not in began:
                (began if r.group.began else late).setdefault(r.group, r)

        def demands(groups: dict[Group, Request]) -> list[GroupDemand]:
            return [
                GroupDemand(
                    group.live,
                    group.min_survivors,
                    group.weight,
                    self.lengths.expected(self.reserve.max_new_tokens if self.reserve else r.length)
                    + r.prompt,
                    held=held[group],
                )
                for group, r in groups.items()
            ]

        pool = self.pool if self._kv_limit is None else self._kv_limit
        number = self.limit.may_begin(demands(began), demands(late), pool)
        return set(list(late)[number:])

    def _start(self, request: Request) -> bool:
        need = self.pages(request.tokens) + self.page
        if not request.prunable:
            reserved = self._reserved()
            future = self._future(request)
            credit = 0
            if self.config.makes_room and self._grouped:
                credit = self._views().reclaimable()
            # A request that can never fit beside a reservation may still have an empty pool.
            if need + future > self.free + credit - reserved and self.running:
                return False
        if self.free >= need:
            return True
        if not self.config.makes_room:
            return False
        mine, candidates = request.group, self._views()
        kv_share = need + (candidates.held(mine.group_id) if mine else 0)
        victims = candidates.reclaim(kv_share / (mine.weight if mine else 1.0), need - self.free)
        self._prune(victims, "admission")
        return self.free >= need

    def _future(self, request: Request) -> int:
        if self.reserve is None:
            return request.length - request.generated
        return self.reserve.future(request)

    def _reserved(self) -> float:
        """For all running requests that cannot be pruned."""
        running = self.running
        if self._grouped:
            running = [r for r in running if not r.prunable]
        if self.reserve is None:
            return sum([r.length - r.generated for r in running])
        most, clip = self.reserve.max_new_tokens, _CLIP // self.reserve.unit
        future = sum([min(most - r.generated, clip) for r in running])
        # In full for those admitted in this step.
        fresh = sum(self._future(r) for r in self._fresh if not r.prunable)
        return self.reserve.ratio * (future - fresh) + fresh

    def _decode(self) -> None:
        prefilled = sum(r.tokens + 1 for r in self._fresh)
        while self._above():
            victim = self._worst()
            if victim is None:
                break
            self._prune([victim], "watermark")
        retracted = False
        while self._needed() > self.free:
            victim = self._worst()
            if victim is None:
                self._retract()
                retracted = True
                continue
            self._prune([victim], "decode")
        self.history.append(DecodeStep(len(self.running), self._held, prefilled))
        if self.reserve is not None and not retracted:
            self.reserve.decay()
        for request in self.running:
            request.generated += 1
            if not self._foreseen:
                self._score(request)
        self._held += len(self.running)
        finished = [r for r in self.running if r.generated >= r.length]
        for request in finished:
            self._end(request, "finished")
        if finished and self.ended_by is not None:
            for request in self.running:
                self._know(request)
            for request in self.ended_by(finished):
                self._cancel(request)
        assert self.free >= 0

    def _quiet(self, arrival: int | None) -> int:
        """Decode steps to come in which nobody arrives, starts, is pruned or ends."""
        running = self.running
        if not running or not self._foreseen:
            return 0
        if self.waiting and not self._full:
            return 0  # one may start
        steps = min(r.length - r.generated for r in running) - 1
        if arrival is not None:
            steps = min(steps, arrival - self.now)
        steps = min(steps, self._fitting(self.free, len(running)))
        if self._kv_limit is not None:
            held = [self.pages(r.tokens) for r in running if r.group is not None]
            if held:
                steps = min(steps, self._fitting(self._kv_limit - sum(held), len(held)))
        return max(0, steps)

    def _fitting(self, tokens: int, requests: int) -> int:
        """Steps for which so many KV tokens surely suffice."""
        return tokens // (self.page * requests) * self.page

    def _pass(self, steps: int) -> None:
        if not steps:
            return
        self.history.append(DecodeStep(len(self.running), self._held, 0, steps))
        if self.reserve is not None:
            self.reserve.decay(steps)
        for request in self.running:
            request.generated += steps
        self._held += steps * len(self.running)
        self.now += steps

    def _above(self) -> int:
        if self._kv_limit is None:
            return 0
        tokens = (self.pages(r.tokens + 1) for r in self.running if r.group is not None)
        return above_watermark(tokens, self._kv_limit)

    def _cancel(self, request: Request) -> None:
        if request in self.running:
            self._end(request, "cancelled")
        elif request in self.waiting:
            self.waiting.remove(request)
            request.waited += self.now - request.queued
            self.ended.append(request)
            request.fate, request.ended = "cancelled", self.now + 1
            if request.group is not None:
                request.group.live -= 1

    def _know(self, request: Request) -> None:
        """Scores that are foreseen are added up only when somebody asks."""
        if self._foreseen:
            self._score(request)

    def _score(self, request: Request) -> None:
        if request.steps is not None:
            known = request.num_steps
            while known < len(request.steps) and request.steps[known].generated <= (
                request.generated
            ):
                request.score_sum += request.steps[known].score
                known += 1
            request.num_steps = known
        elif request.generated % self.step_length == 0:
            request.num_steps += 1
            request.score_sum += self.random.random()

    def _needed(self) -> int:
        if self.page == 1:
            return len(self.running)
        return sum(self.page for r in self.running if r.tokens % self.page == 0)

    def _retract(self) -> None:
        """As SGLang does when nothing may be pruned: a request is queued again and starts over."""
        assert len(self.running) > 1, "the pool is too small for one request"
        request = min(self.running, key=lambda r: r.generated)
        self._leave(request)
        request.retractions += 1
        self._wait(request)
        if self.reserve is not None:
            self.reserve.retracted(self.running)
