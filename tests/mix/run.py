"""Does a plan against one server, and judges what came back and what is left."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import requests

from tests.mix.actor import SILENCE, Actor
from tests.mix.oracle import MixTally
from tests.mix.plan import CHUNK, Action, Setting, plan
from tests.server.idle import free_tokens
from tests.server.launch import Server
from tests.soak.run import FINE_LINE, left_over

ENOUGH = 50  # problems
FINE = re.compile(
    FINE_LINE.pattern
    # The refusals that a plan provokes, and what SGLang says of an update or an abort.
    + r"|\[http_server\] Error: (custom_params\.step|Duplicate request ID detected: twin-)"
)


@dataclass(frozen=True)
class Outcome:
    """What a mix did, and everything that was wrong."""

    name: str  # of the setting
    seed: int
    actions: list[Action]
    tally: MixTally
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What must not be."""
        return self.tally.problems

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(self.tally.counts.items()))
        again = f"python -m tests.mix --setting {self.name} --seed {self.seed}"
        lines = [
            f"{again} --actions {len(self.actions)}: {self.seconds:.0f} s, {counts}",
            *self._waits(),
            f"{len(self.problems)} problems",
            *self.problems[:ENOUGH],
        ]
        if self.problems:
            lines += ["the actions were:", *map(str, self.actions)]
        return "\n".join(lines)

    def _waits(self) -> list[str]:
        waits = [(w, later) for w, later in self.tally.overtaken() if w.ask.kind == "ordinary"]
        if not waits:
            return []
        longest = max(wait.began - wait.came for wait, _ in waits)
        most = max(later for _, later in waits)
        return [f"ordinary requests waited at most {longest:.1f} s, overtaken by at most {most}"]


def flags(setting: Setting, scorer: Path) -> tuple[str, ...]:
    """Of a server for this setting."""
    return (
        *("--enable-step", "--step-scorer", str(scorer), "--enable-metrics"),
        *("--max-total-tokens", str(setting.pool), "--max-running-requests", str(setting.slots)),
        *("--chunked-prefill-size", str(CHUNK), *setting.flags),
    )


def mix(
    server: Server, models: Sequence[Path], name: str, setting: Setting, seed: int, count: int
) -> Outcome:
    """Do ``count`` actions of a seed against a server of this setting.

    Args:
        server: idle; it is idle again at the end.
        models: the server's own, and another of the same shape for updates of the weights.
        name: of the setting.
        setting: what the server was started with.
        seed: of the plan.
        count: actions.
    """
    actions = plan(seed, count, setting)
    free = free_tokens(server)
    said = server.log.stat().st_size
    tally = MixTally(step=True)
    started = time.monotonic()
    _act(server, models, tally, seed, actions, setting.at_once)
    seconds = time.monotonic() - started
    tally.problems += tally.judged()
    tally.problems += left_over(server, free, said, tally, FINE)
    return Outcome(name, seed, actions, tally, seconds)


def _act(
    server: Server,
    models: Sequence[Path],
    tally: MixTally,
    seed: int,
    actions: list[Action],
    at_once: int,
) -> None:
    turns = threading.Semaphore(at_once)
    running: dict[int, Action] = {}

    def act(action: Action) -> None:
        try:
            Actor(server.url, tally, seed, action, models).act()
        except Exception as error:
            tally.problems.append(f"{action}: {type(error).__name__} {str(error)[:300]}")
        finally:
            running.pop(action.number, None)
            turns.release()

    for action in actions:
        time.sleep(action.after)
        if not turns.acquire(timeout=SILENCE):
            break
        running[action.number] = action
        threading.Thread(target=act, args=(action,), daemon=True).start()
        if len(tally.problems) > ENOUGH or server.process.poll() is not None:
            break
    until = time.monotonic() + SILENCE
    while running and time.monotonic() < until:
        time.sleep(0.05)
    tally.problems += [f"lost: this has not ended: {action}" for action in [*running.values()]]
    if server.process.poll() is None:
        requests.post(f"{server.url}/continue_generation", json={}, timeout=60)
