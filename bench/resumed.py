"""Files of JSON lines that a stopped run goes on with. Not a script.

The first line holds the settings that all others depend on; a kill may cut the last one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SETTINGS = "settings"


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file, of which the last is removed if it was cut. Empty without a file."""
    if not file.exists():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def rewrite(file: Path, settings: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write settings and rows anew."""
    lines = [{SETTINGS: settings}, *rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def resumed(file: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there already; a file that is new or empty begins with the settings.

    Exits with one line where the rows are of other settings, or nobody knows of which.
    """
    lines = whole_lines(file)
    if not lines:
        rewrite(file, settings, ())
        return []
    theirs = lines[0].get(SETTINGS)
    if theirs is None:
        sys.exit(
            f"{file} does not state its settings, as an earlier version wrote it: show what it has "
            "with --report, and go on in another --out"
        )
    ours = json.loads(json.dumps(settings))
    different = [
        f"{name} {theirs.get(name)!r}, now {ours.get(name)!r}"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        sys.exit(f"{file} is of other settings ({'; '.join(different)}): choose another --out")
    return lines[1:]


def reported(file: Path) -> list[dict[str, Any]]:
    """All rows of a file, which is left alone; an earlier version's has no settings."""
    lines = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    rows = [line for line in lines if SETTINGS not in line]
    if not rows:
        sys.exit(f"{file} has no results yet")
    if len(rows) == len(lines):
        print(f"{file} does not state its settings, as an earlier version wrote it")
    else:
        print(f"{file}: {json.dumps(lines[0][SETTINGS])}")
    return rows
