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
_TOO_MANY = 429


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

    Where the Hub does not answer, or fails, what the cache holds of the revision is used.

    Raises:
        ScorerError: no such repository, revision or file, none or several scorers in it, a gated
            repository, or no working Hub and nothing in the cache.
    """
    from huggingface_hub import HfApi

    with _explaining(wanted):
        try:
            found = HfApi().model_info(
                wanted.repository, revision=wanted.revision, timeout=_TIMEOUT
            )
            names = [sibling.rfilename for sibling in found.siblings or ()]
            file = wanted.file or _only_scorer(wanted, names)
            if file not in names:
                raise ScorerError(
                    f"{wanted.repository} has no file {file!r} at {wanted.revision or 'main'}"
                )
            return Path(HfApi().hf_hub_download(wanted.repository, file, revision=wanted.revision))
        except Exception as error:
            cached = _cached_names(wanted) if _is_away(error) else []
            if (wanted.file not in cached) if wanted.file else not _scorers(cached):
                raise
            file = wanted.file or _only_scorer(wanted, cached)
            # Offline is said, or it would be tried again and again.
            return Path(
                HfApi().hf_hub_download(
                    wanted.repository, file, revision=wanted.revision, local_files_only=True
                )
            )


def _is_away(error: Exception) -> bool:
    """Whether the Hub did not answer, or failed for a reason of its own."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == _TOO_MANY
    away = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.TransportError)
    return isinstance(error, away)


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


def _scorers(names: Iterable[str]) -> list[str]:
    # A repository of a model holds gigabytes in files of the same kinds.
    return sorted(
        name
        for name in names
        if name.endswith(SUFFIXES) and "scorer" in PurePosixPath(name).name.lower()
    )


def _only_scorer(wanted: HubReference, names: Iterable[str]) -> str:
    found = _scorers(names)
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
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ScorerError(
            f"scorer {wanted} is not in the cache and the Hub fails (HTTP {status}, "
            f"{first_line(error)}): try again later, or give the file's path"
            if _is_away(error)
            else f"the Hub refuses scorer {wanted} (HTTP {status}, {first_line(error)})"
        ) from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise ScorerError(
            f"scorer {wanted} is not in the cache and the Hub does not answer "
            f"({first_line(error)}): connect this machine once, or give the file's path"
        ) from error
    except OSError as error:
        raise ScorerError(f"scorer {wanted} cannot be kept: {first_line(error)}") from error
