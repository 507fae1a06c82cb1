"""From what a user asks `simulate` for to what is simulated, and the simulation in its order.

Everything is checked before anything runs. Prints nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from step_sglang import __version__
from step_sglang.errors import nearest
from step_sglang.evaluation.cost_model import CostModel
from step_sglang.evaluation.fitted_prices import FittedPrices, fitted_prices
from step_sglang.evaluation.methods import METHODS
from step_sglang.evaluation.modelled import MODELLED, for_model, model_outcomes
from step_sglang.evaluation.simulated import OutcomeKey, OutcomeWriter, SimulatedOutcome
from step_sglang.evaluation.simulation_input import (
    GENERATED,
    Generated,
    Invention,
    LengthFile,
    Recorded,
    Source,
)
from step_sglang.evaluation.traces import TRACES
from step_sglang.simulation.errors import SimulationError
from step_sglang.simulation.gpu import StepTime, gpu_named, kv_pool, network_named, step_time
from step_sglang.simulation.played import PlayedGroup
from step_sglang.simulation.speed import Speed
from step_sglang.simulation.synthetic import Ranking

DEFAULT_METHODS = "sc,sc-early,random,longest,step,step-early,step-balanced,step-fast"
MODEL, SGLANG = "model", "sglang"
SCHEDULERS = (MODEL, SGLANG)
_SCORELESS = ("sc", "sc-early", "sc-exact")  # the scores change nothing
_DEFAULT_UNITS = {MODEL: 1, SGLANG: 16}


@dataclass(frozen=True)
class SimulateOptions:
    """What the user asked for."""

    sources: tuple[str, ...]  # a file of lengths, folders of recorded groups, or `generator`
    gpu: str = "h100"
    model: str = "qwen3-8b"
    pools: tuple[int, ...] = ()  # KV tokens; none: what fits beside the model
    ns: tuple[int, ...] = (64,)
    methods: str = DEFAULT_METHODS
    aucs: tuple[float, ...] = (0.7,)
    grown: float = 0.5
    questions: int | None = None
    draws: int = 1
    at_once: int = 1
    seed: int = 0
    scheduler: str = MODEL
    unit: int | None = None
    step_time: float = 1.0
    attention_time: float = 1.0
    prompt_tokens: int = 150
    max_new_tokens: int = 38_912
    step_tokens: int = 128
    recorded_speed: bool = False


@dataclass(frozen=True)
class Simulation:
    """What is simulated."""

    source: Source
    questions: int
    methods: tuple[str, ...]
    ns: tuple[int, ...]
    pools: tuple[int, ...]
    aucs: tuple[float | None, ...]
    draws: int
    at_once: int
    speed: Speed
    scheduler: str
    meta: dict[str, Any]
    problems: tuple[str, ...]  # of the source's files: what is left out, and why
    step_times: str | None = None  # where those of the recorded speed come from

    def batches(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """Draw, traces of a group, and the questions that come at once."""
        for draw in range(self.draws):
            for first in range(0, self.questions, self.at_once):
                numbers = tuple(range(first, min(first + self.at_once, self.questions)))
                for n in self.ns:
                    yield draw, n, numbers

    @property
    def total(self) -> int:
        """Outcomes in all."""
        cells = len(self.ns) * len(self.pools) * len(self.aucs) * len(self.methods)
        return self.draws * self.questions * cells


@dataclass(frozen=True)
class Job:
    """A method on questions that come at once."""

    groups: tuple[PlayedGroup, ...]
    method: str
    pool: int
    auc: float | None

    @property
    def keys(self) -> list[OutcomeKey]:
        """Of its outcomes."""
        return [
            OutcomeKey(g.question, self.method, len(g.traces), g.draw, self.pool, self.auc)
            for g in self.groups
        ]


def set_up(options: SimulateOptions) -> Simulation:
    """Check and decide everything.

    Raises:
        SimulationError: what was asked for cannot be simulated.
        ReplayError: recorded groups are damaged or missing.
    """
    methods = methods_named(options.methods)
    if options.scheduler not in SCHEDULERS:
        near = nearest(options.scheduler, SCHEDULERS)
        raise SimulationError(
            f"--scheduler is {' or '.join(SCHEDULERS)}, not {options.scheduler[:40]!r}{near}"
        )
    for flag, factor in (
        ("--step-time", options.step_time), ("--attention-time", options.attention_time)
    ):  # fmt: skip
        if not 0 < factor < 100:
            raise SimulationError(f"{flag} is a factor such as 1.2, not {factor:g}")
    time = step_time(gpu_named(options.gpu), network_named(options.model))
    pools = options.pools or (kv_pool(gpu_named(options.gpu), network_named(options.model)),)
    for auc in options.aucs:
        Ranking(auc, options.grown)  # refuses what is none
    source = source_of(options)
    problems: list[str] = []
    fitted = _recorded_prices(source, problems.append) if options.recorded_speed else None
    if fitted is not None:
        time = time_of(fitted.prices)
    questions = source.questions if options.questions is None else options.questions
    if questions > source.questions:
        raise SimulationError(f"{source.label} has {source.questions} questions, not {questions}")
    if max(options.ns) > source.most:
        raise SimulationError(
            f"-n {max(options.ns)}: the groups of {source.label} have {source.most} traces"
        )
    unit = options.unit or _DEFAULT_UNITS[options.scheduler]
    _check_pools(options, source, pools, unit)
    speed = Speed(
        _scaled(time, options.step_time, options.attention_time), unit,
        fitted.prices.overhead if fitted else 0.0,
    )  # fmt: skip
    meta = {
        "simulated": True,
        "source": source.label,
        "fingerprint": _fingerprint(source),
        "gpu": "recorded" if options.recorded_speed else options.gpu.lower(),
        "model": "recorded" if options.recorded_speed else options.model.lower(),
        "scheduler": options.scheduler,
        "at_once": options.at_once,
        "seed": options.seed,
        "unit": unit,
        "speed": asdict(speed.time),
        "overhead": speed.overhead,
        "package": __version__,
    }
    if source.invents:
        meta |= {
            "grown": options.grown,
            "prompt_tokens": options.prompt_tokens,
            "max_new_tokens": options.max_new_tokens,
            "step_tokens": options.step_tokens,
        }
    return Simulation(
        source, questions, methods, options.ns, pools, options.aucs if source.invents else (None,),
        options.draws, options.at_once, speed, options.scheduler, meta, tuple(problems),
        fitted.told if fitted else None,
    )  # fmt: skip


def methods_named(names: str) -> tuple[str, ...]:
    """Methods of a comma-separated list, each once; raises SimulationError."""
    found = dict.fromkeys(part.strip() for part in names.split(","))
    for name in found:
        if name not in MODELLED:
            raise SimulationError(
                f"{name[:40]!r} cannot be simulated{nearest(name, MODELLED)}; there are "
                f"{', '.join(MODELLED)}"
            )
    return tuple(found)


def source_of(options: SimulateOptions) -> Source:
    """The questions; raises SimulationError or ReplayError."""
    invention = Invention(
        options.grown, options.prompt_tokens, options.max_new_tokens, options.step_tokens,
        options.seed,
    )  # fmt: skip
    first = options.sources[0]
    if first == GENERATED:
        return Generated(options.questions or 30, invention)
    paths = tuple(map(Path, options.sources))
    for path in paths:
        if not path.exists():
            near = nearest(first, [GENERATED])
            raise SimulationError(
                f"{path} does not exist{near}: give a file of lengths, folders of `bench "
                f"--record`, or {GENERATED}"
            )
    if paths[0].is_dir():
        if not (paths[0] / TRACES).is_dir():
            raise SimulationError(f"{paths[0]} holds no recorded traces: run bench with --record")
        return Recorded(paths, options.seed)
    if len(paths) > 1:
        raise SimulationError("give one file of lengths, or several folders of `bench --record`")
    return LengthFile(paths[0], invention)


def _recorded_prices(source: Source, warn: Callable[[str], None]) -> FittedPrices:
    if not isinstance(source, Recorded):
        raise SimulationError("--recorded-speed is for folders of `bench --record`")
    return fitted_prices(source.folders, source.groups, warn)


def time_of(prices: CostModel) -> StepTime:
    """The same prices: a row of a decode step costs what a token of a prefill does, once."""
    return StepTime(
        base=prices.base, weights=0.0, row=0.0, attended=prices.per_token, compute=prices.per_trace
    )


def _scaled(time: StepTime, factor: float, attention: float) -> StepTime:
    return replace(
        time,
        base=time.base * factor,
        weights=time.weights * factor,
        row=time.row * factor,
        attended=time.attended * factor * attention,
        compute=time.compute * factor,
        pair=time.pair * factor,
        expert_weights=time.expert_weights * factor,
    )


def _check_pools(options: SimulateOptions, source: Source, pools: Sequence[int], unit: int) -> None:
    prompts = (options.at_once - 1) * options.prompt_tokens
    needed = source.room + prompts
    for pool in pools:
        if needed + 2 * unit > pool:
            raise SimulationError(
                f"a pool of {pool:,} KV tokens cannot hold the longest trace of {source.label}: "
                f"with its prompt it needs {needed:,}; take a larger --pool, a GPU with more "
                "memory, or cut traces by --max-new-tokens"
            )


def _fingerprint(source: Source) -> str:
    """Of the lengths of all questions' first drawing."""
    digest = hashlib.sha256()
    auc = 0.6 if source.invents else None
    for number in range(min(source.questions, 8)):
        group = source.group(number, 0, min(8, source.most), auc)
        digest.update(repr([(t.tokens, t.answer) for t in group.traces]).encode())
    return digest.hexdigest()[:16]


def run_modelled(
    simulation: Simulation,
    writer: OutcomeWriter,
    report: Callable[[Sequence[SimulatedOutcome]], None],
) -> None:
    """Simulate in the model of the scheduler what the folder lacks.

    Raises:
        SimulationError: the disk is full or fails.
    """
    unit = simulation.speed.unit
    for draw, n, numbers in simulation.batches():
        known: dict[tuple[str, int], list[SimulatedOutcome]] = {}  # of methods without scores
        for auc in simulation.aucs:
            # Named by number, so that what is there already need not be drawn again.
            jobs = jobs_left(simulation, writer, draw, n, numbers, auc)
            if not jobs:
                continue
            groups = for_model(jobs[0].groups, unit, simulation.source.limit)
            found: list[SimulatedOutcome] = []
            for job in jobs:
                cell = (job.method, job.pool)
                if cell in known:
                    found += [replace(outcome, auc=auc) for outcome in known[cell]]
                    continue
                own = model_outcomes(groups, job.method, job.pool, simulation.speed, auc)
                found += own
                if job.method in _SCORELESS:
                    known[cell] = own
            writer.add(found)
            report(found)


def jobs_left(
    simulation: Simulation,
    writer: OutcomeWriter,
    draw: int,
    n: int,
    numbers: Sequence[int],
    auc: float | None,
) -> list[Job]:
    """What the folder lacks of these questions; their traces are drawn only if it is anything."""
    names = [name_of(simulation.source, number) for number in numbers]
    cells = [
        (pool, method)
        for pool in simulation.pools
        for method in simulation.methods
        if any(OutcomeKey(name, method, n, draw, pool, auc) not in writer.done for name in names)
    ]
    if not cells:
        return []
    groups = tuple(simulation.source.group(number, draw, n, auc) for number in numbers)
    return [Job(groups, method, pool, auc) for pool, method in cells]


def name_of(source: Source, number: int) -> str:
    """A question's name in results."""
    return source.names[number] if isinstance(source, Recorded) else str(number)


def title_of(method: str) -> str:
    """A method's name in tables."""
    return METHODS[method].title
