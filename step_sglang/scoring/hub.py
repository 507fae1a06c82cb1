"""Scorers in Hugging Face repositories: which file, at which revision, and from the cache offline.

The endpoint, the token and the cache are huggingface_hub's own (``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx

from step_sglang.errors import ScorerError, first_line

SUFFIXES = (".safetensors", ".pt", ".pth")
_REFERENCE = re.compile(r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@]+))?")
_TIMEOUT = 10.0  # seconds, for what a repository holds


@dataclass(frozen=True)
class HubReference:
    """``org/name``, ``org/name/file``, each perhaps with ``@revision``."""

    repository: str
    file: str | None = None  # None: the only scorer that it holds
    revision: str | None = None  # a branch, a tag or a commit; None: the main branch

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{f'/{self.file}' if self.file else ''}{at}"


def parse_reference(text: str) -> HubReference | None:
    """What the text names on the Hub; None where it cannot be such a name."""
    found = _REFERENCE.fullmatch(text)
    if found is None or text.startswith((".", "/", "~")):
        return None
    repository, file, revision = found.groups()
    if file is None and PurePosixPath(repository).suffix in SUFFIXES:
        return None  # a folder and a file in it
    return HubReference(repository, file, revision)


def download(wanted: HubReference) -> Path:
    """The scorer's file in huggingface_hub's cache, downloaded unless it is there.

    Where the Hub does not answer, what the cache holds of the revision is used.

    Raises:
        ScorerError: no such repository, revision or file, none or several scorers in it, a gated
            repository, or no network and nothing in the cache.
    """
    from huggingface_hub import HfApi

    with _explaining(wanted):
        names, online = _names(wanted)
        file = wanted.file or _only_scorer(wanted, names)
        if file not in names and online:
            raise ScorerError(
                f"{wanted.repository} has no file {file!r} at {wanted.revision or 'main'}"
            )
        # Offline is said, or it would be tried again and again.
        return Path(
            HfApi().hf_hub_download(
                wanted.repository, file, revision=wanted.revision, local_files_only=not online
            )
        )


def _names(wanted: HubReference) -> tuple[list[str], bool]:
    """Files of the repository at that revision, and whether the Hub said so or the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        found = HfApi().model_info(wanted.repository, revision=wanted.revision, timeout=_TIMEOUT)
    except (OfflineModeIsEnabled, httpx.TransportError):
        cached = _cached_names(wanted)
        if not cached:
            raise
        return cached, False
    return [sibling.rfilename for sibling in found.siblings or ()], True


def _cached_names(wanted: HubReference) -> list[str]:
    """Files of the repository at that revision that an earlier run left in the cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    revision = wanted.revision or "main"
    return [
        file.file_path.relative_to(snapshot.snapshot_path).as_posix()
        for repository in cache.repos
        if repository.repo_type == "model" and repository.repo_id == wanted.repository
        for snapshot in repository.revisions
        if revision == snapshot.commit_hash or revision in snapshot.refs
        for file in snapshot.files
    ]


def _only_scorer(wanted: HubReference, names: Iterable[str]) -> str:
    # A repository of a model holds gigabytes in files of the same kinds.
    found = sorted(
        name
        for name in names
        if name.endswith(SUFFIXES) and "scorer" in PurePosixPath(name).name.lower()
    )
    if not found:
        raise ScorerError(
            f"{wanted} holds no scorer, which is a file named *scorer*.safetensors or "
            f"*scorer*.pt: name its file, {wanted.repository}/FILE"
        )
    if len(found) > 1:
        raise ScorerError(
            f"{wanted} holds {len(found)} scorers ({', '.join(found[:5])}): name one, "
            f"{wanted.repository}/{found[0]}"
        )
    return found[0]


@contextmanager
def _explaining(wanted: HubReference) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ScorerError(
            f"{wanted.repository} is gated: ask for access on its page, and set HF_TOKEN to a "
            "token of the account that has it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ScorerError(
            f"{wanted.repository} has no branch, tag or commit {wanted.revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ScorerError(
            f"scorer {wanted} does not exist here, and the Hub has no repository "
            f"{wanted.repository}, or a private one: check the name, or set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise ScorerError(
            f"scorer {wanted} is neither a file nor the name of a repository: {first_line(error)}"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise ScorerError(
            f"scorer {wanted} is not in the cache and the Hub does not answer "
            f"({first_line(error)}): connect this machine once, or give the file's path"
        ) from error
    except OSError as error:
        raise ScorerError(f"scorer {wanted} cannot be kept: {first_line(error)}") from error
