"""Draws hostile sequences of actions from a seed. Sends nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

POOL = 6144  # KV tokens; what runs at once asks for several times as much
CHUNK = 256  # tokens of a prefill pass
RECENT = 6  # groups that a late member may join

WEIGHTS = (None, None, 1e-6, 0.1, 5, 1e6)
ANSWERS = r"[a-h ]{12,80}\\boxed\{[0-3]\}"
TOWERS = r"[a-h ]{12,40}\\boxed\{12\^\{9\^\{9\^[2-9]\}\}\}"


@dataclass(frozen=True)
class Setting:
    """Flags of a server, and which actions they make possible."""

    flags: tuple[str, ...] = ()
    priorities: bool = False
    updates: bool = False  # of the weights, in the middle
    towers: bool = False  # votes on answers that no two of can be compared
    refill: bool = False  # groups whose pruned traces give way to branches
    at_once: int = 24  # actions; the next one waits for the first of them that ends
    pool: int = POOL
    slots: int = 320  # running requests


SETTINGS = {
    "default": Setting(),
    "no-radix-cache": Setting(("--disable-radix-cache",)),
    "no-overlap": Setting(("--disable-overlap-schedule",)),
    "priorities": Setting(
        ("--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "5"),
        priorities=True,
        slots=100,
    ),
    "mixed-chunks": Setting(("--enable-mixed-chunk", "--chunked-prefill-size", "64")),
    "pages": Setting(("--page-size", "16")),
    "updates": Setting(updates=True, pool=4096),
    "towers": Setting(towers=True),
    "few-slots": Setting(slots=24, pool=2048),
    # A random model ends its thinking at any token, and needs steps to branch from. Nothing
    # branches while others wait, so few actions at once.
    "refill": Setting(
        ("--step-refill", "best", "--step-scope", "all"), refill=True, pool=3072, at_once=3
    ),
    "refill-pages": Setting(
        (
            *("--step-refill", "random", "--step-scope", "all", "--page-size", "16"),
            *("--disable-overlap-schedule", "--enable-priority-scheduling"),
        ),
        refill=True,
        priorities=True,
        slots=100,
        pool=3072,
        at_once=3,
    ),
    "refill-no-radix-cache": Setting(
        ("--step-refill", "best", "--step-scope", "all", "--disable-radix-cache"),
        refill=True,
        updates=True,
        pool=3072,
        at_once=3,
    ),
    "all-at-once": Setting(
        (
            *("--enable-mixed-chunk", "--chunked-prefill-size", "64", "--page-size", "16"),
            *("--disable-overlap-schedule", "--enable-priority-scheduling"),
        ),
        priorities=True,
        updates=True,
        slots=100,
    ),
}


@dataclass(frozen=True)
class Action:
    """One thing that happens to the server, completely described."""

    number: int
    kind: str  # a method of the actor
    after: float  # seconds since the action before it began
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return json.dumps(asdict(self))


# How often each kind is drawn, against the others.
KINDS = {
    "ordinary": 20,
    "group": 20,
    "join": 8,
    "vote": 8,
    "tower": 3,
    "named": 6,
    "leave": 6,
    "abort": 8,
    "long": 4,
    "session": 3,
    "same_rid": 3,
    "slow_reader": 2,
    "malformed": 2,
    "abort_all": 2,
    "flush": 4,
    "pause": 3,
    "update": 3,
}


def plan(seed: int, count: int, setting: Setting) -> list[Action]:
    """The same actions for the same arguments; every kind comes before any is drawn by chance."""
    draw = random.Random(seed)
    possible = {"update": setting.updates, "tower": setting.towers}
    kinds = {kind: share for kind, share in KINDS.items() if possible.get(kind, True)}
    first = list(kinds)
    draw.shuffle(first)
    rest = draw.choices(list(kinds), list(kinds.values()), k=max(0, count - len(first)))
    order = (first + rest)[:count]
    draw.shuffle(order)
    return list(_Planner(draw, setting).actions(order))


class _Planner:
    def __init__(self, draw: random.Random, setting: Setting) -> None:
        self._draw, self._setting = draw, setting
        self._groups: list[str] = []

    def actions(self, kinds: list[str]) -> Iterator[Action]:
        for number, kind in enumerate(kinds):
            after = self._draw.choice((0, 0, 0.02, 0.1, 0.3))
            yield Action(number, kind, after, getattr(self, f"_{kind}")(number))

    def _ordinary(self, number: int) -> dict[str, Any]:
        return {
            "prompt": self._draw.randint(10, 120),
            "tokens": self._draw.randint(8, 64),
            "form": self._form("generate", "stream", "chat"),
            **self._priority(),
        }

    def _group(self, number: int) -> dict[str, Any]:
        return self._traces(self._new_group(number), self._draw.choice((8, 8, 64)))

    def _join(self, number: int) -> dict[str, Any]:
        """Late members of a group, which may be running or long gone."""
        names = self._groups[-RECENT:]
        name = self._draw.choice(names) if names else self._new_group(number)
        return self._traces(name, self._draw.choice((1, 2, 8)))

    def _traces(self, name: str, n: int) -> dict[str, Any]:
        asked = {
            "name": name,
            "n": n,
            "prompt": self._draw.randint(10, 60),
            "tokens": self._draw.randint(20, 240),
            "form": self._form("generate", "chat", "members", *(() if n > 8 else ("stream",))),
            "step": self._claims(n),
            **self._priority(),
        }
        return self._refilled(asked, n) if asked["form"] != "stream" else asked

    def _vote(self, number: int) -> dict[str, Any]:
        n = self._draw.choice((3, 8, 24))
        members = {
            "traces": n,
            "vote": self._draw.choice(("calibrated", "weighted", "majority")),
            "early": self._draw.choice(("exact", "off")),
        }
        asked = {
            "name": self._new_group(number),
            "prompt": self._draw.randint(10, 60),
            "tokens": self._draw.randint(60, 140),
            "form": self._form("generate", "stream", "chat"),
            "step": {**members, **self._claims(n)},
            "regex": self._draw.choice((ANSWERS, ANSWERS, None)),
            "abort": self._draw.choice((None, None, None, 0.5)),
            **self._priority(),
        }
        return self._refilled(asked, n) if asked["regex"] is None else asked

    def _tower(self, number: int) -> dict[str, Any]:
        return {**self._vote(number), "regex": TOWERS}

    def _named(self, number: int) -> dict[str, Any]:
        """A trace that goes on in a second request: after its first, beside it, or as its twin."""
        return {
            "name": self._new_group(number),
            "mates": self._draw.choice((2, 8, 24)),
            "prompt": self._draw.randint(10, 60),
            "tokens": self._draw.randint(20, 120),
            "wait": self._draw.choice(("until it ended", "a moment", "not")),
            **self._priority(),
        }

    def _leave(self, number: int) -> dict[str, Any]:
        return {
            "name": self._new_group(number),
            "n": self._draw.choice((1, 8, 64)),
            "prompt": 40,
            "tokens": 400,
            "stream": self._draw.random() < 0.5,
            "patience": round(self._draw.uniform(0.05, 3), 2),
            **self._priority(),
        }

    def _abort(self, number: int) -> dict[str, Any]:
        return {
            "name": self._new_group(number),
            "n": self._draw.choice((1, 8, 64)),
            "prompt": 40,
            "tokens": 400,
            "stream": self._draw.random() < 0.5,
            "patience": round(self._draw.uniform(0, 3), 2),
            **self._priority(),
        }

    def _long(self, number: int) -> dict[str, Any]:
        """A prompt of several chunks."""
        n = self._draw.choice((1, 8))
        return {
            "name": self._new_group(number),
            "n": n,
            "prompt": self._draw.randint(600, 1200),
            "tokens": self._draw.randint(10, 60),
            "step": self._claims(n),
            **self._priority(),
        }

    def _session(self, number: int) -> dict[str, Any]:
        """Sessions whose turns are traces of one group."""
        return {
            "name": f"s{number}",
            "sessions": self._draw.choice((1, 4)),
            "turns": self._draw.choice((2, 3)),
            "tokens": self._draw.randint(10, 80),
            "close": self._draw.choice(("at the end", "in the last turn")),
        }

    def _same_rid(self, number: int) -> dict[str, Any]:
        return {"tokens": self._draw.randint(20, 80), "traces": self._draw.choice((None, None, 4))}

    def _slow_reader(self, number: int) -> dict[str, Any]:
        return {
            "name": self._new_group(number),
            "n": 64,
            "prompt": 30,
            "tokens": self._draw.randint(30, 60),
            "bytes": self._draw.randint(4, 10),
            "leaves": self._draw.random() < 0.3,
        }

    def _malformed(self, number: int) -> dict[str, Any]:
        return {
            "step": self._draw.choice(
                (
                    {"weight": 0},
                    {"min_survivors": 9},
                    {"trace": "t"},
                    {"traces": 0},
                    {"group": ""},
                    {"wieght": 1},
                    "yes",
                )
            )
        }

    def _abort_all(self, number: int) -> dict[str, Any]:
        return {}

    def _flush(self, number: int) -> dict[str, Any]:
        return {}

    def _pause(self, number: int) -> dict[str, Any]:
        mode = self._draw.choice(("in_place", "in_place", "retract", "retract", "abort"))
        return {"mode": mode, "seconds": round(self._draw.uniform(0.05, 1), 2)}

    def _update(self, number: int) -> dict[str, Any]:
        pause = self._draw.choice((None, "in_place", "retract"))
        # What runs keeps its memory in a pause in place, so that nothing can be flushed.
        return {"model": self._draw.randrange(2), "pause": pause, "flush": pause == "retract"}

    def _form(self, *forms: str) -> str:
        return self._draw.choice(forms)

    def _claims(self, n: int) -> dict[str, Any]:
        """Weight and minimum of a group of ``n``, where they are not the default."""
        minimum = self._draw.choice((None, None, 1, max(1, n // 2), n))
        settings = {"weight": self._draw.choice(WEIGHTS), "min_survivors": minimum}
        return {name: value for name, value in settings.items() if value is not None}

    def _refilled(self, asked: dict[str, Any], n: int) -> dict[str, Any]:
        """With a word on refill, where it may have one; else the server's setting holds."""
        step = asked["step"]
        if self._setting.refill and n > 1 and step.get("min_survivors", 1) < n:
            mode = self._draw.choice((None, None, "best", "random", "gambit", "off"))
            asked["step"] = step if mode is None else {**step, "refill": mode}
        return asked

    def _priority(self) -> dict[str, Any]:
        if not self._setting.priorities:
            return {}
        return {"priority": self._draw.choice((0, 0, 1, 10, 100))}

    def _new_group(self, number: int) -> str:
        self._groups.append(f"g{number}")
        return self._groups[-1]
