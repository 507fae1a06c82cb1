"""Splits a store by question, so that no question's traces are on two sides."""

from __future__ import annotations

import random
from dataclasses import dataclass

from step_sglang.training.errors import TrainError
from step_sglang.training.reader import Reader


@dataclass(frozen=True)
class Split:
    """Shard numbers (one shard = one question)."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def split_questions(reader: Reader, validation: float, test: float, seed: int) -> Split:
    """Shuffle the questions by id and cut; ``test`` 0 leaves the test part empty.

    Raises:
        TrainError: too few questions, or a part lacks correct or wrong traces with steps.
    """
    by_id = {reader.traces(shard)[0].question_id: shard for shard in reader.shards}
    names = sorted(by_id)
    random.Random(f"split/{seed}").shuffle(names)
    shards = [by_id[name] for name in names]
    held = max(1, round(len(shards) * validation))
    tested = max(1, round(len(shards) * test)) if test > 0 else 0
    if len(shards) < held + tested + 1:
        raise TrainError(
            f"{reader.folder} holds {len(shards)} questions, too few to split into training, "
            "validation and test: collect more"
        )
    split = Split(
        tuple(shards[held + tested :]), tuple(shards[:held]), tuple(shards[held : held + tested])
    )
    check_classes(reader, split.train, "training")
    check_classes(reader, split.validation, "validation")
    if split.test:
        check_classes(reader, split.test, "test")
    return split


def check_classes(reader: Reader, shards: tuple[int, ...], part: str) -> None:
    """Raise TrainError unless ``shards`` hold both correct and wrong traces that have steps.

    Raises:
        TrainError: they do not, or nobody knows, because no question has an answer.
    """
    traces = [trace for shard in shards for trace in reader.traces(shard)]
    scored = [trace for trace in traces if trace.num_steps]
    where = f"the {part} questions of {reader.folder}"
    if not scored:
        shown = ", ".join(repr(text) for text in reader.meta.delimiters)
        raise TrainError(
            f"none of the {len(traces)} traces of {where} has a step: no token of theirs contains "
            f"a delimiter ({shown}); collect again with the --delimiter this model writes"
        )
    check_answers(reader, shards, where)
    correct = sum(trace.correct for trace in scored)
    if correct in (0, len(scored)):
        kind = "correct" if correct else "wrong"
        raise TrainError(
            f"all {len(scored)} traces of {where} are {kind}, and a scorer needs both kinds: "
            f"collect more questions, {'harder' if correct else 'easier'} ones"
        )


def check_answers(reader: Reader, shards: tuple[int, ...], where: str) -> None:
    """Raise TrainError where no question has an answer, so that nobody knows which trace is right.

    Labels by vote need none.
    """
    traces = [trace for shard in shards for trace in reader.traces(shard)]
    if not any(trace.correct or trace.answer for trace in traces):
        raise TrainError(
            f"{where}: none has an answer (collect --no-answers), so no trace is known to be "
            "right: `train --labels vote` takes what a question's traces agree on; to measure or "
            "to calibrate, give a store with true answers"
        )
