"""A folder of bounded size into which processes write kept groups, each into files of its own.

    about.json                     whose model's traces these are
    groups-TIME-PROCESS.jsonl      a line for each group, the oldest in the first file by name

When the folder is full the oldest file makes room, but none that somebody still writes to.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from step_sglang import files
from step_sglang.errors import ConfigError
from step_sglang.files import Lines

ABOUT = "about.json"
MODEL = "model"
_FILES = "groups-*.jsonl"
_PARTS = 8  # files that a full folder has, about: so much is lost at a time
MEGABYTE = 1_000_000


def prepare(folder: Path, model: str) -> None:
    """Make the folder for a server of this model, or find it fit for one.

    Raises:
        ConfigError: it cannot be written, or holds traces of another model.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        theirs = model_of(folder)
        if theirs is None:
            files.write(folder / ABOUT, (json.dumps({MODEL: model}) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--step-sample {folder}: cannot write there ({error.strerror}): give a folder that "
            "the server may write to"
        ) from error
    if theirs not in (None, model):
        raise ConfigError(
            f"--step-sample {folder} holds groups of {theirs}, and this server serves {model}: "
            "give each model a folder of its own"
        )


def model_of(folder: Path) -> str | None:
    """Whose traces a folder of kept groups holds; None for any other folder."""
    try:
        value = json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    model = value.get(MODEL) if isinstance(value, dict) else None
    return model if isinstance(model, str) else None


class Folder:
    """One process's way into such a folder. Not for several threads at once."""

    def __init__(self, path: Path, limit: int) -> None:
        """Opens nothing yet. ``limit``: bytes of all files."""
        self._path, self._limit = path, limit
        self._file: Path | None = None
        self._lines: Lines | None = None

    def add(self, data: bytes) -> bool:
        """Write a group's line to the disk, or nothing; False where it does not fit.

        Raises:
            OSError: the disk is full or fails, or the folder is gone.
        """
        if len(data) > self._limit:
            return False
        if self._file is not None and not self._fits_into_file(len(data)):
            self.close()
        if not self._make_room(len(data)):
            # With many processes all files are held before any of them is full: ours may go.
            self.close()
            if not self._make_room(len(data)):
                return False
        if self._lines is None:
            self._open()
        assert self._lines is not None
        try:
            self._lines.append(data)
        except OSError:
            self.close()
            raise
        return True

    def close(self) -> None:
        """Let others remove what was written; a file without anything goes at once."""
        if self._lines is not None:
            assert self._file is not None
            with suppress(OSError):
                if self._file.stat().st_size == 0:
                    self._file.unlink()
            self._lines.close()
        self._lines = self._file = None

    def _fits_into_file(self, more: int) -> bool:
        assert self._file is not None
        try:
            return self._file.stat().st_size + more <= self._limit // _PARTS
        except FileNotFoundError:  # whoever has read it may remove it
            return False

    def _open(self) -> None:
        file = self._path / f"groups-{time.time_ns() // 1000}-{os.getpid()}.jsonl"
        self._lines, self._file = Lines(file, lock=True, mode=0o600), file

    def _make_room(self, size: int) -> bool:
        known = [(file, _size(file)) for file in sorted(self._path.glob(_FILES))]
        excess = sum(held for _, held in known) + size - self._limit
        for file, held in known:
            if excess <= 0:
                break
            if file != self._file and _removed(file):
                excess -= held
        return excess <= 0


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _removed(file: Path) -> bool:
    """Remove a file unless somebody writes to it; whether it is gone."""
    try:
        handle = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
