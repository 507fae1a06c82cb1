"""Folders and files that a kill or a full disk leaves as they were or as they should be."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def lock(folder: Path) -> int:
    """A handle that keeps other writers out of a folder until it is closed.

    Raises:
        BlockingIOError: another process has it.
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def append(handle: int, data: bytes) -> None:
    """Add all of ``data`` to an open file and wait until it is on disk, or add nothing.

    Raises:
        OSError: the disk is full or fails.
    """
    size = os.fstat(handle).st_size
    try:
        _write_all(handle, data)
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise


def write(file: Path, data: bytes) -> None:
    """Put ``data`` in the place of a file, on disk, or leave the file as it was.

    Raises:
        OSError: the disk is full or fails.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
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
