"""What the commands share: two consoles, the panels of `--help`, warnings, bars, the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from step_sglang.errors import ServerError, SourceError, StepError, nearest

out = Console(soft_wrap=True)  # paths are not broken into lines
err = Console(stderr=True, soft_wrap=True)

# Panels of `--help`, in the order in which a reader needs them.
QUESTIONS = "Questions"
MODEL = "Model and server"
SAMPLING = "Sampling"
VOTING = "Vote"
STORING = "What is stored"
METHODS = "Methods"
MEMORY = "Memory"
RECIPE = "Recipe"
RUNNING = "Run"
OUTPUT = "Output"

DELIMITER_HELP = r"Text that ends a step; \n and \t are understood. Repeat for several."
SUFFIX_HELP = r"Appended to each question. Default: asks for \boxed{}; reasoner: nothing."

# Without brackets, which are markup in a help text.
SCORER_HELP = "a file; org/name or org/name/file on the Hub, perhaps with @revision; auto; or none"

Settings = TypeVar("Settings")


def given(settings: Settings, **options: Any) -> Settings:
    """The settings, with what the user said instead of their defaults."""
    said = {key: value for key, value in options.items() if value is not None}
    return replace(settings, **said)  # type: ignore[type-var]


def one_of(flag: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices; raises SourceError."""
    if value not in choices:
        raise SourceError(
            f"{flag} must be one of {', '.join(choices)}, not {value!r}{nearest(value, choices)}"
        )


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Comma-separated positive integers, each once; raises SourceError."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise SourceError(f"{flag} takes integers such as 16,64, not {text!r}")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def shares(flag: str, text: str) -> tuple[float, ...]:
    """Comma-separated shares, above 0 and at most 1, each once; raises SourceError."""
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = ()
    if not found or not all(0 < share <= 1 for share in found):
        raise SourceError(f"{flag} takes shares above 0 and at most 1, such as 1,0.5, not {text!r}")
    return found


def names(text: str) -> list[str]:
    """Comma-separated names."""
    return [part.strip() for part in text.split(",")]


def warn(title: str, lines: Sequence[str], shown: int = 5) -> None:
    """The first few of some warnings, and how many more there are."""
    prefix = f"{title}: " if title else ""
    for line in lines[:shown]:
        err.print(f"{prefix}{line}", style="yellow", highlight=False, markup=False)
    if len(lines) > shown:
        err.print(f"{prefix}{len(lines) - shown} more", style="yellow", highlight=False)


def resolve_model(
    model: str | None, url: str | None, source: str, wanted: type[StepError] = SourceError
) -> tuple[str, str]:
    """The model's name, and the path or name that it is loaded by.

    Raises:
        StepError: of the type ``wanted``: nothing says which model it is.
        ServerError: the server at ``url`` does not say it.
    """
    from step_sglang.client.http import served_model
    from step_sglang.reasoner import model_path
    from step_sglang.voting.suffix import reasoner_name

    if model is None and url is not None:
        model = served_model(url)
    elif model is not None and url is not None:
        _compare(model, url)
    if model is None and source.startswith("reasoner:"):
        model = "reasoner"
    if model is None:
        raise wanted("give --model, the model to sample from, or --url, a running server")
    ours = reasoner_name(model)
    return (model, model) if ours is None else (ours, str(model_path(ours)))


def _compare(model: str, url: str) -> None:
    """Warn where a server serves another model than the user says, as far as names tell."""
    from step_sglang.client.http import served_model
    from step_sglang.scoring.locate import model_identity, same_model
    from step_sglang.voting.suffix import reasoner_name

    with suppress(ServerError):  # whoever uses it says what is wrong
        served = served_model(url)
        ours, theirs = (reasoner_name(name) or model_identity(name)[0] for name in (model, served))
        if not same_model(ours, theirs):
            warn("", (f"{url} serves {served}, and --model is {model}: is that the same model?",))


@contextmanager
def progress_bar(total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """A bar on stderr; yields what is called with how many are done and a few words.

    Where stderr is no terminal, every call prints a line instead.
    """
    bar = Progress(
        TextColumn("{task.completed}/{task.total} " + unit),
        BarColumn(),
        TextColumn("{task.fields[words]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )
    with bar:
        task = bar.add_task("", total=total, words="")

        def advance(done: int, words: str) -> None:
            bar.update(task, completed=done, words=words)
            if not err.is_terminal:
                print(f"{done}/{total} {words}", file=err.file, flush=True)

        yield advance


def seconds(value: float | None) -> str:
    """A time in words of a table; an unknown one is a dash."""
    return "-" if value is None else f"{value:.1f} s"
