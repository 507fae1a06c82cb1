"""From what a user asks `collect` for to what is done: questions, prompts, store, sampling.

Starts no server and prints nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Fields, Job, load_questions, load_traces
from step_sglang.errors import SourceError
from step_sglang.gathering.folder import model_of
from step_sglang.scoring.locate import model_revision
from step_sglang.training import collect as work
from step_sglang.training.prompts import Prompter, load_prompter
from step_sglang.training.stored import StoreMeta
from step_sglang.training.voted import AGREEMENT, LABELS_BY, Labels
from step_sglang.voting.suffix import default_suffix, is_reasoner

DEFAULT_TRACES = 64
REASONER_SAMPLING = Sampling(1.0, 1.0, -1, 900)


@dataclass(frozen=True)
class CollectOptions:
    """What the user asked for; None is a default that depends on the model."""

    source: str
    model: str  # its name
    path: str  # where its tokenizer is
    revision: str | None = None  # of the model: a branch, a tag or a commit; None: the main branch
    from_traces: bool = False
    n: int | None = None
    limit: int | None = None
    split: str = "train"
    config: str | None = None
    fields: Fields = field(default_factory=Fields)
    suffix: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    delimiters: tuple[str, ...] = ("\n\n",)
    scope_all: bool = False
    dtype: str = "float16"
    top_logprobs: int = 20
    confidence_window: int | None = None
    concurrency: int = 4
    timeout: float = 3600.0
    keep_text: bool = False
    labels: Labels = field(default_factory=Labels)


@dataclass(frozen=True, eq=False)
class CollectPlan:
    """All that is decided before a server is needed."""

    jobs: tuple[Job, ...]
    problems: tuple[str, ...]  # what had to be left out, in words
    prompter: Prompter
    meta: StoreMeta
    settings: work.CollectSettings


def plan_collection(options: CollectOptions) -> CollectPlan:
    """Read the questions and the tokenizer.

    Raises:
        SourceError: there are no questions, or there is no such model.
        BoundaryError: no token contains a delimiter.
    """
    ours = is_reasoner(options.model)
    voted = options.labels.agreement if options.labels.source == "vote" else None
    if voted is not None and not options.from_traces:
        raise SourceError(
            "--labels vote needs --from-traces, and the traces that a server with --step-sample "
            "kept; labels of freshly collected traces are voted by `train --labels vote`"
        )
    suffix = default_suffix(options.model) if options.suffix is None else options.suffix
    prompter = load_prompter(
        options.path, options.delimiters, options.scope_all, suffix, options.revision
    )
    found = (
        load_traces(Path(options.source), options.n, options.fields, voted, prompter.asked)
        if options.from_traces
        else load_questions(
            options.source, options.limit, options.split, options.config, options.fields
        )
    )
    jobs = found.jobs[: options.limit]
    measured = {} if options.from_traces else asdict(options.sampling)
    if voted is not None:
        measured = {LABELS_BY: "vote", AGREEMENT: voted}
    extracts = {job.extract for job in jobs} - {"boxed"}
    if extracts:  # an earlier version read boxed answers: its labels are others
        measured = {**measured, "extract": ", ".join(sorted(extracts))}
    meta = StoreMeta(
        model=options.model,
        hidden_size=prompter.hidden_size,
        n=len(jobs[0].traces) if options.from_traces else options.n or DEFAULT_TRACES,
        source=("traces " if options.from_traces else "") + found.name,
        sampling={**measured, "top_logprobs": options.top_logprobs, "suffix": suffix},
        delimiters=options.delimiters,
        think_end="</think>" if prompter.think_end is not None else None,
        dtype=options.dtype,
        confidence_window=options.confidence_window or (20 if ours else 2048),
        revision=model_revision(options.path, options.revision),
    )
    settings = work.CollectSettings(
        options.sampling, options.top_logprobs, options.concurrency, options.timeout,
        options.keep_text,
    )  # fmt: skip
    problems = tuple(f"{found.name}: left out: {problem}" for problem in found.problems)
    return CollectPlan(jobs, (*problems, *_of_another_model(options)), prompter, meta, settings)


def _of_another_model(options: CollectOptions) -> tuple[str, ...]:
    """A warning where a server of another model kept the traces, as far as names tell."""
    theirs = model_of(Path(options.source)) if options.from_traces else None
    if theirs in (None, options.model, options.path):
        return ()
    return (
        f"the traces in {options.source} are {theirs}'s: they train a scorer for {options.model} "
        "only if that is the same model",
    )
