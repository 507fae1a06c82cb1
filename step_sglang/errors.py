"""The errors a user can meet, each with one message that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """What to add to a message about an unknown name: the most similar known one, or nothing."""
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=cutoff)
    return f" (did you mean {found[0]!r}?)" if found else ""


def safe_repr(value: object, length: int = 40) -> str:
    """A value as a message or a log may show it: one short line, whatever a request holds."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**15:
        return "an integer of more than 15 digits"
    try:
        return ascii(value)[:length]
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__}"


def first_line(error: Exception) -> str:
    """What an error says, as one short line without control characters."""
    text = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else "?" for c in text)


class StepError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(StepError):
    """A flag or an engine argument is wrong, or asks for what is not supported with STEP."""


class ScorerError(StepError):
    """A scorer file is missing, unreadable, or does not fit the model."""


class BoundaryError(StepError):
    """No token of the tokenizer contains the step delimiter."""


class RequestError(StepError):
    """A request's ``custom_params.step`` is malformed; served as HTTP 400."""


class VoteError(StepError):
    """There is no such vote, early-finish rule or answer extractor."""


class SourceError(StepError):
    """Questions or traces to read are missing, empty or malformed."""


class ServerError(StepError):
    """A server does not start, does not answer, or answers something unusable."""


class RequestRefused(ServerError):
    """A server refused one request; others may be fine."""
