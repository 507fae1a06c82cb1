"""Writes collected traces to a folder so that a kill at any moment loses and repeats nothing.

    meta.json                     how it was collected
    index.jsonl                   one line per trace
    shards/000042.safetensors     `hidden` [rows, d], one row per step, one shard per question

A question's shard is written first, then its n index lines in one append. A shard without lines is
what a kill left and is removed; a question without all its lines does not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from step_sglang import files
from step_sglang.files import LockedFolder
from step_sglang.training.errors import StoreError
from step_sglang.training.index import (
    INDEX,
    META,
    SHARDS,
    TENSOR,
    check_shard,
    read_meta,
    scan_index,
    shard_path,
    traces_by_shard,
)
from step_sglang.training.stored import DTYPES, StoredQuestion, StoreMeta


class Writer:
    """Adds questions to a store, one writer at a time. Opening it repairs what a kill left."""

    def __init__(self, folder: Path, meta: StoreMeta) -> None:
        """Open or create the store.

        Raises:
            StoreError: the folder holds traces collected in another way, is in use by another
                writer, or cannot be written.
        """
        self.folder = folder
        self.meta = meta
        self.repairs: tuple[str, ...] = ()
        self._done: set[str] = set()
        self._files = LockedFolder(folder, StoreError)
        with self._files.opening():
            (folder / SHARDS).mkdir(exist_ok=True)
            self._agree()
            self._repair()
            self._files.open_lines(INDEX)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def done(self) -> frozenset[str]:
        """Ids of the questions that are complete."""
        return frozenset(self._done)

    def add(self, result: StoredQuestion) -> None:
        """Write all n traces of one question, or nothing.

        Raises:
            StoreError: the result does not fit the store, or the disk is full or fails; what was
                added before stays usable.
        """
        hidden = self._checked(result)
        first_row = 0
        lines: list[str] = []
        for trace in result.traces:
            placed = replace(trace, shard=self._next, first_row=first_row)
            lines.append(json.dumps(placed.as_json(), ensure_ascii=False, allow_nan=False) + "\n")
            first_row += trace.num_steps
        with self._files.writing(f"the {len(self._done)} questions in {self.folder} stay usable"):
            files.write(shard_path(self.folder, self._next), save({TENSOR: hidden}))
            self._files.append("".join(lines).encode())
        self._done.add(result.traces[0].question_id)
        self._next += 1

    def _checked(self, result: StoredQuestion) -> torch.Tensor:
        names = {trace.question_id for trace in result.traces}
        if len(names) != 1 or sorted(r.sample for r in result.traces) != list(range(self.meta.n)):
            raise StoreError(f"a question's result must hold samples 0 to {self.meta.n - 1} once")
        name = names.pop()
        if name in self._done:
            raise StoreError(f"question {name} is in {self.folder} already")
        rows = sum(trace.num_steps for trace in result.traces)
        if tuple(result.hidden.shape) != (rows, self.meta.hidden_size):
            raise StoreError(
                f"question {name}: hidden states of shape {list(result.hidden.shape)}, expected "
                f"[{rows}, {self.meta.hidden_size}]: is this server running {self.meta.model}?"
            )
        hidden = result.hidden.to(DTYPES[self.meta.dtype]).contiguous()
        if not bool(torch.isfinite(result.hidden).all()):
            raise StoreError(
                f"question {name}: hidden states hold NaN or infinity, as the model computed them"
            )
        if not bool(torch.isfinite(hidden).all()):
            raise StoreError(
                f"question {name}: hidden states hold values too large for {self.meta.dtype}: "
                "collect into a new folder with --dtype bfloat16"
            )
        return hidden

    def _agree(self) -> None:
        if (self.folder / INDEX).exists() and not (self.folder / META).exists():
            raise StoreError(f"{self.folder} has an {INDEX} but no {META}: not a usable store")
        self._files.agree(
            META, self.meta.as_json(), lambda folder: read_meta(folder).as_json(), _how_to_agree
        )

    def _repair(self) -> None:
        scan = scan_index(self.folder, self.meta.n)
        repairs = list(scan.problems)
        bad: set[int] = set()
        for shard, traces in traces_by_shard(scan.traces).items():
            problem = check_shard(self.folder, self.meta, shard, traces)
            if problem:
                bad.add(shard)
                repairs.append(f"{problem}; its question is collected again")
        pairs = zip(scan.traces, scan.kept_lines, strict=True)
        kept = [(trace, line) for trace, line in pairs if trace.shard not in bad]
        if sum(len(line) for _, line in kept) != scan.size:
            files.write(self.folder / INDEX, b"".join(line for _, line in kept))
        used = {shard_path(self.folder, trace.shard) for trace, _ in kept}
        for file in sorted((self.folder / SHARDS).iterdir()):
            if file not in used:
                repairs.append(f"removed {file}, which no complete question uses")
                file.unlink()
        self._next = max((trace.shard for trace, _ in kept), default=-1) + 1
        self._done = {trace.question_id for trace, _ in kept}
        self.repairs = tuple(repairs)


def _how_to_agree(differing: Mapping[str, Any]) -> str:
    revision = differing.get("revision")
    return f" (--revision {revision})" if revision else ""
