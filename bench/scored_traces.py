"""The embedded reasoner's traces and the scores of their steps, from any prefix, without a server.

Many at once in one batch, with the network that the reasoner is trained with. Not a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from reasoner_store import sample

from step_sglang.reasoner import Question, model_path, scorer_path
from step_sglang.reasoner.network import load
from step_sglang.reasoner.task import final_answer
from step_sglang.scoring.reference import step_logits
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.prompts import load_prompter

MAX_NEW = 900  # tokens of a trace, as the bench has it


@dataclass(frozen=True)
class ScoredTrace:
    """Its output tokens, and position and score of each of its steps."""

    tokens: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def sums(self) -> list[float]:
        """Of the step scores up to each."""
        return list(accumulate(self.scores))

    def until(self, position: int) -> ScoredTrace:
        """Up to the token at ``position``, the score of a step that ends there included."""
        steps = sum(p <= position for p in self.positions)
        return ScoredTrace(self.tokens[: position + 1], self.positions[:steps], self.scores[:steps])


class TraceSource:
    """Samples traces at temperature 1, as the bench does.

    Args:
        name: of the reasoner.
        seed: of the sampling.
        rows: traces in one batch.
    """

    def __init__(self, name: str, seed: int, rows: int = 512) -> None:
        torch.set_num_threads(1)
        self._model = load(model_path(name)).eval()
        self._prompter = load_prompter(str(model_path(name)), ("\n\n",))
        self._scorer = load_scorer(scorer_path(name))
        self.calibration = self._scorer.info.calibration
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = rows
        self._eos = self._prompter.tokenizer.eos_token_id

    def prompt(self, question: Question) -> list[int]:
        """Its tokens."""
        return self._prompter.prompt(question.question)

    def answer(self, trace: ScoredTrace) -> str | None:
        """What it ends in."""
        return final_answer(self._prompter.tokenizer.decode(list(trace.tokens)))

    def sample(self, wanted: Sequence[tuple[Question, ScoredTrace]]) -> list[ScoredTrace]:
        """A trace of each question that goes on from a prefix."""
        found: dict[int, ScoredTrace] = {}
        # Alike prefixes together: a batch is as wide as its longest.
        order = sorted(range(len(wanted)), key=lambda i: len(wanted[i][1].tokens))
        for first in range(0, len(order), self._rows):
            part = order[first : first + self._rows]
            found.update(zip(part, self._batch([wanted[i] for i in part]), strict=True))
        return [found[i] for i in range(len(wanted))]

    def _batch(self, wanted: Sequence[tuple[Question, ScoredTrace]]) -> list[ScoredTrace]:
        prompts = [[*self.prompt(question), *prefix.tokens] for question, prefix in wanted]
        sampled = sample(
            self._model, prompts, self._prompter.boundaries, self._eos, MAX_NEW, self._generator
        )
        hidden = [h for one in sampled for h in one.hidden]
        s, scores = self._scorer, iter(())
        if hidden:
            with torch.inference_mode():
                logits = step_logits(torch.stack(hidden), s.w1, s.b1, s.w2, s.b2)
            scores = iter(torch.sigmoid(logits).tolist())
        traces = []
        for (_, prefix), one in zip(wanted, sampled, strict=True):
            begun = len(prefix.tokens)
            own = [(begun + p, next(scores)) for p in one.positions]
            trace = ScoredTrace(
                (*prefix.tokens, *one.tokens),
                (*prefix.positions, *(p for p, _ in own)),
                (*prefix.scores, *(score for _, score in own)),
            )
            traces.append(self._thinking(trace).until(MAX_NEW - 1))
        return traces

    def _thinking(self, trace: ScoredTrace) -> ScoredTrace:
        """Without the scores of steps after the thinking, which the server does not score."""
        end = self._prompter.think_end
        if end is None or end not in trace.tokens:
            return trace
        last = trace.tokens.index(end)
        steps = sum(p < last for p in trace.positions)
        return ScoredTrace(trace.tokens, trace.positions[:steps], trace.scores[:steps])
