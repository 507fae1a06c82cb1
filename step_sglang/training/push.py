"""Puts a trained scorer on the Hugging Face Hub: the file, its card, figures and plots."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from step_sglang.errors import ScorerError, first_line
from step_sglang.scoring.locate import SCORER_FILE
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training.card import CARD_FILE, card_text

# What `train` writes; nothing else of the folder leaves the machine.
PUSHED = (SCORER_FILE, CARD_FILE, "metrics.json", "*.png", "*.pdf")


def push_scorer(folder: Path, repository: str, private: bool, message: str) -> str:
    """Upload in one commit; the repository is created unless it exists.

    A folder without a card gets one first.

    Returns:
        The commit's address.

    Raises:
        ScorerError: the folder holds no scorer, there is no token, or the Hub refuses it or does
            not answer.
    """
    from huggingface_hub import HfApi, errors

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ScorerError(f"{repository!r} is no name of a repository: give org/name")
    scorer = load_scorer(folder / SCORER_FILE)
    try:
        if not (folder / CARD_FILE).exists():
            plots = sorted(file.name for file in folder.glob("*.png"))
            (folder / CARD_FILE).write_text(card_text(scorer, plots))
    except OSError as error:
        raise ScorerError(f"cannot write {folder / CARD_FILE}: {error.strerror}") from error
    hub = HfApi()
    if hub.token is None and _no_token():
        raise ScorerError("pushing needs a token of the Hub that may write: set HF_TOKEN")
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(PUSHED),
            commit_message=message,
        )  # fmt: skip
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


def _no_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is None
