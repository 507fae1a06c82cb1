"""The page: one self-contained HTML file, live or with a recorded run inside.

Nothing of it comes from another host, and its Content-Security-Policy allows no script but its
own. What others wrote (names, answers, text) is data in it, which its script shows as text.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from importlib.resources import files

from step_sglang.live.events import Update, encode


@lru_cache
def _source(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(*, live: bool) -> str:
    # Widths of bars are set by script through the object model, which no style-src forbids.
    parts = [
        "default-src 'none'",
        f"script-src {_digest(_source('page.js'))}",
        f"style-src {_digest(_source('page.css'))}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        *(["connect-src 'self'"] if live else []),
    ]
    return "; ".join(parts)


def as_data(update: Update) -> str:
    """JSON that may stand in a script element: nothing in it can end that element."""
    text = encode(update).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _page(recording: str, *, live: bool) -> str:
    page = _source("page.html")
    # The recording last: it may hold what looks like a place for another.
    for place, text in (
        ("csp", _policy(live=live)),
        ("style", _source("page.css")),
        ("script", _source("page.js")),
        ("recording", recording),
    ):
        page = page.replace("{{" + place + "}}", text, 1)
    return page


@lru_cache
def live_page() -> str:
    """The page that a server gives."""
    return _page("", live=True)


def recorded_page(update: Update) -> str:
    """The page of a recorded run, to be opened from a file.

    Args:
        update: a full one.
    """
    return _page(as_data(update), live=False)


LIVE_HEADERS = {
    "Content-Security-Policy": f"{_policy(live=True)}; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
