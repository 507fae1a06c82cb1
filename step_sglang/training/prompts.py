"""The model's tokenizer for collecting: prompts, boundary tokens, the think-end token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from step_sglang.errors import ServerError, SourceError, first_line
from step_sglang.scoring.boundary import THINK_END, boundary_ids, think_end_id
from step_sglang.training.errors import UnusableTrace

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
            UnusableTrace: the server has no hidden state of some of the boundaries.
            ServerError: the server found other boundaries than this tokenizer does.
        """
        end = len(tokens)
        if self.think_end is not None and self.think_end in tokens:
            end = tokens.index(self.think_end)
        expected = [i for i in range(end) if tokens[i] in self.boundaries]
        kept = positions < end
        # A boundary token that ends the trace is never consumed, so it may lack a hidden state.
        complete = [i for i in expected if i < len(tokens) - 1]
        found = positions[kept].tolist()
        if found not in (expected, complete):
            if set(found) < set(expected):
                raise UnusableTrace(
                    f"the server has no hidden state of {len({*complete} - {*found})} of a trace's "
                    f"{len(complete)} steps: they were not finite (NaN or infinity), or the server "
                    "has another --step-delimiter"
                )
            raise ServerError(
                f"the server found {int(kept.sum())} boundaries where this tokenizer finds "
                f"{len(expected)}: give `collect` the server's model and its --step-delimiter"
            )
        return np.asarray(kept, bool)

    def asked(self, prompt: str) -> str:
        """The last user message of a rendered prompt, without the suffix; another text as it is."""
        if self._around_user is None:
            return prompt
        before, after = self._around_user
        _, begun, rest = prompt.rpartition(before)
        message, ended, _ = rest.partition(after)
        return message.removesuffix(self.suffix) if begun and ended else prompt

    @cached_property
    def _around_user(self) -> tuple[str, str] | None:
        """What the template writes before and after each user message, where that can be told."""
        told, asked, said = "some rules", "one question", "one answer"
        user, turn = ("user", asked), [("user", asked), ("assistant", said), ("user", asked)]
        try:
            head, middle, tail = self._chat(turn).split(asked)
        except Exception:  # the template wants other turns, or says a message otherwise
            return None
        after = _common_start([middle.split(said)[0], tail])
        heads = [head, middle]
        with suppress(Exception):  # it wants no system message
            heads.append(self._chat([("system", told), user]).split(asked)[0])
        before = _common_end(heads)
        if not any(map(str.isalpha, before)):  # a system message is part of the user's
            before = _common_end(heads[:2])
        return (before, after) if before and after else None

    def _rendered(self, question: str) -> str:
        return self._chat([("user", question + self.suffix)])

    def _chat(self, turns: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )


def _common_start(texts: Sequence[str]) -> str:
    same = takewhile(lambda letters: len({*letters}) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def load_prompter(
    model: str,
    delimiters: Sequence[str],
    scope_all: bool = False,
    suffix: str = "",
    revision: str | None = None,
) -> Prompter:
    """Load a model's tokenizer and configuration, not its weights.

    ``revision``: a branch, a tag or a commit; None: the main branch.

    Raises:
        SourceError: there is no such model, or it has no chat template.
        BoundaryError: no token contains a delimiter.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    except Exception as error:
        at = f" at {revision}" if revision else ""
        raise SourceError(
            f"cannot load the tokenizer of {model}{at}: {first_line(error)}"
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        raise SourceError(f"the tokenizer of {model} has no chat template to ask a question with")
    return Prompter(
        tokenizer,
        int(config.hidden_size),
        frozenset(boundary_ids(tokenizer, delimiters)),
        None if scope_all else think_end_id(tokenizer, THINK_END),
        suffix,
    )
