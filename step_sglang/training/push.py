"""Puts a trained scorer on the Hugging Face Hub: the file, its card, figures and plots.

Nothing else of the folder leaves the machine: files are named, never matched.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from step_sglang.errors import ScorerError, first_line
from step_sglang.scoring.locate import SCORER_FILE
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.card import CARD_FILE, card_text, check_card


def push_scorer(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload in one commit; the repository is created unless it exists.

    A folder without a card gets one first.

    Returns:
        The commit's address.

    Raises:
        ScorerError: the folder holds no scorer, or a README.md that is not its card, there is no
            token, or the Hub refuses it or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ScorerError(f"{repository!r} is no name of a repository: give org/name")
    scorer = load_scorer(folder / SCORER_FILE)
    found = [name for name in _written_by_train() if (folder / name).is_file()]
    card = folder / CARD_FILE
    try:
        if card.exists():
            check_card(card, scorer)
        else:
            card.write_text(card_text(scorer, [name for name in found if name.endswith(".png")]))
    except OSError as error:
        raise ScorerError(f"cannot read or write {card}: {error.strerror}") from error
    hub = HfApi()
    if hub.token is None and _no_token():
        raise ScorerError("pushing needs a token of the Hub that may write: set HF_TOKEN")
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.create_commit(
            repository,
            [CommitOperationAdd(name, folder / name) for name in (CARD_FILE, *found)],
            commit_message=message,
        )
    except errors.HFValidationError as error:
        raise ScorerError(
            f"{repository!r} is no name of a repository: {first_line(error)}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = ": set HF_TOKEN to a token that may write there" if status in (401, 403) else ""
        raise ScorerError(
            f"the Hub refused {repository} (HTTP {status}, {first_line(error)}){hint}"
        ) from error
    except (errors.OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise ScorerError(
            f"the Hub does not answer ({first_line(error)}): nothing was pushed to {repository}"
        ) from error
    return str(commit.commit_url)


def _written_by_train() -> tuple[str, ...]:
    """The scorer's file and what `train` writes beside it and its card."""
    # Matplotlib takes a second to import.
    from step_sglang.training.plots import PLOTS
    from step_sglang.training.train import METRICS_FILE

    pages = [str(Path(name).with_suffix(".pdf")) for name in PLOTS]
    return (SCORER_FILE, METRICS_FILE, *PLOTS, *pages)


def _no_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is None
