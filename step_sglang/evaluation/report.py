"""Writes the tables of an evaluation in Markdown and LaTeX, and its plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.machine import machines_of
from step_sglang.evaluation.methods import METHODS, REFERENCE, Method
from step_sglang.evaluation.page import write_page
from step_sglang.evaluation.ranking import Rankings, recorded_rankings
from step_sglang.evaluation.results import Loaded, load_results
from step_sglang.evaluation.stats import Mean, Paired
from step_sglang.evaluation.summary import Summary, in_common, summarize
from step_sglang.evaluation.votes import SHOWN, VoteRow, vote_rows
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.training.metrics import FEW_QUESTIONS, few_questions
from step_sglang.voting.session import STREAM_INTERVAL
from step_sglang.voting.suffix import is_reasoner

MARKDOWN, LATEX = "report.md", "report.tex"
_PLOTS = {
    "latency.png": "accuracy against latency",
    "breakdown.png": "where the time of a trace goes",
    "memory.png": "latency and accuracy by the size of the KV pool",
    "ranking.png": "how well signals rank the traces of a question",
}
_NOTE = (
    "Accuracy and latency are means over questions of the mean over repeats; ± is the standard "
    "error over questions. In brackets: 95 % bootstrap intervals over questions, paired. p: "
    "paired permutation test over questions, two-sided, against the named method with as many "
    "traces in the same memory. Latency: from the request to the end of the last trace, all of a "
    "method's requests together; the vote counts only where it ends the group early. Wait, "
    "prefill and decode: a trace's own, mean, by the server's time stamps; a trace that was "
    "cancelled before its first token waited until then, of other cancelled ones nothing is known. "
    "Ended early: traces that a decided vote cut short."
)
_CUT_SHORT = (
    "Tokens of {}: a trace that was cancelled by an early end counts with the tokens that had been "
    f"sent, which happens every {STREAM_INTERVAL} tokens. Up to {STREAM_INTERVAL - 1} later ones, "
    "and what the server made until it heard of the end, are missing for each: the figure is too "
    "small, without the latter by at most {} a question."
)


@dataclass(frozen=True)
class Written:
    """What was made."""

    files: tuple[Path, ...]
    markdown: str
    problems: tuple[str, ...]
    heading: str  # what was measured, with what
    tables: tuple[Table, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Text cells, ready for either form."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def write_report(
    folders: Sequence[Path],
    target: Path,
    reference: Method = METHODS[REFERENCE],
    calibration: TraceCalibration | None = None,
) -> Written:
    """Write ``report.md``, ``report.tex``, the plots, and the page of recorded groups if there are.

    Args:
        folders: of results.
        target: to write to.
        reference: the method that others are compared with.
        calibration: of the scorer, for results that do not state it.

    Raises:
        BenchError: there are no results, or they do not belong together, or the disk fails.
    """
    from step_sglang.evaluation.plots import draw_all

    loaded = load_results(folders)
    kept, told = in_common(loaded.results)
    loaded = replace(loaded, results=kept)
    summaries = summarize(kept, reference.name)
    tables = [accuracy_table(summaries, reference.title), breakdown_table(summaries)]
    if votes := vote_rows(loaded.results, calibration):
        tables.append(votes_table(votes))
    rankings = recorded_rankings(folders, loaded.meta["settings"]["window"])
    if rankings:
        tables.append(ranking_table(rankings))
    early = [_cut_short(s) for s in summaries if s.cancelled]
    fewest = min(s.questions for s in summaries)
    warnings = (
        *((few_questions(fewest),) if fewest < FEW_QUESTIONS else ()),
        *told,
        *(_aborted(s) for s in summaries if s.aborted),
    )
    heading = _heading(loaded, machines_of(folders))
    try:
        target.mkdir(parents=True, exist_ok=True)
        drawn = draw_all(target, summaries, rankings)
        text = _markdown(heading, warnings, tables, early, drawn)
        (target / MARKDOWN).write_text(text, encoding="utf-8")
        (target / LATEX).write_text("\n".join(map(latex, tables)), encoding="utf-8")
        page = write_page(folders, target)
    except OSError as error:
        raise BenchError(f"cannot write to {target}: {error.strerror}") from error
    files = (target / MARKDOWN, target / LATEX, *drawn, *([page] if page else ()))
    return Written(files, text, loaded.problems, heading, tuple(tables), warnings)


def accuracy_table(summaries: Sequence[Summary], reference: str = "SC") -> Table:
    """The paper's Table 1: accuracy, tokens and latency, with tests against the reference."""
    head = (
        "method", "n", "accuracy, %", "tokens", "latency, s",
        f"accuracy - {reference}, points", "p (accuracy)", f"latency / {reference}", "p (latency)",
    )  # fmt: skip
    rows = [
        (
            s.title, str(s.n), _mean(s.accuracy, 100, 1), _mean(s.tokens, 1, 0),
            _mean(s.latency, 1, 2), *_difference(s.accuracy_gap), *_ratio(s.latency_gap),
        )
        for s in summaries
    ]  # fmt: skip
    return _with_memory("Accuracy, tokens and latency of a question", head, rows, summaries)


def breakdown_table(summaries: Sequence[Summary]) -> Table:
    """The paper's Table 2: where the time of a trace goes, and what happened to the traces."""
    head = (
        "method", "n", "wait, s", "longest wait, s", "prefill, s", "decode, s", "pruned",
        "retracted", "ended early", "pool in use, %", "at most, %",
    )  # fmt: skip
    rows = [
        (
            s.title, str(s.n), _number(s.wait, 2), _number(s.longest_wait, 2),
            _number(s.prefill, 3), _number(s.decode, 2), _number(s.pruned, 1),
            _number(s.retracted, 1), _number(s.ended, 1),
            _number(s.usage, 0, 100), _number(s.peak_usage, 0, 100),
        )
        for s in summaries
    ]  # fmt: skip
    return _with_memory("Where the time of a trace goes", head, rows, summaries)


def votes_table(rows: Sequence[VoteRow]) -> Table:
    """The same traces under three votes, and what calibrated weights gain, paired."""
    return Table(
        "Accuracy by what a finished trace weighs, %, same traces",
        ("method", "n", "KV pool", "majority", "trace score", "odds", "gain, points", "p"),
        tuple(
            (
                row.title, str(row.n), row.memory,
                *(_mean(row.accuracy[v], 100, 1) if v in row.accuracy else "" for v in SHOWN),
                *_difference(row.gain),
            )
            for row in rows
        ),
    )  # fmt: skip


def ranking_table(rankings: Rankings) -> Table:
    """The paper's Fig. 5 in figures, within the question: where pruning compares traces."""
    fractions = list(next(iter(rankings.values())))
    return Table(
        "AUC within the question after a part of the trace's steps, recorded traces",
        ("signal", *(f"{fraction:.0%}" for fraction in fractions)),
        tuple(
            (
                signal,
                *(r.auc_within.shown(".3f") for r in at.values()),
            )
            for signal, at in rankings.items()
        ),
    )


def _with_memory(
    caption: str,
    head: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    summaries: Sequence[Summary],
) -> Table:
    """Name the memory once, or in a column where there are several."""
    memories = list(dict.fromkeys(s.memory for s in summaries))
    if len(memories) == 1:
        return Table(f"{caption}; KV pool: {memories[0]}", head, tuple(rows))
    return Table(
        caption,
        (*head[:2], "KV pool", *head[2:]),
        tuple((*r[:2], s.memory, *r[2:]) for r, s in zip(rows, summaries, strict=True)),
    )


def markdown(table: Table) -> str:
    """A pipe table with its caption."""
    lines = [f"**{table.caption}**", "", _row(table.head), _row(["---"] * len(table.head))]
    return "\n".join([*lines, *(_row(row) for row in table.rows), ""])


def latex(table: Table) -> str:
    """A ``tabular`` in a ``table``, for the booktabs package."""
    columns = "ll" + "r" * (len(table.head) - 2)
    lines = [
        r"\begin{table}", rf"\caption{{{_escaped(table.caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex_row(table.head), r"\midrule",
        *(_tex_row(row) for row in table.rows), r"\bottomrule", r"\end{tabular}", r"\end{table}",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _heading(loaded: Loaded, machines: Sequence[str]) -> str:
    """What was measured, and with what, as far as the results say it."""
    results, meta = loaded.results, loaded.meta
    questions = len({result.question for result in results})
    repeats = len({result.repeat for result in results})
    embedded = "the embedded one" if is_reasoner(meta["model"]) else "as the server has it"
    scorer = meta.get("scorer") or embedded
    sampling = ", ".join(f"{name} {value}" for name, value in (meta.get("sampling") or {}).items())
    flags = " ".join(meta.get("server_flags") or ()) or "none"
    lines = [
        f"# {meta['model']} on {meta['dataset']}",
        "",
        f"{questions} question{_s(questions)}, {repeats} repeat{_s(repeats)}, {len(results)} runs.",
        "",
        f"- scorer: {scorer}",
        f"- sampling: {sampling or 'unknown'}",
        f"- appended to a question: {meta.get('suffix')!r}",
        f"- more server flags: {flags}",
        *(f"- measured on: {machine}" for machine in machines or ("not recorded",)),
        "",
    ]
    return "\n".join(lines)


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _markdown(
    heading: str,
    warnings: Sequence[str],
    tables: Sequence[Table],
    early: Sequence[str],
    drawn: Sequence[Path],
) -> str:
    plots = [f"![{_PLOTS[f.name]}]({f.name})\n" for f in drawn if f.name in _PLOTS]
    notes = [_NOTE, *(f"\n{note}" for note in early)]
    warned = [f"**Warning:** {warning}.\n" for warning in warnings]
    return "\n".join([heading, *warned, *(markdown(table) for table in tables), *plots, *notes, ""])


def _cut_short(summary: Summary) -> str:
    name = f"{summary.title}, n = {summary.n}, {summary.memory}"
    return _CUT_SHORT.format(name, f"{(STREAM_INTERVAL - 1) * summary.cancelled:.0f}")


def _aborted(summary: Summary) -> str:
    return (
        f"{summary.title}, n = {summary.n}, {summary.memory}: {summary.aborted} traces were "
        "aborted by the server or another client; they count as traces without an answer"
    )


def _mean(mean: Mean, scale: float, digits: int) -> str:
    value = f"{scale * mean.value:.{digits}f}"
    return value if mean.error != mean.error else f"{value} ± {scale * mean.error:.{digits}f}"


def _difference(gap: Paired | None) -> tuple[str, str]:
    if gap is None:
        return "", ""
    d = gap.difference
    return (
        f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
        _p(gap.p_value),
    )


def _ratio(gap: Paired | None) -> tuple[str, str]:
    if gap is None:
        return "", ""
    return f"{gap.ratio.value:.2f} [{gap.ratio.low:.2f}, {gap.ratio.high:.2f}]", _p(gap.p_value)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{scale * value:.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return text.replace("%", r"\%").replace("±", r"$\pm$").replace("<", "$<$").replace("_", r"\_")
