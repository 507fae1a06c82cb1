"""Feeds training steps in random order within a memory limit, in the dtype on disk."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from step_sglang.training.reader import Reader
from step_sglang.training.table import Floats, TraceTable, build_table


@dataclass(frozen=True, eq=False)
class Chunk:
    """The steps of some questions, in memory at once."""

    hidden: torch.Tensor  # [S, d] in the store's dtype
    table: TraceTable
    label: torch.Tensor  # [S] fp32, 1 = the step's trace is correct


class Chunks:
    """The steps of some shards in chunks of whole questions, reshuffled every epoch."""

    def __init__(self, reader: Reader, shards: Sequence[int], memory_bytes: int, seed: int) -> None:
        """Loads nothing yet. The smallest chunk is one question."""
        self._reader = reader
        self._shards = list(shards)
        self._rng = random.Random(seed)
        row = reader.meta.hidden_size * (4 if reader.meta.dtype == "float32" else 2)
        self._max_rows = max(1, memory_bytes // row)
        self._kept: Chunk | None = None
        traces = [trace for shard in shards for trace in reader.traces(shard)]
        self.rows = sum(trace.num_steps for trace in traces)
        self.positive_rows = sum(trace.num_steps for trace in traces if trace.correct)

    def __iter__(self) -> Iterator[Chunk]:
        if self.rows <= self._max_rows:
            if self._kept is None:
                self._kept = self._load(self._shards)
            yield self._kept
            return
        self._rng.shuffle(self._shards)
        for shards in self._plan():
            yield self._load(shards)

    def _plan(self) -> Iterator[list[int]]:
        group: list[int] = []
        rows = 0
        for shard in self._shards:
            more = sum(trace.num_steps for trace in self._reader.traces(shard))
            if group and rows + more > self._max_rows:
                yield group
                group, rows = [], 0
            group.append(shard)
            rows += more
        yield group

    def _load(self, shards: Sequence[int]) -> Chunk:
        table = build_labels(self._reader, shards)
        hidden: torch.Tensor | None = None
        start = 0
        for shard in shards:
            part = self._reader.load(shard).hidden
            if hidden is None:  # filled in place: joining a list would need twice the memory
                hidden = torch.empty(int(table.offsets[-1]), part.shape[1], dtype=part.dtype)
            hidden[start : start + len(part)] = part
            start += len(part)
        assert hidden is not None
        label = torch.from_numpy(table.correct[table.step_trace].astype(np.float32))
        return Chunk(hidden, table, label)


def build_labels(reader: Reader, shards: Sequence[int]) -> TraceTable:
    """The trace table of some shards."""
    return build_table([reader.traces(shard) for shard in shards])


def score_steps(reader: Reader, shards: Sequence[int], network: torch.nn.Module) -> Floats:
    """Step scores (after the sigmoid) of some shards, [S] in their order, one shard at a time."""
    parts: list[Floats] = [np.zeros(0)]
    with torch.inference_mode():
        for shard in shards:
            for rows in reader.load(shard).hidden.split(4096):  # type: ignore[no-untyped-call]
                parts.append(torch.sigmoid(network(rows.float())).double().numpy())
    return np.concatenate(parts)
