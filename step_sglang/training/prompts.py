"""The model's tokenizer for collecting: prompts, boundary tokens, the think-end token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step_sglang.errors import ServerError, SourceError, first_line
from step_sglang.scoring.boundary import THINK_END, boundary_ids, think_end_id

_OPEN_THINK = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Prompter:
    """A tokenizer, with its boundary tokens and its think-end token."""

    tokenizer: Any  # of transformers
    hidden_size: int
    boundaries: frozenset[int]
    think_end: int | None  # None: steps after the thinking count too
    suffix: str = ""  # appended to every question

    def prompt(self, question: str) -> list[int]:
        """Token ids of one user message under the chat template."""
        return list(self.tokenizer.encode(self._rendered(question), add_special_tokens=False))

    def output(self, question: str, text: str) -> list[int]:
        """Token ids of an existing trace as it follows the prompt."""
        if _OPEN_THINK.search(self._rendered(question)):
            # The template wrote <think> already.
            text = re.sub(r"^\s*<think>", "", text)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def keep(self, tokens: Sequence[int], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[S] which of the server's boundaries are scored, after checking them against the tokens.

        Raises:
            ServerError: the server found other boundaries than this tokenizer does.
        """
        end = len(tokens)
        if self.think_end is not None and self.think_end in tokens:
            end = tokens.index(self.think_end)
        expected = [i for i in range(end) if tokens[i] in self.boundaries]
        kept = positions < end
        # A boundary token that ends the trace is never consumed, so it may lack a hidden state.
        complete = [i for i in expected if i < len(tokens) - 1]
        if positions[kept].tolist() not in (expected, complete):
            raise ServerError(
                f"the server found {int(kept.sum())} boundaries where this tokenizer finds "
                f"{len(expected)}: give `collect` the server's model and its --step-delimiter"
            )
        return np.asarray(kept, bool)

    def _rendered(self, question: str) -> str:
        messages = [{"role": "user", "content": question + self.suffix}]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )


def load_prompter(
    model: str, delimiters: Sequence[str], scope_all: bool = False, suffix: str = ""
) -> Prompter:
    """Load a model's tokenizer and configuration, not its weights.

    Raises:
        SourceError: there is no such model, or it has no chat template.
        BoundaryError: no token contains a delimiter.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise SourceError(f"cannot load the tokenizer of {model}: {first_line(error)}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise SourceError(f"the tokenizer of {model} has no chat template to ask a question with")
    return Prompter(
        tokenizer,
        int(config.hidden_size),
        frozenset(boundary_ids(tokenizer, delimiters)),
        None if scope_all else think_end_id(tokenizer, THINK_END),
        suffix,
    )
