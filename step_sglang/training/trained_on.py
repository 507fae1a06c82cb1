"""Which questions a scorer was trained on, so that nobody measures or calibrates it by them.

A scorer file holds hashes of their ids, not the questions: of more than :data:`_MOST` the smallest
hashes, which find a share of any others that are the same.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from step_sglang.training.reader import Reader

KEY = "question_hashes"  # in a scorer file's training figures
_BYTES = 6  # of a hash: those of a million questions meet one of ours with a chance of 1e-5
_MOST = 4096  # what a scorer file's header has room for


def question_hashes(reader: Reader, shards: Sequence[int]) -> str:
    """Of the questions in some shards, as the file states them."""
    found = sorted(_hashes(reader, shards))[:_MOST]
    return base64.b64encode(b"".join(found)).decode()


def trained_on(training: Mapping[str, Any], reader: Reader) -> int | None:
    """How many of a store's questions a scorer was trained on; None: its file does not say.

    Of a scorer of very many questions those that are known, at least.
    """
    try:
        stated = base64.b64decode(training[KEY], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        return None
    known = {stated[at : at + _BYTES] for at in range(0, len(stated), _BYTES)}
    return len(known & _hashes(reader, reader.shards))


def _hashes(reader: Reader, shards: Iterable[int]) -> set[bytes]:
    names = (reader.traces(shard)[0].question_id for shard in shards)
    return {hashlib.sha256(name.encode()).digest()[:_BYTES] for name in names}
