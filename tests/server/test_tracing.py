"""With SGLang's tracing on, a collector sees the life of traces and votes; its server is SGLang's.

Skipped without the packages of SGLang's extra `tracing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from step_sglang.reasoner import model_path, scorer_path
from tests.server.launch import Server, serve
from tests.server.otlp import Collector, Event, Span, collecting, require
from tests.server.test_page import ask

pytestmark = [pytest.mark.server, pytest.mark.full]

WAIT = 60.0  # seconds


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    require()
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--max-total-tokens", "700"),
        *("--enable-trace", "--otlp-traces-endpoint", f"127.0.0.1:{collector.port}"),
        log=tmp_path_factory.mktemp("log") / "traced.log",
    ) as running:
        yield running
        assert "tracing" not in running.info()["internal_states"][0]["step"]["failures"]
        assert "STEP failed in tracing" not in running.log_text()


def ours(span: Span) -> list[Event]:
    return [event for event in span.events if event.name.startswith("step.")]


def request_of(collector: Collector, rid: str) -> tuple[Span, list[Event], list[Event]]:
    """The span of a request, its events, and those of the spans below: what the scheduler saw."""
    collector.wait(WAIT, lambda: collector.request(rid))
    root = collector.request(rid)
    assert root is not None
    # The scheduler's own span ends before, but another process sends it.
    collector.wait(
        WAIT, lambda: any(span.name.startswith("Scheduler") for span in collector.under(root))
    )
    return root, ours(root), [event for span in collector.under(root) for event in ours(span)]


def named(events: list[Event], name: str) -> list[dict[str, Any]]:
    return [event.attributes for event in events if event.name == name]


def test_the_life_of_traces(server: Server, collector: Collector) -> None:
    infos = [answer["meta_info"] for answer in ask(server, 16, group="traced")]
    assert 0 < sum(info["step"]["pruned"] for info in infos) < 16
    for info in infos:
        step = info["step"]
        root, ended, lived = request_of(collector, info["id"])
        known = {
            "step.group": "traced", "step.num_steps": step["num_steps"],
            "step.pruned": step["pruned"],
        }  # fmt: skip
        assert known.items() <= root.attributes.items()
        assert root.attributes.get("step.score") == pytest.approx(step["score"])
        (end,) = ended
        assert end.name == ("step.pruned" if step["pruned"] else "step.finished")
        assert end.attributes.get("step.reason") == step.get("reason")
        (admitted,) = named(lived, "step.admitted")
        assert admitted == {"step.group": "traced"}
        firsts = named(lived, "step.first_score")
        # One whose only step ends with it has closed its span before.
        assert len(firsts) == 1 or (step["num_steps"] <= 1 and not firsts)
        assert all(first["step.num_steps"] == 1 for first in firsts)
        pruned = named(lived, "step.pruned")
        assert len(pruned) == step["pruned"]
        for one in pruned:
            assert one["step.reason"] == step["reason"]
            assert one.get("step.score") == pytest.approx(step["score"])


def test_branches(server: Server, collector: Collector) -> None:
    found: list[dict[str, Any]] = []
    for attempt in range(4):
        answers = ask(server, 16, group=f"branching {attempt}", refill="best")
        for info in (answer["meta_info"] for answer in answers):
            root, _, lived = request_of(collector, info["id"])
            branched = named(lived, "step.branched")
            branch = info["step"].get("branch")
            assert root.attributes.get("step.parent") == (branch and branch["parent"])
            if branch is None:
                assert not branched
                continue
            assert branched[-1]["step.parent"] == branch["parent"]
            assert branched[-1]["step.position"] == branch["position"]
            assert branched[-1]["step.depth"] == branch["depth"]
            # Pruned, and then again a trace.
            assert len(named(lived, "step.admitted")) == len(branched) + 1
            found += branched
        if found:
            return
    pytest.fail("no trace branched")


def test_a_vote_and_its_traces(server: Server, collector: Collector) -> None:
    rules = {"traces": 8, "vote": "majority", "early": "posterior", "threshold": 0.4}
    for _ in range(5):
        info = ask(server, 1, **rules)[0]["meta_info"]
        vote = info["step"]["vote"]
        collector.wait(WAIT, lambda rid=info["id"]: collector.request(rid))
        root = collector.request(info["id"])
        assert root is not None
        (voted,) = ours(root)
        assert voted.name == "step.voted" and voted.attributes.items() <= root.attributes.items()
        assert voted.attributes["step.vote.answer"] == vote["answer"]
        assert voted.attributes["step.vote.share"] == pytest.approx(vote["share"])
        for fate in ("status", "finished", "pruned", "cancelled", "traces"):
            assert voted.attributes[f"step.vote.{fate}"] == vote[fate]
        early = voted.attributes.get("step.vote.ended_early")
        assert early == ("posterior" if vote["cancelled"] else None)

        def finished(root: Span = root) -> list[Span]:
            return [s for s in collector.under(root) if named(ours(s), "step.finished")]

        collector.wait(WAIT, lambda number=vote["finished"]: len(finished()) == number)
        assert len({span.attributes["step.group"] for span in finished()}) == 1
        if early:
            return
    pytest.fail("no vote ended early")


def test_who_calls_is_above(server: Server, collector: Collector) -> None:
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    params = {"max_new_tokens": 4, "custom_params": {"step": {"traces": 2}}}
    body = {"input_ids": [5, 6, 7], "sampling_params": params}
    answer = requests.post(
        f"{server.url}/generate", json=body, headers={"traceparent": caller}, timeout=60
    ).json()
    collector.wait(WAIT, lambda: collector.request(answer["meta_info"]["id"]))
    root = collector.request(answer["meta_info"]["id"])
    assert root is not None and root.parent == bytes.fromhex("b7ad6b7169203331")


def test_an_ordinary_request_has_nothing_of_step(server: Server, collector: Collector) -> None:
    answer = server.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 4})
    root, ended, lived = request_of(collector, answer["meta_info"]["id"])
    assert not ended and not lived
    assert not any(name.startswith("step.") for name in root.attributes)


def test_level_0_ends_it(server: Server, collector: Collector, tmp_path: Path) -> None:
    assert requests.get(f"{server.url}/set_trace_level?level=0", timeout=20).status_code == 200
    rid = ask(server, 2, group="untraced")[0]["meta_info"]["id"]
    assert requests.get(f"{server.url}/set_trace_level?level=1", timeout=20).status_code == 200
    later = ask(server, 2, group="level 1")[0]["meta_info"]["id"]
    _, ended, lived = request_of(collector, later)
    assert len(ended) == 1 and named(lived, "step.admitted")
    assert collector.request(rid) is None
