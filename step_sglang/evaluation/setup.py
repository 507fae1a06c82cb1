"""From what a user asks `bench` for to what is done: questions, methods, sampling, pools, servers.

Starts a server only to find a pool's size (``--pool auto`` of a model that no profile knows), and
prints nothing itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from step_sglang import __version__
from step_sglang.data.questions import REASONER, Fields, Job, load_questions
from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.methods import RECORD, MethodSettings, methods_named
from step_sglang.evaluation.pilot import Lengths, known_lengths, measured_lengths
from step_sglang.evaluation.profiles import Profile, profile_of
from step_sglang.evaluation.results import ResultWriter
from step_sglang.evaluation.run import Bench, Plan, blocks
from step_sglang.evaluation.serving import (
    Model,
    PoolSize,
    ServerHandle,
    Serving,
    parse_pool_sizes,
    probe_server,
    served,
)
from step_sglang.evaluation.trial_result import TrialResult
from step_sglang.scoring.locate import locate_scorer
from step_sglang.voting.suffix import default_suffix

QUESTION_SEED = 2  # reasoner questions that neither its card (0) nor the demo (1) has looked at
DEFAULT_METHODS = "cot,sc,sc-early,slim-sc,deepconf,random,longest,step-paper,step,step-early"
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What the user asked for; None is a default that depends on the model."""

    dataset: str
    model: str  # its name
    path: str  # what it is loaded by
    methods: str = DEFAULT_METHODS
    ns: tuple[int, ...] = (64,)
    repeats: int = 1
    limit: int | None = None
    shard: str = "1/1"
    url: str | None = None
    scorer: str | None = None
    server_flags: tuple[str, ...] = ()
    pool: str | None = None
    mem_fraction: str | None = None
    data_dir: Path | None = None
    split: str = "train"
    question_field: str = "question"
    answer_field: str = "answer"
    question_seed: int = QUESTION_SEED
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    window: int | None = None
    warmup: int = 16
    tau: float = 0.95
    slim_delay: int | None = None
    slim_similarity: float = 0.95
    record: bool = False
    watch: float = 0.5
    timeout: float = 3600.0


@dataclass(frozen=True, eq=False)
class Setup:
    """All that is decided before anything is measured."""

    plan: Plan  # without pools where they are not known yet
    pool_is_known: bool
    jobs: tuple[Job, ...]  # of all shards
    meta: dict[str, Any]
    model: Model
    url: str | None
    has_methods: bool  # and not recording alone
    problems: tuple[str, ...]


def set_up(options: BenchOptions, say: Say) -> Setup:
    """Decide everything that needs no server.

    Raises:
        BenchError: the options contradict each other, or a name is unknown.
        ScorerError: there is no such scorer.
        SourceError: there are no such questions.
    """
    chosen = methods_named(options.methods) if options.methods else ()
    has_methods = bool(chosen)
    if options.record:
        chosen = (*chosen, RECORD)
    if not chosen:
        raise BenchError("--methods names none, and without --record there is nothing to do")
    given = locate_scorer(options.scorer or "", options.path)
    endless = options.dataset.startswith(f"{REASONER}:")
    # All of a set, so that it is the same set whatever the limit is.
    found = load_questions(
        options.dataset, options.limit if endless else None, options.split,
        fields=Fields(options.question_field, options.answer_field), seed=options.question_seed,
        data_dir=options.data_dir,
    )  # fmt: skip
    jobs = found.jobs[: options.limit]
    profile = profile_of(options.model)
    said = {
        name: value
        for name in ("temperature", "top_p", "top_k", "max_new_tokens")
        if (value := getattr(options, name)) is not None
    }
    sampling = replace(profile.sampling, **said)
    settings = MethodSettings(
        window=options.window or profile.window,
        warmup=options.warmup,
        tau=options.tau,
        similarity=options.slim_similarity,
        delay=profile.delay if options.slim_delay is None else options.slim_delay,
    )
    suffix = default_suffix(options.model) if options.suffix is None else options.suffix
    scorer = given or profile.scorer
    memories = memories_of(options, profile, say)
    plan = Plan(
        jobs=shard_of(options.shard, jobs),
        methods=chosen,
        ns=options.ns,
        repeats=options.repeats,
        memories=memories or (),
        sampling=sampling,
        settings=settings,
        suffix=suffix,
        watch_interval=options.watch,
        timeout=options.timeout,
    )
    meta = {
        "model": options.model,
        "dataset": options.dataset,
        "question_seed": options.question_seed if endless else None,
        "questions": None if endless else _fingerprint(found.jobs),
        "split": options.split,
        "fields": [options.question_field, options.answer_field],
        "package": __version__,
        "sampling": asdict(sampling),
        "settings": asdict(settings),
        "suffix": suffix,
        "scorer": options.scorer,
        "server_flags": list(options.server_flags),
    }
    if scorer and Path(scorer).is_file():
        # A file may be trained anew under the same name.
        meta["scorer_sha256"] = hashlib.sha256(Path(scorer).read_bytes()).hexdigest()[:16]
    return Setup(
        plan,
        memories is not None,
        jobs,
        meta,
        Model(options.path, scorer, options.server_flags),
        options.url,
        has_methods,
        tuple(f"{found.name}: left out: {problem}" for problem in found.problems),
    )


def with_pool(setup: Setup, folder: Path, say: Say) -> Plan:
    """The plan with its pools; a model that nobody knows is looked at first.

    Call it once the folder is known to be this measurement's.
    """
    if setup.pool_is_known:
        return setup.plan
    plan = setup.plan
    lengths = measured_lengths(setup.model, setup.jobs, plan.sampling, plan.suffix, folder)
    return replace(plan, memories=_quarter(lengths, max(plan.ns), say))


def num_left(plan: Plan, writer: ResultWriter) -> int:
    """Runs that are still to do."""
    return sum(len(block.trials) for block in blocks(plan, writer.done))


def measure(
    setup: Setup, plan: Plan, writer: ResultWriter, report: Callable[[TrialResult], None], say: Say
) -> tuple[str, ...]:
    """Do everything that is left; returns what the servers refused. See :meth:`Bench.run`."""
    running = max(256, *plan.ns)

    @contextmanager
    def serve(serving: Serving) -> Iterator[ServerHandle]:
        if setup.url is not None:
            yield probe_server(setup.url, serving.policy)
            return
        say(f"starting a server: {serving.policy or 'stock'}, {serving.memory.name}")
        log = writer.folder / "server.log"
        with served(serving, setup.model, running, log) as live:
            yield live

    return Bench(plan, writer, serve, report).run()


def memories_of(options: BenchOptions, profile: Profile, say: Say) -> tuple[PoolSize, ...] | None:
    """What the servers shall have; None: a pool of which nobody knows yet how large it is.

    Raises:
        BenchError: the options contradict each other.
    """
    pool, share = options.pool, options.mem_fraction
    if options.url is not None and (pool or share):
        raise BenchError("--pool and --mem-fraction are for servers that are started, not --url")
    if pool != "auto":
        return parse_pool_sizes(pool, share)
    if share:
        raise BenchError("--pool and --mem-fraction exclude each other")
    lengths = known_lengths(profile)
    if lengths is not None:
        return _quarter(lengths, max(options.ns), say)
    if re.fullmatch(r"0*1/0*1", options.shard) is None:
        raise BenchError(
            "every shard would measure a --pool auto of its own: give --pool in tokens, such as "
            "what a run without --shard says"
        )
    return None


def shard_of(text: str, jobs: Sequence[Any]) -> tuple[tuple[int, Any], ...]:
    """Every M-th question, with its place among all; raises BenchError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise BenchError(f"--shard is K/M with K from 1 to M, such as 1/2, not {text!r}")
    return tuple(enumerate(jobs))[int(match[1]) - 1 :: int(match[2])]


def _quarter(lengths: Lengths, n: int, say: Say) -> tuple[PoolSize, ...]:
    memory = PoolSize(tokens=lengths.quarter(n))
    say(f"--pool auto is {memory.name}")
    return (memory,)


def _fingerprint(jobs: Sequence[Job]) -> str:
    """Of all questions and answers, in their order."""
    digest = hashlib.sha256(json.dumps([(job.question, job.answer) for job in jobs]).encode())
    return digest.hexdigest()[:16]
