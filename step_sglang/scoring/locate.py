"""From what a user gives for a scorer to a file: the one place, asked before anything is loaded.

``auto`` looks the model up; a path is a path; anything else of the form ``org/name`` is a
repository on the Hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from step_sglang.config import AUTO, NO_SCORER
from step_sglang.errors import ScorerError
from step_sglang.scoring import hub, published
from step_sglang.scoring.published import PUBLISHED, Published

SCORER_FILE = "scorer.safetensors"  # in the folder that `train` writes
_ROOM = Path(__file__).parents[1] / "reasoner"  # not imported: it is a room above
# The embedded models: folder and scorer of each.
_EMBEDDED = {
    "reasoner": ("model", SCORER_FILE),
    "reasoner-dwelling": ("dwelling", "dwelling_scorer.safetensors"),
}
_CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")


def locate_scorer(given: str | os.PathLike[str], model: str) -> str:
    """The file that ``given`` means for a server of ``model``.

    Args:
        given: ``auto``, a file, a folder of `train`, or ``org/name[/file][@revision]`` on the Hub.
            ``none`` and empty stay as they are: some servers need no scorer.
        model: the path or name that is served.

    Raises:
        ScorerError: there is no such scorer, it cannot be downloaded, or ``auto`` knows none.
    """
    given = os.fspath(given)
    if given in ("", NO_SCORER) or (given != AUTO and os.path.isfile(given)):
        return given
    if given == AUTO:
        return str(_known(model))
    if os.path.isdir(given):
        inside = os.path.join(given, SCORER_FILE)
        if not os.path.isfile(inside):
            raise ScorerError(f"the folder {given} holds no {SCORER_FILE}")
        return inside
    if os.path.exists(given):
        return given  # a device, a socket: whoever reads it says what is wrong
    reference = hub.parse_reference(given)
    # A path with a folder that exists is a path, however much it looks like a repository's name.
    if reference is None or os.path.isdir(given.split("/", 1)[0]):
        raise ScorerError(f"scorer {given} does not exist")
    return str(hub.download(reference))


def known_scorer(model: str) -> Published | Path | None:
    """What ``auto`` means for a model: a published scorer, the embedded one, or None."""
    if (embedded := _embedded(model)) is not None:
        return _ROOM / _EMBEDDED[embedded][1]
    name, _ = model_identity(model)
    return next((entry for entry in PUBLISHED if same_model(entry.model, name)), None)


def model_identity(model: str) -> tuple[str, str | None]:
    """A model's name, and its commit where its path is one in huggingface_hub's cache."""
    found = _CACHED.search(model)
    if found is None:
        return model, None
    return f"{found['org']}/{found['name']}", found["commit"]


def model_name(model: str) -> str:
    """What a path or name is called: an embedded model's name, one on the Hub, or itself."""
    return _embedded(model) or model_identity(model)[0]


def model_revision(model: str, wanted: str | None = None) -> str | None:
    """The commit of a model that is in huggingface_hub's cache; None where nothing says it.

    Args:
        model: path or name.
        wanted: the branch, tag or commit that is asked for; None: the main branch.
    """
    if (commit := model_identity(model)[1]) or os.path.exists(model):
        return commit
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=wanted)
    except HFValidationError:
        return None
    return model_identity(found)[1] if isinstance(found, str) else None


def other_model(name: str, commit: str | None, model: str, revision: str | None) -> str | None:
    """How the model that a scorer was trained for differs from a served one; None: it does not.

    Args:
        name: of the scorer's model.
        commit: of the scorer's model, if it is known.
        model: path or name of the served one.
        revision: that was asked for with it.
    """
    served = model_name(model)
    if not same_model(name, served):
        return f"was trained for {name}, and {served} is served"
    now = model_revision(model, revision)
    if commit and now and commit != now:
        return f"was trained for {name} at {commit[:12]}, and {now[:12]} is served"
    return None


def _embedded(model: str) -> str | None:
    """The name of the embedded model whose name or path this is."""
    if model in _EMBEDDED:
        return model
    path = Path(model).resolve()
    found = (name for name, (folder, _) in _EMBEDDED.items() if (_ROOM / folder).resolve() == path)
    return next(found, None)


def same_model(name: str, other: str) -> bool:
    """Whether two names or paths can be one model: a copy in a folder keeps its last part.

    A path that exists is one, however much it looks like ``org/name``.
    """
    first, second = (text.rstrip("/").lower() for text in (name, other))
    if first == second:
        return True
    both_named = all(
        re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not os.path.exists(text)
        for text in (name.rstrip("/"), other.rstrip("/"))
    )
    return not both_named and first.rpartition("/")[2] == second.rpartition("/")[2]


def _known(model: str) -> Path:
    found = known_scorer(model)
    if found is None:
        known = ", ".join((*_EMBEDDED, *(entry.model for entry in PUBLISHED)))
        raise ScorerError(
            f"no scorer is known for {model}: one is for {known}; give --step-scorer a file or a "
            "repository on the Hub, or train one (step-sglang collect, train); until then, none "
            "scores steps by how certain the model is of its tokens"
        )
    return found if isinstance(found, Path) else published.download(found)
