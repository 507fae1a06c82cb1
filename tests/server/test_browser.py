"""The page in a real browser: what it shows is what the API answered.

Needs Debian's `chromium` and `chromium-driver`, and `pip install selenium`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from step_sglang.live.events import decode, encode
from step_sglang.live.html import recorded_page
from step_sglang.reasoner import model_path, scorer_path
from tests.server.launch import Server, serve
from tests.server.test_page import ask, looking
from tests.unit.test_live_html import HOSTILE, hostile_update

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the browser test needs `pip install selenium`"
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.server,
    pytest.mark.full,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="the browser test needs Debian's packages chromium and chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--max-total-tokens", "700"),
        log=tmp_path_factory.mktemp("log") / "browser.log",
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--window-size=1280,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def state(browser: Any) -> str:
    return str(browser.execute_script("return document.getElementById('status').dataset.state"))


def counts(browser: Any) -> dict[str, int]:
    found = browser.execute_script(
        "return Array.from(document.querySelectorAll('#counts div'),"
        "e => [e.dataset.count, e.querySelector('dd').textContent])"
    )
    return {name: int(number) for name, number in found}


def table(browser: Any) -> dict[str, list[str]]:
    """Rows by request id."""
    rows = browser.execute_script(
        "document.getElementById('all').open = true;"
        "return Array.from(document.querySelectorAll('#rows tr'),"
        "r => [r.dataset.rid, Array.from(r.cells, c => c.textContent)])"
    )
    return dict(rows)


def winner(browser: Any) -> str:
    return str(
        browser.execute_script(
            "const e = document.querySelector('#vote .winner bdi'); return e ? e.textContent : ''"
        )
    )


def no_complaints(browser: Any) -> None:
    bad = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not bad, bad


def save(browser: Any, name: str) -> None:
    """Keep a picture to look at, where the environment says where."""
    if folder := os.environ.get("STEP_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_the_page_of_a_live_group_is_what_the_api_answered(browser: Any, server: Server) -> None:
    browser.get(f"{server.url}/step")
    wait_for(lambda: state(browser) == "live")
    name = HOSTILE[0]
    answers = [answer["meta_info"] for answer in ask(server, 24, group=name)]
    pruned = sum(info["step"]["pruned"] for info in answers)
    assert pruned > 0
    wait_for(lambda: counts(browser).get("finished") == 24 - pruned)
    wait_for(lambda: len(table(browser)) == 24)
    assert counts(browser)["traces"] == 24 and counts(browser)["pruned"] == pruned
    assert browser.execute_script("return document.getElementById('name').textContent") == name
    rows = table(browser)
    for info in answers:
        row, step = rows[info["id"]], info["step"]
        assert row[2] == str(info["completion_tokens"])
        assert row[5] == f"{step['score']:.4f}"
        assert row[6] == (f"pruned ({step['reason']})" if step["pruned"] else "finished")
    save(browser, "live-light")
    voted = ask(server, 1, traces=12, early="off")[0]["meta_info"]["step"]["vote"]
    wait_for(lambda: counts(browser)["traces"] == 12)
    wait_for(lambda: counts(browser).get("finished") == voted["finished"])
    wait_for(lambda: winner(browser) == voted["answer"])
    assert counts(browser)["pruned"] == voted["pruned"]
    browser.find_element("id", "theme").click()
    time.sleep(0.5)
    save(browser, "live-dark")
    assert browser.execute_script("return window.hacked") is None
    no_complaints(browser)


def test_hostile_text_is_shown_and_never_run(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    file.write_text(recorded_page(hostile_update()))
    browser.get(file.as_uri())
    wait_for(lambda: state(browser) == "recording")
    shown = browser.execute_script(
        "return Array.from(document.querySelectorAll('#groups bdi'), e => e.textContent)"
    )
    assert shown[0] == HOSTILE[0] and shown[1] == HOSTILE[1]
    assert "\u202e" not in shown[3] and "⟨U+202E⟩" in shown[3]
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2
    no_complaints(browser)
    # What is added later does not run either.
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
        "document.body.append(s)"
    )
    assert browser.execute_script("return window.hacked") is None
    (refused,) = (line for line in browser.get_log("browser") if line["level"] == "SEVERE")
    assert "Content Security Policy" in refused["message"]


def test_a_recording_plays_and_jumps_to_prunes(
    browser: Any, server: Server, tmp_path: Path
) -> None:
    with looking(server) as known:
        ask(server, 24, group="recorded", show_text=True)
    update = decode(encode(known.full()))
    assert any(trace.texts and trace.texts[0] for trace in known.traces.values())
    file = tmp_path / "run.html"
    file.write_text(recorded_page(update))
    browser.get(file.as_uri())
    # What the feed still held from before is there too.
    groups = browser.find_elements("css selector", "#groups button")
    next(button for button in groups if button.text.startswith("recorded")).click()
    wait_for(lambda: browser.find_element("id", "name").text == "recorded")
    pruned = counts(browser)["pruned"]
    assert pruned > 1
    seen = []
    for _ in range(pruned):
        browser.find_element("id", "next").click()
        time.sleep(0.15)
        seen.append(counts(browser)["pruned"])
    assert seen[0] < pruned and seen == sorted(seen)
    lanes = browser.find_element("id", "lanes")
    lanes.send_keys("\ue015")  # arrow down
    wait_for(lambda: "Trace 1" in browser.find_element("id", "lane").text)
    lane = browser.find_element("id", "lane")
    assert lane.find_elements("css selector", ".text"), lane.get_attribute("innerHTML")
    browser.execute_script(
        "const a = document.getElementById('at'); a.value = 0;"
        "a.dispatchEvent(new Event('input')); document.getElementById('speed').value = '16'"
    )
    browser.find_element("id", "play").click()
    wait_for(lambda: counts(browser)["pruned"] == pruned and not counts(browser)["running"])
    no_complaints(browser)


def test_branches_stand_below_the_trace_that_they_continue(browser: Any, tmp_path: Path) -> None:
    def began(number: int, parent: str | None) -> dict[str, Any]:
        branch = {"parent": parent, "position": 30, "depth": 1}
        more = {} if parent is None else {"branch": branch, "tokens": 30}
        return {"kind": "trace", "trace": number, "group": 0, "time": 0.0, "rid": f"r{number}",
                "prompt_tokens": 9, **more}  # fmt: skip

    parents = [None, None, "r0", "r1", "r2", "gone"]
    events: list[dict[str, Any]] = [{"kind": "group", "group": 0, "time": 0.0, "name": "tree"}]
    for number, parent in enumerate(parents):
        end = {"kind": "end", "trace": number, "time": 2.0, "fate": "finished", "tokens": 90}
        events += [began(number, parent), end]
    file = tmp_path / "tree.html"
    file.write_text(
        recorded_page(decode(json.dumps({"time": 3.0, "full": True, "events": events})))
    )
    browser.get(file.as_uri())
    wait_for(lambda: list(table(browser)) == ["r0", "r2", "r4", "r1", "r3", "r5"])
    save(browser, "tree")
    no_complaints(browser)


def test_a_thousand_traces_draw_without_stutter(browser: Any, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = [{"kind": "group", "group": 0, "time": 0.0, "name": "many"}]
    for number in range(1024):
        events += [
            {"kind": "trace", "trace": number, "group": 0, "time": 0.0, "rid": str(number),
             "prompt_tokens": 9},
            {"kind": "steps", "trace": number, "times": [0.1 * j for j in range(1, 101)],
             "positions": [60 * j for j in range(1, 101)],
             "scores": [(number * j % 97) / 97 for j in range(1, 101)]},
            {"kind": "end", "trace": number, "time": 10.1, "fate": "pruned", "tokens": 6100,
             "score": 0.5, "reason": "decode"},
        ]  # fmt: skip
    update = {"time": 11.0, "full": True, "events": events}
    file = tmp_path / "many.html"
    file.write_text(recorded_page(decode(json.dumps(update))))
    browser.get(file.as_uri())
    wait_for(lambda: counts(browser).get("traces") == 1024)
    browser.execute_script(
        "const a = document.getElementById('at');"
        "a.value = 0.3; a.dispatchEvent(new Event('input'));"
        "window.frames_seen = []; let last = performance.now();"
        "const see = (now) => { window.frames_seen.push(now - last); last = now;"
        "  if (window.frames_seen.length < 60) requestAnimationFrame(see); };"
        "document.getElementById('play').click(); requestAnimationFrame(see);"
    )
    wait_for(lambda: browser.execute_script("return window.frames_seen.length") >= 60, 60)
    frames = sorted(browser.execute_script("return window.frames_seen"))
    print(
        f"1,024 traces, 100 steps each: median frame {frames[30]:.0f} ms, 95 % {frames[57]:.0f} ms"
    )
    save(browser, "many")
    assert frames[30] < 100, frames


def test_a_server_that_goes_is_said_and_found_again(browser: Any, server: Server) -> None:
    """Last: it ends the server."""
    browser.get(f"{server.url}/step")
    wait_for(lambda: state(browser) == "live")
    server.process.terminate()
    server.process.wait(60)  # an open stream does not hold it
    wait_for(lambda: state(browser) == "lost")
    assert "does not answer" in browser.find_element("id", "status").text
    port = int(server.url.rpartition(":")[2])
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path())),
        log=server.log.with_name("again.log"),
        port=port,
    ):
        wait_for(lambda: state(browser) == "live", 60)
