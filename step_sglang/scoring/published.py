"""Scorers that others have published, by the model they were trained for, and how they arrive.

Owns the table behind ``--step-scorer auto`` and the download from a GitHub repository at a fixed
commit. What is in the file is read elsewhere.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import httpx

from step_sglang import files
from step_sglang.errors import ScorerError, first_line
from step_sglang.scoring.first_build import cache_folder

RAW_VARIABLE = "STEP_SGLANG_GITHUB_RAW"  # a mirror of what follows
RAW_GITHUB = "https://raw.githubusercontent.com"
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # seconds
_MAX_BYTES = 256 << 20  # as for any scorer file


@dataclass(frozen=True)
class Published:
    """A scorer in a GitHub repository, as it was at one commit."""

    model: str  # what it was trained for, by its name on the Hub
    hidden_size: int  # of that model
    repository: str
    commit: str
    path: str
    blob: str  # git's id of the file: sha1 of "blob SIZE\0" and its bytes

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.repository}/{self.path}@{self.commit[:12]}"


def _of_the_paper(model: str, hidden_size: int, file: str, blob: str) -> Published:
    return Published(
        model,
        hidden_size,
        "Supercomputing-System-AI-Lab/STEP",
        "8ef9d1e277f3df8ec5e02c1a5769237b3ddd977e",
        f"STEP/step_scorer_checkpoint/{file}",
        blob,
    )


# Gambit (Dao-AILab/gambit-parallel-reasoning, gambit/step_scorer_checkpoint) ships the same three
# files: git knows them by the same ids.
PUBLISHED = (
    _of_the_paper(
        "Qwen/Qwen3-4B-Thinking-2507",
        2560,
        "Qwen3-4B_step_scorer.pt",
        "cff04f1cb70df80064d231ceec69e120e2bdcf60",
    ),
    _of_the_paper(
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        4096,
        "DeepSeek-R1-0528-Qwen3-8B_step_scorer.pt",
        "0b9efbe34f044df5a3cbc2cb1518f18cd8a6d297",
    ),
    _of_the_paper(
        "microsoft/Phi-4-reasoning-plus",
        5120,
        "Phi-4-reasoning-plus_step_scorer.pt",
        "9d44d6e91119bbb173bc1ab9dd9c67408d001a70",
    ),
)


def download(scorer: Published) -> Path:
    """The file: from the cache without any network, or downloaded now, checked and kept.

    Raises:
        ScorerError: no network, no such file, another file than the table's, or no room for it.
    """
    file = cache_folder() / "scorers" / scorer.blob / Path(scorer.path).name
    if file.is_file():
        return file
    base = os.environ.get(RAW_VARIABLE, RAW_GITHUB).rstrip("/")
    url = f"{base}/{scorer.repository}/{scorer.commit}/{scorer.path}"
    try:
        data = _get(url)
    except httpx.HTTPStatusError as error:
        raise ScorerError(
            f"the scorer of {scorer.model} cannot be downloaded: {url} answers "
            f"{error.response.status_code}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ScorerError(
            f"the scorer of {scorer.model} is not in {file.parent} and cannot be downloaded from "
            f"{url} ({first_line(error)}): connect this machine once, or give the file's path"
        ) from error
    if git_blob_id(data) != scorer.blob:
        raise ScorerError(
            f"{url} is another file than the scorer of {scorer.model} that this version knows "
            f"(git id {git_blob_id(data)}, not {scorer.blob}): give the path of one you trust"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, data)
    except OSError as error:
        raise ScorerError(
            f"the scorer of {scorer.model} cannot be kept in {file.parent}: {error.strerror}; "
            "set STEP_CACHE to a folder that can be written"
        ) from error
    return file


def _get(url: str) -> bytes:
    with httpx.stream("GET", url, timeout=_TIMEOUT, follow_redirects=True) as answer:
        answer.raise_for_status()
        data = bytearray()
        for part in answer.iter_bytes():
            data += part
            if len(data) > _MAX_BYTES:
                raise ScorerError(f"{url} has more than {_MAX_BYTES} bytes; that is no scorer")
        return bytes(data)


def git_blob_id(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
