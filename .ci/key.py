"""Prints a short hash of the pinned requirements, the key of a shared environment."""

import hashlib
import sys
import tomllib
from pathlib import Path

with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
    project = tomllib.load(file)
pinned = (
    sys.version_info[:2],
    project["project"]["dependencies"],
    project["project"]["optional-dependencies"],
    project["dependency-groups"],
)
print(hashlib.sha256(repr(pinned).encode()).hexdigest()[:16])
