"""Reads a store: all traces at once, hidden states one shard at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch

from step_sglang.training.errors import StoreError
from step_sglang.training.index import (
    TENSOR,
    check_shard,
    read_meta,
    scan_index,
    shard_path,
    traces_by_shard,
)
from step_sglang.training.stored import StoredTrace, StoreMeta


@dataclass(frozen=True, eq=False)
class Shard:
    """The traces of one question."""

    number: int
    traces: tuple[StoredTrace, ...]
    hidden: torch.Tensor  # [rows, d] in the store's dtype


class Reader:
    """A store's complete questions. Only one shard's hidden states are in memory at a time."""

    def __init__(
        self, folder: str | os.PathLike[str], skip_bad: bool = False, with_text: bool = False
    ) -> None:
        """Read the index and every shard once, so that a damaged one is known from the start.

        Args:
            folder: the store.
            skip_bad: leave out questions whose shard is damaged, instead of raising.
            with_text: keep the traces' texts in memory.

        Raises:
            StoreError: no store, no complete question, or (without ``skip_bad``) a damaged shard.
        """
        self.folder = Path(folder)
        self.meta: StoreMeta = read_meta(self.folder)
        scan = scan_index(self.folder, self.meta.n, with_text)
        self.problems = list(scan.problems)
        self._shards: dict[int, tuple[StoredTrace, ...]] = {}
        for shard, traces in traces_by_shard(scan.traces).items():
            problem = check_shard(self.folder, self.meta, shard, traces)
            if problem is not None:
                problem += ". Run the same `collect` again to repair the store"
            else:
                self._shards[shard] = traces
                try:
                    self.load(shard)
                except StoreError as error:
                    problem = str(error)
                    del self._shards[shard]
            if problem is not None and not skip_bad:
                raise StoreError(f"{problem}; --skip-bad-shards leaves such questions out")
            if problem is not None:
                self.problems.append(problem)
        if not self._shards:
            raise StoreError(f"{self.folder} holds no complete, undamaged question yet")

    @property
    def shards(self) -> tuple[int, ...]:
        """Numbers of the usable shards, one per question."""
        return tuple(self._shards)

    def traces(self, shard: int) -> tuple[StoredTrace, ...]:
        """The traces of one shard, without their hidden states."""
        return self._shards[shard]

    def load(self, shard: int) -> Shard:
        """One shard with its hidden states.

        Raises:
            StoreError: the file changed or broke since it was checked, or holds NaN or infinity.
        """
        file = shard_path(self.folder, shard)
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                hidden: torch.Tensor = opened.get_tensor(TENSOR)
        except (OSError, safetensors.SafetensorError) as error:
            raise StoreError(f"{file} is corrupt or truncated: {error}") from error
        if not bool(torch.isfinite(hidden).all()):
            raise StoreError(f"{file} holds NaN or infinity")
        return Shard(shard, self._shards[shard], hidden)

    def stream(self) -> Iterator[Shard]:
        """Every usable shard in turn."""
        for number in self.shards:
            yield self.load(number)
