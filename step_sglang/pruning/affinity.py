"""Decides which data-parallel replica serves a group. Keeps no state about groups.

All members must meet on one replica, also those that come late or from another client, so the
replica is a function of the group's id.
"""

from __future__ import annotations

import hashlib
import itertools
import uuid


def replica_of(group: str, replicas: int) -> int:
    """The replica, from 0, of a group; the same in every process and version."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % replicas


class GroupIds:
    """Ids for groups that nobody named, to each replica in turn.

    Hashed ids alone would load replicas unevenly, so ids are drawn until one belongs to the next.
    """

    def __init__(self, replicas: int) -> None:
        self._turns = itertools.cycle(range(replicas))
        self._replicas = replicas

    def new(self) -> str:
        """A fresh id."""
        wanted = next(self._turns)
        while True:
            group = uuid.uuid4().hex
            if replica_of(group, self._replicas) == wanted:
                return group
