"""The feed of a real server says of every trace what its response said."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from step_sglang.client.http import Client
from step_sglang.live.events import decode
from step_sglang.live.known import Known
from step_sglang.reasoner import questions
from tests.server.launch import Server, start_command

pytestmark = pytest.mark.server


@contextmanager
def looking(server: Server) -> Iterator[Known]:
    """Gather the feed; at the end it holds what happened until then."""
    known, began, over = Known(), threading.Event(), threading.Event()
    left: list[int] = []

    def look() -> None:
        with Client(server.url, timeout=30) as client:
            for update in client.feed():
                known.apply(decode(update))
                began.set()
                if over.is_set():
                    left.append(1)
                    if len(left) == 4:
                        return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    assert began.wait(20)
    yield known
    over.set()
    thread.join(20)
    assert not thread.is_alive()


def ask(server: Server, n: int, **step: object) -> list[dict]:
    prompt = {"messages": [{"role": "user", "content": questions("test", 4)[0].question}]}
    ids = server.post("/v1/tokenize", {**prompt, "add_special_tokens": True}).json()["tokens"]
    params = {"n": n, "temperature": 1.0, "max_new_tokens": 300, "custom_params": {"step": step}}
    answer = server.generate(input_ids=ids, sampling_params=params)
    return answer if isinstance(answer, list) else [answer]


def test_the_feed_says_what_the_responses_say(reasoner: Server) -> None:
    with looking(reasoner) as first, looking(reasoner) as second:
        answers = ask(reasoner, 24, group="watched", step_scores=True)
        voted = ask(reasoner, 1, traces=8, early="off")[0]["meta_info"]["step"]["vote"]
    for known in (first, second):
        assert known.lost == 0
        group = known.groups[known.by_name["watched"]]
        assert len(group.traces) == 24
        assert any(answer["meta_info"]["step"]["pruned"] for answer in answers)
        for answer in answers:
            info = answer["meta_info"]
            trace, step = known.traces[known.by_rid[info["id"]]], info["step"]
            assert trace.fate == ("pruned" if step["pruned"] else "finished")
            assert trace.ended is not None and trace.ended.reason == step.get("reason")
            assert trace.tokens == info["completion_tokens"]
            assert trace.score == pytest.approx(step["score"])
            assert trace.scores == pytest.approx(step["step_scores"])
            assert trace.positions == step["positions"]
            assert not any(trace.texts), "its text was not allowed"
            if step["pruned"]:
                assert trace.ended.freed is not None and trace.ended.freed > 0
                assert trace.answer is None
        # The group of the server's own vote has no name of ours: it is the newest.
        own = list(known.groups.values())[-1]
        winner = own.votes[-1]
        assert len(own.traces) == 8 and not winner.as_text
        assert winner.bars[0].answer == voted["answer"]
        assert winner.bars[0].weight == pytest.approx(voted["answers"][0]["weight"])
        assert max(sample.used for sample in known.pool) <= 700
        assert known.pool[-1].running == known.pool[-1].waiting == 0
    step = reasoner.info()["internal_states"][0]["step"]
    assert "page" not in step["failures"]


def test_the_page_has_its_own_policy_and_no_data(reasoner: Server) -> None:
    page = requests.get(f"{reasoner.url}/step", timeout=10)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "watched" not in page.text


@pytest.mark.full
def test_watch_keeps_a_page_of_what_it_saw(reasoner: Server, tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    seen = start_command("watch", "--url", reasoner.url, "--save", file, "--seconds", 20)
    # It begins with what the feed still holds; so ask until it has seen one of ours.
    while seen.poll() is None:
        ask(reasoner, 4, group="kept <b>")
    said, problems = seen.communicate()
    assert seen.returncode == 0, problems
    assert f"wrote {file}" in said
    data = file.read_text().split('id="recording">')[1].split("</script>")[0]
    known = Known()
    known.apply(decode(data))
    assert len(known.groups[known.by_name["kept <b>"]].traces) == 4
