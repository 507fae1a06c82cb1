"""From a store to a scorer file, its figures and its plots (paper section 4.1)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from step_sglang.data.questions import question_id
from step_sglang.scoring.calibration import TraceCalibration
from step_sglang.scoring.locate import SCORER_FILE, model_name, same_model
from step_sglang.scoring.scorer import Scorer, ScorerInfo, load_scorer, save_scorer
from step_sglang.training.calibrate import check_model, check_steps, fit_calibration
from step_sglang.training.card import CARD_FILE, card_text, is_card
from step_sglang.training.errors import TrainError
from step_sglang.training.evaluate import Evaluation, evaluate, score
from step_sglang.training.fit import WEIGHT_DTYPES, Epoch, Fitted, Recipe, ScorerNetwork, fit
from step_sglang.training.linear_probe import fit_linear_probe
from step_sglang.training.metrics import RUNNING_MEAN
from step_sglang.training.reader import Reader
from step_sglang.training.split import check_classes, split_questions
from step_sglang.training.trained_on import KEY, question_hashes
from step_sglang.training.voted import Labels, labels_of

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Shares:
    """Which questions are held out of training."""

    validation: float = 0.15  # choose the epoch
    test: float = 0.15  # only measured; unused when another store holds the test questions

    def __post_init__(self) -> None:
        if not (0 < self.validation < 1 and 0 <= self.test < 1 and self.validation + self.test < 1):
            raise TrainError("the validation and test shares must be positive, below 1 together")


@dataclass(frozen=True, eq=False)
class Trained:
    """Where the results are, and the figures."""

    scorer: Path
    metrics: Path
    fitted: Fitted
    calibration: TraceCalibration | None  # None: too few validation questions for one
    validation: Evaluation
    test: Evaluation
    linear_probe: Evaluation  # the logistic regression on the test questions


def train_scorer(
    store: Path,
    out: Path,
    recipe: Recipe,
    shares: Shares = Shares(),
    test_store: Path | None = None,
    skip_bad: bool = False,
    report: Callable[[int, Epoch], None] = lambda number, epoch: None,
    labels: Labels | None = None,
) -> Trained:
    """Train, measure, and write ``out``: the scorer, its card, metrics.json and the plots.

    Args:
        store: the collected traces.
        out: a folder; created, files of an earlier run replaced.
        recipe: the objective and the optimizer's settings.
        shares: questions held out of ``store``.
        test_store: measure on all questions of this store instead of a share of ``store``.
        skip_bad: leave damaged shards out.
        report: called after every epoch.
        labels: of the questions in ``store`` (None: those that it holds); a ``test_store`` has true
            ones.

    Raises:
        StoreError: a store is missing or damaged.
        TrainError: the traces cannot train or test a scorer, or ``out`` has another README.md.
    """
    _check_folder(out)
    labels = labels or Labels()
    reader = labels.reader(store, skip_bad)
    if labels.source == "answers":
        labels = labels_of(reader.meta)
    tested = reader if test_store is None else Reader(test_store, skip_bad)
    split = split_questions(
        reader, shares.validation, 0.0 if test_store else shares.test, recipe.seed
    )
    test = split.test if test_store is None else tested.shards
    if test_store is not None:
        check_test_store(reader, tested)
    if not test:
        raise TrainError("no test questions: give a test share above 0 or a test store")
    probe = fit_linear_probe(reader, split.train, recipe.seed)
    fitted = fit(reader, split.train, split.validation, recipe, report)
    fitted.network.round_w1(WEIGHT_DTYPES[recipe.dtype])  # the figures are those of the file
    scored = score(tested, test, fitted.network)
    held = score(reader, split.validation, fitted.network)
    calibration = fit_calibration(held, labels.source, held_out=True)
    trained = Trained(
        scorer=out / SCORER_FILE,
        metrics=out / METRICS_FILE,
        fitted=fitted,
        calibration=calibration,
        validation=evaluate(held, calibration=calibration),
        test=evaluate(scored, calibration=calibration),
        linear_probe=evaluate(score(tested, test, probe)),
    )
    from step_sglang.training.plots import PLOTS, draw_all  # matplotlib takes a second to import

    try:
        out.mkdir(parents=True, exist_ok=True)
        summary = _summary(reader, recipe, labels, trained, split.train)
        info = ScorerInfo(
            reader.meta.model, tuple(reader.meta.delimiters), reader.meta.think_end, summary,
            reader.meta.revision, calibration,
        )  # fmt: skip
        scorer = fitted.network.as_scorer(info, WEIGHT_DTYPES[recipe.dtype])
        save_scorer(scorer, trained.scorer)
        report_value = {
            "store": reader.meta.as_json(),
            "recipe": asdict(recipe),
            "labels": asdict(labels),
            "best_epoch": fitted.best_epoch,
            "positive_weight": fitted.positive_weight,
            "seconds": fitted.seconds,
            "calibration": None if calibration is None else calibration.as_json(),
            "history": fitted.history,
            "validation": trained.validation,
            "test": trained.test,
            "logistic_regression": trained.linear_probe,
        }
        trained.metrics.write_text(json.dumps(jsonable(report_value), indent=2) + "\n")
        draw_all(out, fitted, scored, trained.test)
        (out / CARD_FILE).write_text(card_text(scorer, PLOTS))
    except OSError as error:
        raise TrainError(f"cannot write to {out}: {error.strerror or error}") from error
    return trained


def evaluate_file(scorer_file: Path, store: Path, skip_bad: bool = False) -> Evaluation:
    """Figures of an existing scorer on all questions of a store.

    Raises:
        ScorerError: the file is not a scorer.
        StoreError: the store is missing or damaged.
        TrainError: the scorer is one of another model or of other steps, or the traces are of one
            class only.
    """
    return evaluate_scorer(load_scorer(scorer_file), Reader(store, skip_bad), scorer_file)


def evaluate_scorer(scorer: Scorer, reader: Reader, file: Path) -> Evaluation:
    """The same of what is read already.

    Raises:
        TrainError: as for :func:`evaluate_file`.
    """
    check_model(scorer, reader, f"scorer {file}")
    check_classes(reader, reader.shards, "stored")
    scored = score(reader, reader.shards, ScorerNetwork.from_scorer(scorer))
    return evaluate(scored, calibration=scorer.info.calibration)


def jsonable(value: Any) -> Any:
    """Nested dataclasses, mappings and sequences as JSON values: NaN is null, 0.25 as a key 25%."""
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable({name: getattr(value, name) for name in value.__dataclass_fields__})
    if isinstance(value, Mapping):
        return {_key(key): jsonable(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(member) for member in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _key(key: Any) -> str:
    return f"{key:.0%}" if isinstance(key, float) else str(key)


def _check_folder(out: Path) -> None:
    card = out / CARD_FILE
    try:
        if card.exists() and not is_card(card):
            raise TrainError(
                f"{card} is no card of a scorer, and would be overwritten: give another folder"
            )
    except OSError as error:
        raise TrainError(f"cannot read {card}: {error.strerror or error}") from error


def check_test_store(reader: Reader, tested: Reader) -> None:
    """Raise TrainError unless a scorer trained on one store can be measured on the other."""
    ours, theirs = reader.meta, tested.meta
    same = same_model(model_name(ours.model), model_name(theirs.model))
    if not same or ours.hidden_size != theirs.hidden_size:
        raise TrainError(
            f"{reader.folder} holds traces of {ours.model} (hidden size {ours.hidden_size}), "
            f"{tested.folder} of {theirs.model} ({theirs.hidden_size}): a scorer of another model"
        )
    check_steps(ours.delimiters, ours.think_end, str(reader.folder), tested)
    if labels_of(theirs).source == "vote":
        raise TrainError(
            f"{tested.folder} was collected with --labels vote: its labels are what most of its "
            "traces answered, and a test store needs true ones"
        )
    theirs_asked = {name for asked in _asked(tested) for name in asked}
    shared = sum(not asked.isdisjoint(theirs_asked) for asked in _asked(reader))
    if shared:
        raise TrainError(
            f"{shared} questions are in both {reader.folder} and {tested.folder}: "
            "test questions must be new"
        )
    check_classes(tested, tested.shards, "test")


def _asked(reader: Reader) -> Iterator[set[str]]:
    """The ids that each question can have: blanks at its ends make no other question of it."""
    for shard in reader.shards:
        first = reader.traces(shard)[0]
        yield {first.question_id, question_id(first.question.strip())}


def _summary(
    reader: Reader, recipe: Recipe, labels: Labels, trained: Trained, train: Sequence[int]
) -> dict[str, Any]:
    """What the scorer file says of its training; short, the whole is in metrics.json."""
    test = trained.test
    value = {
        "objective": recipe.objective,
        "labels": labels.source,
        "seed": recipe.seed,
        "best_epoch": trained.fitted.best_epoch,
        "source": reader.meta.source,
        "sampling": dict(reader.meta.sampling),
        "traces_per_question": reader.meta.n,
        "questions": {
            "train": len(train),
            "validation": trained.validation.questions,
            "test": test.questions,
        },
        KEY: question_hashes(reader, train),
        "test": {
            "mixed_questions": test.mixed_questions,
            "single_trace_accuracy": test.accuracy,
            "step_auc": test.step_auc,
            "auc_within_question": {
                name: {fraction: list(_triple(at.auc_within)) for fraction, at in ranking.items()}
                for name, ranking in test.ranking.items()
            },
            "auc_pooled": {
                fraction: list(_triple(at.auc))
                for fraction, at in test.ranking[RUNNING_MEAN].items()
            },
            "vote_accuracy": {name: list(_triple(o.accuracy)) for name, o in test.votes.items()},
            "expected_calibration_error": test.trace_calibration.ece,
            "expected_calibration_error_calibrated": (
                None if test.weight_calibration is None else test.weight_calibration.ece
            ),
        },
    }
    found: dict[str, Any] = jsonable(value)
    return found


def _triple(estimate: Any) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high
