"""Decides which traces to prune. Knows nothing of SGLang or torch: views in, victims out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from step_sglang.config import StepConfig


class TraceView(NamedTuple):
    """What the policy sees of one running trace; a tuple, because thousands are made at a time."""

    handle: int  # the caller's own, returned for a victim
    kv_tokens: int  # KV tokens that pruning it frees
    length: int  # generated tokens
    score_sum: float
    num_steps: int


@dataclass(frozen=True, slots=True)
class GroupView:
    """What the policy sees of one group: at least one running trace that may be pruned at all."""

    group: str
    survivors: int  # at this moment; also those that wait or have finished
    min_survivors: int  # it is never left with fewer
    weight: float  # of its kv_share to the pool, against the other groups'
    traces: Sequence[TraceView]
    min_steps: int | None = None  # before a score counts; None: the server's setting


def watermark(pool: int, prune_at: float) -> int | None:
    """KV tokens that all groups may hold together; None: whatever the pool has.

    Only what pruning can free counts, so neither ordinary requests nor prompts that traces share.

    Args:
        pool: its KV tokens.
        prune_at: the share of it, of the server's settings.
    """
    return None if prune_at >= 1 else int(pool * prune_at)


def above_watermark(next_tokens: Iterable[int], limit: int) -> int:
    """KV tokens by which groups would exceed their limit in the next decode step; 0 if they do not.

    Args:
        next_tokens: of every running trace that memory may be taken from, the KV tokens that
            pruning it would free after that step.
        limit: see :func:`watermark`.
    """
    return max(0, sum(next_tokens) - limit)


class Donors(ABC):
    """Which group gives the next victim; whoever derives from it knows that group's worst trace.

    Args:
        weights: of the groups.
        held: KV tokens of their running traces.
        allowed: how many traces each may lose.
    """

    def __init__(
        self, weights: Mapping[str, float], held: dict[str, int], allowed: dict[str, int]
    ) -> None:
        self._weights, self._held, self._allowed = weights, held, allowed

    def take(self) -> TraceView | None:
        """Take the next victim out; None when the rules allow none."""
        name = self._largest()
        return None if name is None else self._take_from(name)

    def take_until(self, tokens: int, group: str | None = None) -> list[TraceView]:
        """Take victims out until they free ``tokens`` KV tokens, or no more are allowed.

        At least one, where one is allowed: what is missing may be other than tokens. ``group``:
        of that one alone.
        """
        victims: list[TraceView] = []
        freed = 0
        while not victims or freed < tokens:
            if group is None:
                victim = self.take()
            else:
                victim = self._take_from(group) if self._allowed.get(group, 0) > 0 else None
            if victim is None:
                break
            victims.append(victim)
            freed += victim.kv_tokens
        return victims

    def _largest(self) -> str | None:
        """The group that holds the most KV per weight, of those that may lose a trace."""
        # The name settles a tie, so that the choice depends on nothing but the views.
        name, most = None, (-1.0, "")
        for group, allowed in self._allowed.items():
            if allowed > 0:
                held = (self._held[group] / self._weights[group], group)
                if held > most:
                    name, most = group, held
        return name

    def _take_from(self, name: str) -> TraceView:
        victim = self._worst_of(name)
        self._held[name] -= victim.kv_tokens
        self._allowed[name] -= 1
        return victim

    @abstractmethod
    def _worst_of(self, name: str) -> TraceView:
        """Take a group's worst trace out."""


class Candidates(Donors):
    """The running traces at one moment, handed out as victims, worst first.

    A caller takes victims until there is room; what a victim frees beyond its own pages, only the
    engine can tell.

    Args:
        groups: every group once, every trace handle once.
        config: the server's settings.
    """

    def __init__(self, groups: Sequence[GroupView], config: StepConfig) -> None:
        self._config = config
        self._groups = {view.group: view for view in groups}
        super().__init__(
            {view.group: view.weight for view in groups},
            {view.group: sum(t.kv_tokens for t in view.traces) for view in groups},
            {
                view.group: min(view.survivors - view.min_survivors, len(view.traces))
                for view in groups
            },
        )
        self._ranked: dict[str, list[TraceView]] = {}
        self._all: list[TraceView] | None = None  # paper: all traces, worst last

    def held(self, group: str) -> int:
        """KV tokens that the group's remaining traces hold; 0 for a group without any."""
        return self._held.get(group, 0)

    def reclaimable(self) -> int:
        """KV tokens that pruning can free for certain, whichever traces turn out the worst."""
        total = 0
        for name, allowed in self._allowed.items():
            if allowed > 0:
                # Those handed out already are the last of a ranked list; they are gone from it.
                traces = self._ranked.get(name, self._groups[name].traces)
                total += sum(sorted(t.kv_tokens for t in traces)[:allowed])
        return total

    def take(self) -> TraceView | None:
        """Take the next victim out; None when the rules allow none."""
        return self._take_of_all() if self._config.policy == "paper" else super().take()

    def reclaim(self, kv_share: float, tokens: int) -> list[TraceView]:
        """Take victims out for somebody who asks for room, who then holds no more than any donor.

        Args:
            kv_share: KV tokens per weight that the requester would hold. A group gives a trace
                only if it still holds as much without it.
            tokens: KV tokens to free.

        Returns:
            Victims that free ``tokens`` together; none, and nothing taken, where the rules do not
            allow that many.
        """
        taken: list[tuple[str, TraceView]] = []
        freed = 0
        while freed < tokens:
            name = self._largest()
            if name is None or self._held_without_worst(name) < kv_share:
                for group, victim in reversed(taken):
                    self._put_back(group, victim)
                return []
            victim = self._take_from(name)
            taken.append((name, victim))
            freed += victim.kv_tokens
        return [victim for _, victim in taken]

    def _rank(self, name: str) -> list[TraceView]:
        ranked = self._ranked.get(name)
        if ranked is None:
            view = self._groups[name]
            ranked = worst_last(view.traces, view.min_steps or self._config.min_steps)
            self._ranked[name] = ranked
        return ranked

    def _held_without_worst(self, name: str) -> float:
        return (self._held[name] - self._rank(name)[-1].kv_tokens) / self._weights[name]

    def _worst_of(self, name: str) -> TraceView:
        return self._rank(name).pop()

    def _put_back(self, name: str, victim: TraceView) -> None:
        self._ranked[name].append(victim)
        self._held[name] += victim.kv_tokens
        self._allowed[name] += 1

    def _take_of_all(self) -> TraceView | None:
        """The lowest score of all traces whatever their group, unscored = 0, one trace left."""
        if self._all is None:
            self._all = worst_last(
                [trace for view in self._groups.values() for trace in view.traces], 1, 0.0
            )
        return self._all.pop() if len(self._all) > 1 else None


def choose_victims(
    groups: Sequence[GroupView], tokens_needed: int, config: StepConfig
) -> list[int]:
    """Choose traces to prune, worst first, until enough KV is freed.

    Args:
        groups: as for :class:`Candidates`.
        tokens_needed: KV tokens to free.
        config: the server's settings.

    Returns:
        Handles in the order to prune. They free ``tokens_needed`` tokens, or are every victim
        that the rules allow.
    """
    victims = Candidates(groups, config).take_until(tokens_needed)
    return [victim.handle for victim in victims]


def worst_last(
    traces: Sequence[TraceView], min_steps: int, unscored: float | None = None
) -> list[TraceView]:
    """Traces sorted by trace score, worst last; of equals the longest last.

    A trace with fewer than ``min_steps`` steps has no trustworthy score and ranks as ``unscored``,
    or as the mean of those that have one.
    """
    if unscored is None:
        scores = [t.score_sum / t.num_steps for t in traces if t.num_steps >= min_steps]
        unscored = sum(scores) / len(scores) if scores else 0.0
    default = unscored

    def key(trace: TraceView) -> tuple[float, int, int]:
        score = trace.score_sum / trace.num_steps if trace.num_steps >= min_steps else default
        return (-score, trace.length, trace.handle)

    return sorted(traces, key=key)
