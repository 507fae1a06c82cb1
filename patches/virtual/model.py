"""The model that plays traces, see ``step_sglang.simulation.model``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import nn

from step_sglang.simulation import model as player


class TracePlayer(nn.Module):
    """Emits the tokens of recorded traces, and hidden states that the scorer reads as recorded."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config)
        self._codes = player.codes(torch.arange(config.vocab_size))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the traces from the model's file."""
        found = dict(weights)
        self.tokens = found[player.TOKENS].long()
        self.log_odds = found[player.LOG_ODDS]
        self.starts = found[player.TRACES]
        self.questions = found[player.QUESTIONS].tolist()
        self.lm_head.weight.data[: len(found[player.HEAD])] = found[player.HEAD]
        # Of each slot: where its trace's tokens begin and end, and at which position.
        self.begin = torch.zeros(0, dtype=torch.int64)
        self.end = torch.zeros(0, dtype=torch.int64)
        self.prompt = torch.zeros(0, dtype=torch.int64)

    def has(self, question: object) -> bool:
        """Whether it has traces of a question, by its number."""
        return type(question) is int and 0 <= question < len(self.questions) - 1

    def play(self, slot: int, question: int, number: int, prompt: int) -> None:
        """Play a trace in a slot.

        Args:
            slot: the request's row of the pool.
            question: by number.
            number: of the trace among the question's; it begins anew after the last.
            prompt: tokens before the trace's first.
        """
        self._make_room(slot)
        first, end = self.questions[question : question + 2]
        trace = first + number % (end - first)
        self.begin[slot], self.end[slot] = self.starts[trace], self.starts[trace + 1]
        self.prompt[slot] = prompt

    def rest(self, slot: int) -> None:
        """End a slot's next request at once: it plays nothing."""
        self._make_room(slot)
        self.begin[slot] = self.end[slot] = self.prompt[slot] = 0

    def _make_room(self, slot: int) -> None:
        missing = slot + 1 - len(self.begin)
        if missing > 0:
            for name in ("begin", "end", "prompt"):
                more = torch.zeros(missing + slot, dtype=torch.int64)
                setattr(self, name, torch.cat((getattr(self, name), more)))

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **_: Any
    ) -> Any:
        """Hidden states [T, HIDDEN] of the pass; only the last row of a request says anything."""
        slots = forward_batch.req_pool_indices
        if forward_batch.forward_mode.is_decode():
            rows = None
            last = positions
        else:
            rows = torch.cumsum(forward_batch.extend_seq_lens, 0) - 1
            last = positions[rows]
        consumed = self.begin[slots] + last - self.prompt[slots]  # place of the input token
        places = (consumed + 1).clamp(max=len(self.tokens) - 1)
        over = consumed + 1 >= self.end[slots]
        following = torch.where(over, player.END, self.tokens[places])
        odds = torch.where(consumed >= self.begin[slots], self.log_odds[consumed.clamp(min=0)], 0.0)
        states = torch.cat((odds[:, None], -odds[:, None], self._codes[following]), dim=1)
        if rows is not None:
            every = torch.zeros(len(input_ids), player.HIDDEN)
            every[rows] = states
            states = every
        return self.logits_processor(input_ids, states, self.lm_head, forward_batch)


EntryClass = TracePlayer
