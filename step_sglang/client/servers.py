"""Which of several servers a question goes to: the one with the fewest open questions of ours."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf

from step_sglang.client.errors import ClientError
from step_sglang.client.http import server_url
from step_sglang.errors import RequestRefused, ServerError

_AVOIDED = 30.0  # seconds that a server which did not answer is the last choice

_open: Counter[str] = Counter()  # questions of this process, by server
_failed: dict[str, float] = {}  # when a server did not answer, monotonic seconds
_lock = threading.Lock()


def servers(url: str | Sequence[str]) -> tuple[str, ...]:
    """The servers that were named, each once; raises ClientError without any."""
    urls = (url,) if isinstance(url, str) else tuple(url)
    if not urls or not all(isinstance(one, str) and one for one in urls):
        raise ClientError(f"url must be a server's address or a list of some, not {url!r}")
    return tuple(dict.fromkeys(server_url(one) for one in urls))


@contextmanager
def taking(urls: Sequence[str]) -> Iterator[str]:
    """The one that has the fewest open questions, the first named of equals, for one question.

    One whose question just ended in a ServerError is the last choice for a while; of several such
    the one where that is longest ago.
    """
    now = time.monotonic()

    def rank(url: str) -> tuple[float, int]:
        failed = _failed.get(url, -inf)
        return failed if now - failed < _AVOIDED else -inf, _open[url]

    with _lock:
        url = min(urls, key=rank)
        _open[url] += 1
    try:
        yield url
    except RequestRefused:
        raise  # it does answer
    except ServerError:
        avoid(url)
        raise
    finally:
        with _lock:
            _open[url] -= 1


def avoid(url: str) -> None:
    """Make a server the last choice for a while."""
    with _lock:
        _failed[url] = time.monotonic()
