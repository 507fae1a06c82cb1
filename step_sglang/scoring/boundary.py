"""Finds the boundary tokens of a tokenizer: those whose own text contains a step delimiter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from step_sglang.errors import BoundaryError

THINK_END = "</think>"
_BATCH = 16384


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer used here."""

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        ...

    def batch_decode(self, sequences: list[list[int]]) -> list[str]:
        """Decode each sequence by itself."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...


def boundary_ids(tokenizer: Tokenizer, delimiters: Sequence[str]) -> list[int]:
    """Ids of every token whose decoded text contains a delimiter, ascending.

    The whole vocabulary is scanned, because byte-pair merges give many boundary tokens beside the
    delimiter itself (``".\\n\\n"``, ``")\\n\\n"``).

    Raises:
        BoundaryError: no token contains any of the delimiters.
    """
    found: list[int] = []
    size = len(tokenizer)
    for start in range(0, size, _BATCH):
        ids = range(start, min(start + _BATCH, size))
        texts = tokenizer.batch_decode([[i] for i in ids])
        found += [i for i, text in zip(ids, texts, strict=True) if _ends(text, delimiters)]
    if not found:
        shown = ", ".join(repr(text) for text in delimiters)
        raise BoundaryError(
            f"no token of this tokenizer contains the step delimiter {shown}, so no step would "
            "ever be scored: choose text that a single token contains with --step-delimiter"
        )
    return found


def _ends(text: str, delimiters: Sequence[str]) -> bool:
    return any(delimiter in text for delimiter in delimiters)


def bitmap(ids: Sequence[int]) -> torch.Tensor:
    """Pack token ids into the op's bitmap: [ceil(V / 32)] int32, bit ``id & 31`` of ``id >> 5``."""
    words = [0] * ((max(ids) >> 5) + 1)
    for token in ids:
        words[token >> 5] |= 1 << (token & 31)
    # int32 has no room for the unsigned value of bit 31: wrap it.
    signed = [word - (1 << 32) if word >= 1 << 31 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32)


def think_end_id(tokenizer: Tokenizer, text: str = THINK_END) -> int | None:
    """Id of the single token that ends the thinking, or None when the tokenizer has none."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None
