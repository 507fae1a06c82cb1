"""Folders and files that a kill or a full disk leaves as they were or as they should be.

Knows nothing of what is in them, nor of the errors of their owners, which are handed in.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LockedFolder:
    """A folder that one process writes at a time: settings, and a file of lines that only grows.

    ``error`` is what its owner raises; every failure of the disk becomes one.
    """

    def __init__(self, path: Path, error: Callable[[str], Exception]) -> None:
        """Create the folder if need be, and keep other writers out until :meth:`close`.

        Raises:
            Exception: ``error``: it cannot be created, or another process writes to it.
        """
        self.path = path
        self._error = error
        self._lines: Lines | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
        except BlockingIOError as problem:
            raise error(f"{path} is being written by another process") from problem
        except OSError as problem:
            raise error(f"cannot write to {path}: {problem.strerror}") from problem

    def close(self) -> None:
        """Let the next writer in."""
        if self._lines is not None:
            self._lines.close()
        os.close(self._lock)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Around what an owner does before it is usable: when that fails, the folder is closed."""
        try:
            with self.writing("what is there stays"):
                yield
        except BaseException:
            self.close()
            raise

    @contextmanager
    def writing(self, kept: str) -> Iterator[None]:
        """Turns a failure of the disk into the owner's error, which says what is ``kept``."""
        try:
            yield
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._error(
                    f"the disk is full: {kept}; free some space and run the same command again"
                ) from problem
            raise self._error(
                f"writing to {self.path} failed: {problem.strerror}; {kept}"
            ) from problem

    def agree(
        self,
        name: str,
        ours: Mapping[str, Any],
        read: Callable[[Path], Mapping[str, Any]],
        advise: Callable[[Mapping[str, Any]], str] = lambda differing: "",
    ) -> None:
        """Write the settings that all of the folder has in common, or find them there already.

        Args:
            name: of their file.
            ours: JSON values. What an earlier version did not write counts as equal.
            read: reads the folder's.
            advise: says how to have the folder's settings, given those that are others now.

        Raises:
            Exception: the owner's error: the folder's settings are others.
            OSError: the disk is full or fails.
        """
        file = self.path / name
        ours = json.loads(json.dumps(ours))
        if not file.exists():
            write(file, (json.dumps(ours, indent=2, sort_keys=True) + "\n").encode())
            return
        theirs = read(self.path)
        differing = {key: theirs[key] for key in sorted(theirs) if ours.get(key) != theirs[key]}
        if differing:
            shown = "; ".join(f"{k} {was!r}, now {ours.get(k)!r}" for k, was in differing.items())
            raise self._error(
                f"{self.path} was filled with other settings ({shown}): use the "
                f"same{advise(differing)}, or another folder"
            )

    def open_lines(self, name: str) -> int:
        """Open the file of lines, remove what a kill left of the last; returns its bytes.

        Raises:
            OSError: the disk fails.
        """
        self._lines = Lines(self.path / name)
        return self._lines.torn

    def append(self, data: bytes) -> None:
        """Add whole lines and wait until they are on disk, or add nothing.

        Raises:
            OSError: the disk is full or fails.
        """
        assert self._lines is not None, "open_lines comes first"
        self._lines.append(data)


class Lines:
    """A file of lines that only grows. ``torn``: bytes of a last line that a kill left and that
    were removed.
    """

    def __init__(
        self,
        file: Path,
        *,
        lock: bool = False,
        mode: int = 0o644,
        check: Callable[[bytes], None] | None = None,
    ) -> None:
        """Open it, or make it.

        Args:
            file: where.
            lock: whether other processes that ask for it are kept out until :meth:`close`.
            mode: of a new file.
            check: gets what is there, before anything is removed; what it raises leaves the file
                as it was.

        Raises:
            BlockingIOError: with ``lock``: another process writes to it.
            OSError: the disk fails.
        """
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
        try:
            if lock:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = file.read_bytes()
            if check is not None:
                check(data)
            self.torn = len(data) - (data.rfind(b"\n") + 1)
            if self.torn:
                os.ftruncate(self._handle, len(data) - self.torn)
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, data: bytes) -> None:
        """Add whole lines and wait until they are on disk, or add nothing.

        Raises:
            OSError: the disk is full or fails.
        """
        size = os.fstat(self._handle).st_size
        try:
            _write_all(self._handle, data)
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, size)
            raise

    def close(self) -> None:
        """Let the next writer in."""
        os.close(self._handle)


def _lock(folder: Path) -> int:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def write(file: Path, data: bytes) -> None:
    """Put ``data`` in the place of a file, on disk, or leave the file as it was.

    Several processes may write the same file: one of them wins, and it is whole.

    Raises:
        OSError: the disk is full or fails.
    """
    # Ids of processes repeat in containers that share a folder.
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        partial.unlink(missing_ok=True)  # give the space back
        raise
    partial.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
