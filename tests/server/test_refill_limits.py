"""What refill must never do, on servers of its own: bring on a pruning, or keep a request."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from step_sglang.client.abort import abort_group
from step_sglang.pruning.refill import RefillRules
from step_sglang.reasoner import model_path, scorer_path
from tests.server.idle import idle_free_tokens, step_state
from tests.server.launch import Server, serve
from tests.server.test_refill import POOL, PROMPTS, N, body

pytestmark = [pytest.mark.server, pytest.mark.full]

ENDLESS = {"ignore_eos": True, "max_new_tokens": 600}
LINE = re.compile(r"Decode batch|STEP branched|STEP pruned .* reason=(\w+)")
IN_FLIGHT = 2  # decode passes whose log line may come after what was decided behind them


@pytest.fixture(scope="module", params=[1, 16], ids=lambda page: f"page{page}")
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--decode-log-interval", "1"),
        *("--max-total-tokens", str(POOL), "--page-size", str(request.param)),
        log=tmp_path_factory.mktemp("log") / "limits.log",
    ) as running:
        yield running


def passes_to_the_next_pruning(log: str) -> list[int]:
    """Of each branch after which something was pruned for want of memory, the decode passes."""
    found: list[int] = []
    passes: int | None = None
    for line in LINE.finditer(log):
        if line[0] == "Decode batch":
            passes = None if passes is None else passes + 1
        elif line[0] == "STEP branched":
            passes = 0
        elif passes is not None and line[1] == "decode":
            found.append(passes)
            passes = None
    return found


@pytest.mark.parametrize("mode", ["best", "random"])
def test_a_branch_does_not_bring_on_the_next_pruning(server: Server, mode: str) -> None:
    before, said = idle_free_tokens(server), len(server.log_text())
    for number in range(4):
        server.generate(**body(number, refill=mode))
    log = server.log_text()[said:]
    assert log.count("STEP branched") >= 4
    passes = passes_to_the_next_pruning(log)
    assert all(number >= RefillRules().margin - IN_FLIGHT for number in passes), passes
    assert idle_free_tokens(server) == before


def test_load_without_end_and_clients_without_manners(server: Server) -> None:
    """Groups, votes, members, aborts in mid-branch and clients that leave, many at a time."""
    before = idle_free_tokens(server)
    ended = threading.Event()

    def group(number: int) -> int:
        form = number % 6
        asked = body(number % len(PROMPTS), refill=("best", "random", "gambit")[number % 3])
        if form == 0:
            asked["sampling_params"].update(ENDLESS)
            asked["sampling_params"]["custom_params"]["step"]["group"] = f"doomed-{number}"
            threading.Timer(1.5, abort_group, (server.url, f"doomed-{number}")).start()
        elif form == 1:
            asked["sampling_params"].update(ENDLESS)
            with pytest.raises(requests.exceptions.ReadTimeout):
                requests.post(f"{server.url}/generate", json=asked, timeout=(20, 1.0))
            return N
        elif form == 2:
            step = asked["sampling_params"]["custom_params"]["step"]
            asked["sampling_params"].update(n=1)
            step.pop("step_scores")
            step.update(traces=N, suffix="")
        answer = server.post("/generate", asked)
        assert answer.status_code == 200, answer.text[:300]
        return 1 if form == 2 else len(answer.json())

    def ordinary() -> None:
        plain = {
            "input_ids": PROMPTS[0],
            "sampling_params": {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True},
        }
        while not ended.wait(0.5):
            assert server.generate(**plain)["meta_info"]["completion_tokens"] == 60

    with ThreadPoolExecutor(5) as threads:
        traffic = threads.submit(ordinary)
        counts = list(threads.map(group, range(12)))
        ended.set()
        traffic.result()
    assert [1 if number % 6 == 2 else N for number in range(12)] == counts
    assert idle_free_tokens(server) == before
    state = step_state(server)
    assert state["free_places"] == 0 and state["groups"] == 0
    assert not state["failures"], re.findall(r"(?s)STEP failed.{2000}", server.log_text())
    assert "Traceback" not in server.log_text().partition("ready to roll")[2]


def test_a_timeout_ends_what_runs_and_the_places_with_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--step-refill", "best"),
        *("--max-total-tokens", str(POOL)),
        log=tmp_path_factory.mktemp("log") / "timeout.log",
        SGLANG_REQ_RUNNING_TIMEOUT="3",
        SGLANG_REQ_WAITING_TIMEOUT="3",
    ) as server:
        before = idle_free_tokens(server)
        asked = body(1, refill=None)
        asked["sampling_params"].update(ENDLESS)
        answer = server.post("/generate", asked)
        assert answer.status_code in (200, 503), answer.text[:300]
        assert "timeout" in answer.text
        assert idle_free_tokens(server) == before
        state = step_state(server)
        assert state["free_places"] == 0 and state["groups"] == 0 and not state["failures"]
        assert server.process.poll() is None
