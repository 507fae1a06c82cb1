"""Two servers behind SGLang's own router: groups meet, requests spread, a server dies.

For each router that is installed: sglang-router keeps of a request's body what it knows, smg all.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from step_sglang.client.abort import abort_group
from step_sglang.client.http import ROUTING_KEY, AsyncClient, Client
from step_sglang.client.solve import solve
from step_sglang.errors import ServerError
from step_sglang.reasoner import Question, model_path, questions, scorer_path
from tests.server.answers.live import until
from tests.server.launch import Server, serve, start_command, stop
from tests.server.routers import POLICIES, Router, route, skip_without

pytestmark = [pytest.mark.server, pytest.mark.full]

FLAGS = (
    "--enable-step", "--step-scorer", str(scorer_path()), "--enable-metrics",
    "--max-running-requests", "128",
)  # fmt: skip
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1}
BOUND = 120  # seconds within which everybody hears something after a server died
NAMES = ("one", "other")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("log")
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                # Every answer says which server it is from.
                serve(model_path(), *FLAGS, "--weight-version", name, log=folder / f"{name}.log")
            )
            for name in NAMES
        ]


@pytest.fixture(scope="module", params=sorted(POLICIES))
def router(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Router]:
    skip_without(request.param)
    two = request.getfixturevalue("two")  # not started where no router is installed
    with route(request.param, two, tmp_path_factory.mktemp("log") / "router.log") as running:
        yield running


def said(router: Router, **step: Any) -> dict[str, Any]:
    """What a request says of STEP, where this router leaves it."""
    if router.kind == "sglang_router":
        return {"session_params": {"step": step}}
    return {"custom_params": {"step": step}}


def body(router: Router, question: str, n: int, tokens: int, **step: Any) -> dict[str, Any]:
    sampling = {**SAMPLING, "n": n, "max_new_tokens": tokens}
    extra = said(router, **step)
    sampling.update({key: extra.pop(key) for key in ("custom_params",) if key in extra})
    return {"text": question, "sampling_params": sampling, **extra}


def generate(
    router: Router, key: str, n: int = 1, tokens: int = 30, **step: Any
) -> list[dict[str, Any]]:
    """The `meta_info` of each trace."""
    answer = requests.post(
        f"{router.url}/generate", json=body(router, "11;A*6;B*5;C+6", n, tokens, **step),
        headers={ROUTING_KEY: key}, timeout=120,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    answers = answer.json()
    return [one["meta_info"] for one in (answers if isinstance(answers, list) else [answers])]


def counted(server: Server, metric: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(f"{metric}{{")
    )


def test_members_of_a_group_meet(router: Router) -> None:
    """Each sent by itself; the groups together use both servers."""
    with ThreadPoolExecutor(16) as threads:
        sent = [
            threads.submit(generate, router, f"q{i % 8}", group=f"q{i % 8}", step_scores=True)
            for i in range(32)
        ]
        found = [future.result()[0] for future in sent]
    assert [info["step"]["group"] for info in found] == [f"q{i % 8}" for i in range(32)]
    assert all("step_scores" in info["step"] for info in found)
    where: dict[str, set[str]] = {}
    for info in found:
        where.setdefault(info["step"]["group"], set()).add(info["weight_version"])
    assert all(len(servers) == 1 for servers in where.values()), where
    assert set.union(*where.values()) == set(NAMES)


def test_requests_for_n_and_for_one_choice_spread(router: Router) -> None:
    model = requests.get(f"{router.url}/v1/models", timeout=60).json()["data"][0]["id"]

    def chat(key: int) -> dict[str, Any]:
        asked = {
            "model": model, "messages": [{"role": "user", "content": "11;A*6;B*5;C+6"}],
            "max_tokens": 100, "ignore_eos": True, "temperature": 1.0, "return_meta_info": True,
            **said(router, traces=4, early="off"),
        }  # fmt: skip
        answer = requests.post(
            f"{router.url}/v1/chat/completions", json=asked,
            headers={ROUTING_KEY: f"chat-{key}"}, timeout=120,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    with ThreadPoolExecutor(16) as threads:
        several = [threads.submit(generate, router, f"n-{i}", 4) for i in range(8)]
        voted = [threads.submit(chat, i) for i in range(8)]
        groups = [future.result() for future in several]
        answers = [future.result() for future in voted]
    for infos in groups:
        assert len({(info["step"]["group"], info["weight_version"]) for info in infos}) == 1
    assert {infos[0]["weight_version"] for infos in groups} == set(NAMES)
    assert {answer["metadata"]["weight_version"] for answer in answers} == set(NAMES)
    assert all(len(answer["choices"]) == 1 for answer in answers)
    # Each is a vote of four.
    assert all(answer["usage"]["completion_tokens"] > 200 for answer in answers)
    # sglang-router drops return_meta_info: such an answer holds the text alone.
    told = ["meta_info" in answer["choices"][0] for answer in answers]
    assert set(told) == {router.kind != "sglang_router"}


def test_what_custom_params_say_is_lost_behind_sglang_router(router: Router) -> None:
    """Why the client says it twice. Should this fail, the other place is not needed any more."""
    asked = body(router, "11;A*6", 1, 5)
    asked["sampling_params"]["custom_params"] = {"step": {"group": "named"}}
    asked.pop("session_params", None)
    answer = requests.post(f"{router.url}/generate", json=asked, timeout=60).json()
    lost = "step" not in answer["meta_info"]
    assert lost is (router.kind == "sglang_router")


def test_a_group_is_ended_wherever_it_runs(router: Router) -> None:
    with ThreadPoolExecutor(4) as threads:
        lives = [
            threads.submit(generate, router, f"end-{i}", 4, 1500, group=f"end-{i}", min_survivors=4)
            for i in range(2)
        ]
        until(lambda: sum(alive(server) for server in router.workers) == 8)
        assert abort_group(router.url, "end-0") == 4
        ended = lives[0].result(timeout=BOUND)
        assert abort_group(router.url, "end-1") == 4
        ended += lives[1].result(timeout=BOUND)
    assert {info["finish_reason"]["type"] for info in ended} == {"abort"}
    assert abort_group(router.url, "never-there") == 0


def alive(server: Server) -> int:
    return int(server.info()["internal_states"][0]["step"]["live_traces"])


def test_solve_names_its_groups_and_ends_single_traces(router: Router) -> None:
    asked = questions("test", 4)[2]
    result = solve(
        asked.question, 8, url=router.url, group="solved", sampling={**SAMPLING},
        effort="thorough", shrink=0.4,
    )  # fmt: skip
    assert result.answer is not None and len(result.traces) == 8
    assert any(trace.step_scores for trace in result.traces)

    async def end() -> None:
        async with AsyncClient(router.url) as client:
            await client.end_traces(["nobody"])

    asyncio.run(end())


def test_what_a_router_does_not_have(router: Router) -> None:
    with Client(router.url) as client:
        assert client.model() == str(model_path())
        with pytest.raises(ServerError, match="SGLang's router, which has no live page") as caught:
            next(client.feed())
    assert all(worker.url in str(caught.value) for worker in router.workers)


def test_metrics_of_both_add_up(router: Router) -> None:
    metrics = ("sglang:num_requests_total", "step_steps_scored_total")

    def now() -> list[list[float]]:
        return [[counted(server, metric) for server in router.workers] for metric in metrics]

    before = now()
    with ThreadPoolExecutor(8) as threads:
        sent = [threads.submit(generate, router, f"sum-{i}", 2, 60) for i in range(8)]
        infos = [info for future in sent for info in future.result()]
    (asked, steps) = (
        [b - a for a, b in zip(*pair, strict=True)] for pair in zip(before, now(), strict=True)
    )
    assert sum(steps) == sum(info["step"]["num_steps"] for info in infos) > 16
    # SGLang counts samples, and one more for the prompt that they share.
    assert sum(asked) == 24 and min(asked) > 0, asked


def test_a_server_dies_in_the_middle(router: Router, tmp_path: Path) -> None:
    """Raw clients get an answer or an error; `ask --file` asks again, and a second run goes on."""
    known: list[Question] = questions("test", 10)
    asked, results = tmp_path / "q.jsonl", tmp_path / "r.jsonl"
    asked.write_text("\n".join(json.dumps({"question": q.question}) for q in known))
    with ExitStack() as stack:
        mortal = stack.enter_context(serve(model_path(), *FLAGS, log=tmp_path / "mortal.log"))
        pair = [router.workers[0], mortal]
        routed = stack.enter_context(route(router.kind, pair, tmp_path / "router.log"))
        command = (
            "ask", "--file", asked, "-o", results, "-n", 4, "--url", routed.url, "--temperature",
            1, "--top-p", 1, "--top-k", -1, "--max-new-tokens", 900, "--concurrency", 4,
        )  # fmt: skip
        batch = start_command(*command)
        threads = stack.enter_context(ThreadPoolExecutor(16))
        until(lambda: results.exists() and len(results.read_text().splitlines()) >= 2, 120)
        raw = [threads.submit(outcome, routed, i) for i in range(12)]
        until(lambda: alive(mortal) > 4, 120)
        stop(mortal.process)
        died = time.monotonic()
        told = Counter(future.result(timeout=BOUND * 2)[0] for future in raw)
        assert time.monotonic() - died < BOUND
        assert told["answer"] > 0 and sum(told.values()) == 12, told
        out, errors = batch.communicate(timeout=240)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        print(told, batch.returncode, out, errors[-2000:])
        # Ended groups are still found where they run, also beside a server that is gone.
        life = threads.submit(generate, routed, "last", 2, 1500, group="last", min_survivors=2)
        until(lambda: alive(router.workers[0]) == 2, 60)
        assert abort_group(routed.url, "last") == 2
        life.result(timeout=BOUND)
        again = start_command(*command)
        out, errors = again.communicate(timeout=240)
        assert again.returncode == 0, (out, errors)
    assert f"{len(lines)} of 10 questions have a result" in errors
    final = [json.loads(line) for line in results.read_text().splitlines()]
    assert final[: len(lines)] == lines
    assert Counter(line["question"] for line in final) == Counter(q.question for q in known)


def outcome(router: Router, number: int) -> tuple[str, Any]:
    """What a plain client of the router is told: an answer, or an error."""
    stream = number % 2 == 0
    sent = body(router, "11;A*6;B*5;C+6;D+3", 2, 300, group=f"raw-{number}")
    try:
        answer = requests.post(
            f"{router.url}/generate", json={**sent, "stream": stream},
            headers={ROUTING_KEY: f"raw-{number}"}, timeout=BOUND,
        )  # fmt: skip
    except requests.RequestException as error:
        return "broken off", error
    if answer.status_code != 200:
        return f"HTTP {answer.status_code}", answer.text
    if stream and ('"error"' in answer.text or not re.search(r"\[DONE\]\s*$", answer.text)):
        return "cut", answer.text[-300:]
    return "answer", None
