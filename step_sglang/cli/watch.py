"""`step-sglang watch`: a server's traces in the terminal, and a file that replays them."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group as Lines
from rich.live import Live
from rich.table import Table
from rich.text import Text

from step_sglang import files
from step_sglang.cli.ask import DEFAULT_URL
from step_sglang.cli.common import OUTPUT, err, out
from step_sglang.client.http import Client
from step_sglang.errors import ServerError, SourceError
from step_sglang.live.events import decode
from step_sglang.live.html import recorded_page
from step_sglang.live.known import Known, KnownGroup, KnownTrace

_LANES = 24
_BAR = 40  # characters
# As on the page: from low to high, told apart with every kind of colour vision.
_COLOURS = ("#b5520b", "#e08a2e", "#8b919b", "#5b9bd0", "#2f74c0")
_MARKS = {"finished": "●", "pruned": "✕", "aborted": "■", "waiting": "…", "running": " "}


def watch(
    url: Annotated[str, typer.Option(help="A server with --enable-step.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(envvar="STEP_SGLANG_API_KEY")] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Write a page that replays what was seen.", rich_help_panel=OUTPUT),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="End by itself after so long. Default: at Ctrl-C.")
    ] = None,
) -> None:
    """Show a server's groups, traces, memory and votes as they are; Ctrl-C ends it."""
    if seconds is not None and not seconds >= 0:  # 0: what there is at once
        raise SourceError(f"--seconds must be at least 0, not {seconds:g}")
    known = Known()
    problem: ServerError | None = None
    ends = None if seconds is None else time.monotonic() + seconds
    try:
        with (
            Client(url, timeout=30, api_key=api_key) as client,
            Live(console=err, auto_refresh=False, transient=not err.is_terminal) as screen,
        ):
            for update in client.feed():
                known.apply(decode(update))
                if (gone := known.excess()) is not None:
                    known.forget(gone)
                if err.is_terminal:
                    screen.update(shown(known), refresh=True)
                if ends is not None and time.monotonic() >= ends:
                    break
    except KeyboardInterrupt:
        pass
    except ServerError as error:
        problem = error  # what was seen is worth keeping all the same
    if save is not None and known.time:
        write_page(save, known)
        out.print(f"wrote {save}: {_size(known)}", highlight=False, markup=False)
    if problem is not None:
        raise problem


def write_page(target: Path, known: Known) -> None:
    """Write the page of a run; raises SourceError where the disk fails."""
    try:
        files.write(target, recorded_page(known.full()).encode())
    except OSError as error:
        raise SourceError(f"cannot write {target}: {error.strerror}") from error


def _size(known: Known) -> str:
    groups, traces = len(known.groups), len(known.traces)
    return f"{groups} group{'' if groups == 1 else 's'}, {traces} traces"


def shown(known: Known) -> Lines:
    """The newest group trace by trace, its vote, the pool, and a line for each of the others."""
    lines: list[Text | Table] = [_pool(known)]
    groups = list(known.groups.values())
    newest = next(
        (g for g in reversed(groups) if len(g.traces) > 1), groups[-1] if groups else None
    )
    if newest is None:
        return Lines(*lines, Text("no group yet", style="dim"))
    lines += [Text(plain(newest.began.name), style="bold"), _lanes(known, newest)]
    for bar in newest.votes[-1].bars[:5] if newest.votes else ():
        lines.append(Text(f"  {plain(bar.answer)}: {bar.count} traces, weight {bar.weight:.2f}"))
    if newest.votes and newest.votes[-1].settled:
        lines.append(Text("  no trace that runs can change the vote", style="dim"))
    for group in groups[-6:]:
        if group is not newest:
            fates = Counter(known.traces[number].fate for number in group.traces)
            words = ", ".join(f"{count} {fate}" for fate, count in fates.items())
            lines.append(Text(f"{plain(group.began.name, 40)}: {words}", style="dim"))
    return Lines(*lines)


def plain(text: str, most: int = 60) -> str:
    """Text of others as one line that cannot steer the terminal."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= most else line[: most - 1] + "…"


def _pool(known: Known) -> Text:
    if not known.pool:
        return Text("")
    now = known.pool[-1]
    full = round(_BAR * now.used / now.size) if now.size else 0
    bar = "█" * full + "░" * (_BAR - full)
    counts = f"{now.running} run, {now.waiting} wait"
    return Text(f"KV {bar} {now.used} of {now.size} tokens; {counts}")


def _lanes(known: Known, group: KnownGroup) -> Table:
    traces = [known.traces[number] for number in group.traces]
    most = max(1, *(trace.tokens for trace in traces))
    table = Table(box=None, pad_edge=False, show_header=False)
    for place, trace in enumerate(traces[:_LANES]):
        score = "-" if trace.score is None else f"{trace.score:.3f}"
        table.add_row(
            str(place + 1), _lane(trace, most), _MARKS.get(trace.fate, "□"), f"{trace.tokens}",
            score, Text(_said(trace), style="dim"),
        )  # fmt: skip
    if len(traces) > _LANES:
        table.add_row("", Text(f"{len(traces) - _LANES} more", style="dim"))
    return table


def _said(trace: KnownTrace) -> str:
    if trace.ended is not None and trace.ended.reason is not None:
        return f"{trace.fate} ({trace.ended.reason})"
    return trace.fate if trace.answer is None else f"{trace.fate}: {plain(trace.answer, 24)}"


def _lane(trace: KnownTrace, most: int) -> Text:
    """A bar as long as its tokens, each part in the colour of the trace score there."""
    lane, total, step = Text(), trace.sum - sum(trace.scores), 0
    before = trace.num_steps - len(trace.scores)
    score = total / before if before else None
    for cell in range(round(_BAR * trace.tokens / most)):
        while step < len(trace.scores) and trace.positions[step] < (cell + 1) * most / _BAR:
            total += trace.scores[step]
            step += 1
            score = total / (before + step)
        colour = "grey50" if score is None else _COLOURS[min(4, int(5 * score))]
        lane.append("━", style=colour)
    return lane
