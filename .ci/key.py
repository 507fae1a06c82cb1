"""Prints a short hash of the pinned requirements, the key of a shared environment."""

import hashlib
import re
import sys
import tomllib
from pathlib import Path

with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
    project = tomllib.load(file)
pinned = (
    sys.version_info[:2],
    # Of a range of tested versions, a new environment gets the last: it counts as that one.
    [re.sub(r">=[^,]+,<=", "==", one) for one in project["project"]["dependencies"]],
    project["project"]["optional-dependencies"],
    project["dependency-groups"],
)
print(hashlib.sha256(repr(pinned).encode()).hexdigest()[:16])
