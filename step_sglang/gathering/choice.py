"""Decides which groups are kept: by the group's id alone, so that everybody decides alike."""

from __future__ import annotations

import hashlib

MIN_TRACES = 4  # of fewer, "most agree" says nothing
_PERSON = b"step-sample"  # no other choice by a group's id is correlated with this one


def is_chosen(group: str, share: float) -> bool:
    """Whether a group is one of the ``share`` of all groups that are kept.

    The same in every process and version. What is chosen at a small share is at a larger one too.
    """
    digest = hashlib.blake2b(group.encode(), digest_size=8, person=_PERSON).digest()
    return int.from_bytes(digest, "big") < share * 2**64
