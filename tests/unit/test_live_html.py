"""The page as a file: self-contained, and nothing in its data is markup or script."""

from __future__ import annotations

import html.parser
import io
import json
import re

from step_sglang.cli.watch import plain, shown
from step_sglang.evaluation.page import as_update
from step_sglang.evaluation.traces import RecordedGroup, RecordedTrace
from step_sglang.live.events import AnswerRead, GroupBegan, TraceBegan, TraceEnded, Update, decode
from step_sglang.live.html import LIVE_HEADERS, live_page, recorded_page
from step_sglang.live.known import Known

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "]]>{{script}}{{csp}}",
    "\u2028\u2029\u202e\u2066evil\x00\x1b[31m",
    "<img src=x onerror=window.hacked=1>",
)


class Scripts(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.outside: list[str] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag == "script"
        if self._open:
            self.found.append((dict(attrs), ""))
        self.outside += [str(v) for name, v in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._open:
            attributes, text = self.found[-1]
            self.found[-1] = attributes, text + data

    def handle_endtag(self, tag: str) -> None:
        self._open = False


def parsed(page: str) -> Scripts:
    scripts = Scripts()
    scripts.feed(page)
    return scripts


def hostile_update() -> Update:
    events: list[object] = []
    for place, text in enumerate(HOSTILE):
        events += [
            GroupBegan(place, 1.0, text),
            TraceBegan(place, place, 1.0, text, 3),
            TraceEnded(place, 2.0, "finished", 4, 0.5),
            AnswerRead(place, text),
        ]
    return Update(3.0, True, tuple(events))  # type: ignore[arg-type]


def test_hostile_text_stays_data() -> None:
    scripts = parsed(recorded_page(hostile_update()))
    assert len(scripts.found) == 2
    attributes, data = scripts.found[0]
    assert attributes["type"] == "application/json"
    assert decode(data) == hostile_update()
    assert json.loads(data)["events"][3]["answer"] == HOSTILE[0]
    own = parsed(live_page()).found[1][1]
    assert scripts.found[1][1] == own, "what is run does not depend on the data"


def test_nothing_comes_from_elsewhere() -> None:
    for page in (live_page(), recorded_page(hostile_update())):
        assert parsed(page).outside == ["data:,"]
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
        assert policy is not None
        assert "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
        assert not re.search(r"https?://|@import|url\(", page.replace("http-equiv", ""))
    assert "connect-src" not in recorded_page(hostile_update()).split("<style>")[0]
    assert "frame-ancestors 'none'" in LIVE_HEADERS["Content-Security-Policy"]


def test_the_terminal_is_not_steered_by_what_others_wrote() -> None:
    from rich.console import Console

    known = Known()
    known.apply(hostile_update())
    console = Console(record=True, width=100, color_system=None, file=io.StringIO())
    console.print(shown(known))
    text = console.export_text()
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    assert plain("a\nb\x1b[2J") == "a?b?[2J"


def recorded() -> RecordedGroup:
    def trace(fate: str, answer: str | None, tokens: int) -> RecordedTrace:
        return RecordedTrace(
            fate, answer, answer == "7", 0.5,
            tuple(100 + i / 10 for i in range(tokens)), (0.0,) * tokens,
            (2, 4, tokens), (0.4, 0.6, 0.5), "text",
        )  # fmt: skip

    traces = (trace("finished", "7", 8), trace("pruned", "9", 6), trace("finished", "7", 12))
    return RecordedGroup("q1", 0, "7", 5, 20, 1.2, traces)


def test_recorded_groups_become_a_page_without_their_text() -> None:
    update = as_update([recorded(), recorded()])
    known = Known()
    known.apply(update)
    assert len(known.groups) == 2 and len(known.traces) == 6
    first = known.groups[0]
    assert [known.traces[n].fate for n in first.traces] == ["finished", "pruned", "finished"]
    # A boundary token that was never consumed has no time.
    assert [len(known.traces[n].scores) for n in first.traces] == [2, 2, 2]
    assert [known.traces[n].answer for n in first.traces] == ["7", None, "7"]
    assert first.votes[-1].bars[0].answer == "7" and first.votes[-1].bars[0].count == 2
    assert first.votes[-1].settled
    assert max(sample.used for sample in known.pool) > 5
    assert known.pool[-1].used == 0, "what ended holds nothing"
    assert '"text"' not in recorded_page(update).split('id="recording"')[1].split("</script>")[0]
