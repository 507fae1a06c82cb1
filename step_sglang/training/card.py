"""The model card of a scorer: what a page on the Hub says of it, from what its file states."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from step_sglang.errors import ScorerError
from step_sglang.scoring.calibration import VOTE, TraceCalibration
from step_sglang.scoring.scorer import Scorer
from step_sglang.training.metrics import FEW_QUESTIONS, few_questions

CARD_FILE = "README.md"
_LIBRARY = "library_name: step-sglang"  # in every card's header
_MARK = re.compile(r"<!-- of the scorer ([0-9a-f]{16}) -->")
_SIGNALS_OF_STEP = "running mean"  # the trace score, as `train` names it in the file


def card_text(scorer: Scorer, plots: Sequence[str] = ()) -> str:
    """Markdown with the Hub's header.

    Args:
        scorer: its figures are what the file holds; nothing is measured here.
        plots: images beside the card.
    """
    mark = f"<!-- of the scorer {_digest(scorer)} -->"
    lines = (*_header(scorer), *_body(scorer), *_figures(scorer), *_plots(plots), mark, "")
    return "\n".join(lines)


def is_card(file: Path) -> bool:
    """Whether a file that exists is a scorer's card; raises OSError."""
    return _LIBRARY in file.read_text(errors="replace")


def check_card(file: Path, scorer: Scorer) -> None:
    """Refuse what is no card, and the card of another scorer. An older card does not say whose.

    Raises:
        ScorerError: it is not this scorer's.
        OSError: it cannot be read.
    """
    if not is_card(file):
        raise ScorerError(
            f"{file} is no card of a scorer, whose header says `{_LIBRARY}`: move it away, and a "
            "card is written"
        )
    marks = _MARK.findall(file.read_text(errors="replace"))
    if marks and marks[-1] != _digest(scorer):
        raise ScorerError(
            f"{file} describes another scorer than the one beside it: remove it, and a new card is "
            "written"
        )


def _digest(scorer: Scorer) -> str:
    """Changes with the weights and with everything that the file states."""
    said = {key: value for key, value in asdict(scorer.info).items() if value}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for tensor in (scorer.w1, scorer.b1, scorer.w2, scorer.b2):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _header(scorer: Scorer) -> Iterator[str]:
    yield "---"
    yield _LIBRARY
    model = scorer.info.model
    if model and model.count("/") == 1 and not model.startswith((".", "/", "~")):
        yield f"base_model: {model}"
        yield "base_model_relation: adapter"
    yield "tags: [step, step-scorer, sglang]"
    yield "---"


def _body(scorer: Scorer) -> Iterator[str]:
    info = scorer.info
    training = info.training
    model = info.model or "a model that the file does not name"
    yield f"# STEP scorer for {model}"
    yield ""
    yield (
        "A two-layer MLP (Linear(d, 512), ReLU, Linear(512, 1)) that reads the last hidden state "
        "of the model at the end of each reasoning step; the running mean of its outputs ranks the "
        "traces of one question (STEP, arXiv 2601.09093). It is for these weights alone."
    )
    yield ""
    if info.model:
        yield "```bash"
        yield (
            f"python -m sglang.launch_server --model-path {info.model} --enable-step "
            "--step-scorer THIS_REPOSITORY"
        )
        yield "```"
        yield ""
    yield "| | |"
    yield "|---|---|"
    delimiters = ", ".join(f"`{text!r}`" for text in info.delimiters) or "unknown"
    questions = training.get("questions") or {}
    split = ", ".join(f"{count} {name}" for name, count in questions.items())
    for name, value in (
        ("model", model),
        ("revision of the model", info.revision),
        ("hidden size", scorer.hidden_size),
        ("a step ends with", delimiters),
        ("scoring stops at", f"`{info.think_end}`" if info.think_end else None),
        ("data", training.get("source")),
        ("questions", split),
        ("traces a question", training.get("traces_per_question")),
        ("objective", training.get("objective")),
        ("labels", training.get("labels")),
        ("calibration", _calibration(info.calibration)),
    ):
        yield f"| {name} | {'unknown' if value in (None, '') else value} |"
    yield ""


def _calibration(found: TraceCalibration | None) -> str:
    if found is None:
        return "none: votes weigh by trace score"
    kind = "held-out questions" if found.held_out else "questions"
    fitted = "" if found.questions is None else f", fitted on {found.questions} {kind}"
    if found.labels == VOTE:
        fitted += " to what their traces agree on, not to true answers"
    return (
        f"P(right) = sigmoid({found.slope:.3g} logit(trace score) "
        f"{'-' if found.bias < 0 else '+'} {abs(found.bias):.3g}){fitted}; votes weigh by its odds"
    )


def _figures(scorer: Scorer) -> Iterator[str]:
    test: Mapping[str, Any] = scorer.info.training.get("test") or {}
    yield "## Figures"
    yield ""
    within: Mapping[str, Mapping[str, Any]] = test.get("auc_within_question") or {}
    if not within:
        yield "The file states none."
        yield ""
        return
    questions = (scorer.info.training.get("questions") or {}).get("test", "?")
    mixed = test.get("mixed_questions")  # absent in older files
    few, few_mixed = _few(questions), _few(questions if mixed is None else mixed)
    both = "" if mixed is None else f" ({mixed} with right and wrong traces)"
    yield (
        f"AUC within the question on {questions} test questions{both}, at a share of the trace's "
        f"length{'' if few_mixed else ', with 95 % intervals'}. Only this figure says whether "
        "pruning will help: pooled over questions, a signal also wins by telling hard ones from "
        "easy ones."
    )
    if few or few_mixed:
        count: Any = questions if few else mixed
        yield f"It is {few_questions(count, '' if few else ' with right and wrong traces')}."
    yield ""
    shares = in_order(next(iter(within.values()), {}))
    yield "| signal | " + " | ".join(shares) + " |"
    yield "|---|" + "---|" * len(shares)
    for name, at in within.items():
        shown = "trace score" if name == _SIGNALS_OF_STEP else name
        yield f"| {shown} | " + " | ".join(_interval(at.get(s), few_mixed) for s in shares) + " |"
    yield ""
    accuracy = test.get("single_trace_accuracy")
    if isinstance(accuracy, float):
        yield f"A single trace is right in {accuracy:.1%}."
    for name, value in (test.get("vote_accuracy") or {}).items():
        yield f"- vote, {name}: {_interval(value, few)}"
    yield ""


def in_order(shares: Iterable[str]) -> list[str]:
    """Shares of a trace, such as 25%, by size: a file may have them in another order."""

    def size(share: str) -> float:
        try:
            return float(share.rstrip("%"))
        except ValueError:
            return math.inf

    return sorted(shares, key=size)


def _few(questions: Any) -> bool:
    return isinstance(questions, int) and questions < FEW_QUESTIONS


def _interval(estimate: Any, few: bool) -> str:
    if not isinstance(estimate, list) or len(estimate) != 3 or estimate[0] is None:
        return "-"
    value, low, high = estimate
    if few or low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def _plots(plots: Sequence[str]) -> Iterator[str]:
    for name in plots:
        yield f"![{name.rpartition('.')[0]}]({name})"
