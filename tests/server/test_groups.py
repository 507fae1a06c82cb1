"""Groups on the real server: room for who arrives, shares, minima, the end of a group, metrics."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from step_sglang.client.abort import abort_group
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError, ServerError
from step_sglang.evaluation.simulator import Request, Simulator
from step_sglang.pruning.groups import Group
from tests.server.idle import idle_free_tokens, step_state
from tests.server.launch import Server, serve
from tests.server.pruned import LOG_REQUESTS, together, wait_until

pytestmark = pytest.mark.server

POOL = 3200
PROMPT = list(range(40, 80))
LONG_PROMPT = [40 + i % 200 for i in range(700)]


@pytest.fixture(scope="module")
def server(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "256", "--enable-metrics", *LOG_REQUESTS),
        log=tmp_path_factory.mktemp("log") / "groups.log",
    ) as running:
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def sample(server: Server, prompt: list[int], n: int, tokens: int, **step: Any) -> list[dict]:
    answers = server.generate(
        input_ids=prompt,
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "ignore_eos": True,
            "custom_params": {"step": step or True},
        },
    )
    return answers if isinstance(answers, list) else [answers]


def ordinary(server: Server, prompt: list[int], tokens: int) -> dict:
    return server.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    )


def finished(answers: list[dict]) -> int:
    return sum(a["meta_info"]["finish_reason"]["type"] == "length" for a in answers)


def pruned(server: Server, reason: str) -> int:
    return len(re.findall(rf"STEP pruned .* reason={reason} ", server.log_text()))


def fill(server: Server, threads: ThreadPoolExecutor, group: str) -> Future[list[dict]]:
    """Start a group that fills the pool, and wait until it does."""
    before = pruned(server, "decode")
    future = threads.submit(sample, server, PROMPT, 32, 800, group=group)
    wait_until(lambda: pruned(server, "decode") > before)
    return future


def test_a_new_group_starts_at_once_in_a_full_pool(server, threads) -> None:
    before = idle_free_tokens(server)
    filling = fill(server, threads, "filling")
    admissions = pruned(server, "admission")
    answers = sample(server, LONG_PROMPT, 8, 60, group="new")
    assert not filling.done()
    assert pruned(server, "admission") > admissions
    assert finished(answers) >= 1
    assert max(a["meta_info"]["queue_time"] for a in answers) < 1
    others = filling.result()
    assert finished(others) >= 1
    assert len(others) == 32
    assert idle_free_tokens(server) == before


def test_an_ordinary_request_starts_at_once_in_a_full_pool(server, threads) -> None:
    filling = fill(server, threads, "filling")
    answer = ordinary(server, LONG_PROMPT, 40)
    assert not filling.done()
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 40}
    assert answer["meta_info"]["queue_time"] < 1
    assert finished(filling.result()) >= 1


def test_nobody_is_pruned_for_more_than_a_fair_share(server, threads) -> None:
    """A group whose prompt alone is most of the pool waits for the others, which live on."""
    filling = fill(server, threads, "filling")
    admissions = pruned(server, "admission")
    huge = [40 + i % 200 for i in range(2600)]
    answers = sample(server, huge, 2, 20, group="huge")
    assert finished(answers) == 2
    assert pruned(server, "admission") == admissions
    assert filling.done()


def test_a_weight_is_a_share(server, threads) -> None:
    calls = [
        partial(sample, server, PROMPT, 32, 200, group=f"weight {weight}", weight=weight)
        for weight in (4, 1)
    ]
    kept = [finished(future.result()) for future in together(server, threads, calls)]
    assert kept[0] >= 2 * kept[1] >= 2


@pytest.mark.parametrize(
    ("sizes", "weights", "tokens"), [((64,), (1,), 200), ((24, 24), (3, 1), 150)]
)
def test_the_simulator_tells_the_truth(server, threads, sizes, weights, tokens) -> None:
    """As many pruned in all as in the model; the shares within the scores' and timing's chance."""
    groups = [Group(f"g{i}", weight) for i, weight in enumerate(weights)]
    requests = [
        Request(0, 1, tokens, group)
        for group, size in zip(groups, sizes, strict=True)
        for _ in range(size)
    ]
    simulator = Simulator(POOL - len(PROMPT), 1, StepConfig("s"), seed=0)
    simulator.run(requests)
    expected = [group.finished for group in groups]
    calls = [
        partial(sample, server, PROMPT, size, tokens, group=f"sim {i}", weight=weight)
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    real = [finished(future.result()) for future in together(server, threads, calls)]
    assert sum(real) == pytest.approx(sum(expected), abs=3)
    assert real == pytest.approx(expected, abs=5)
    assert sum(sizes) - sum(real) > 10  # most were pruned, in both


def test_a_minimum_per_group(server) -> None:
    answers = sample(server, PROMPT, 32, 400, min_survivors=6)
    assert 6 <= finished(answers) < 32
    answers = sample(server, PROMPT, 32, 400)
    assert finished(answers) >= 1


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"weight": -1}, "weight must be a number between"),
        ({"weight": 0}, "weight must be a number between"),
        ({"weight": True}, "weight must be a number between"),
        ({"weight": "3"}, "weight must be a number between"),
        ({"weight": 1e300}, "weight must be a number between"),
        ({"min_survivors": 0}, "min_survivors must be an integer"),
        ({"min_survivors": 5}, "min_survivors is 5, but the request asks for only 4"),
        ({"group": 7}, "group must be a string of 1 to 256 characters, not a int"),
        ({"group": "x" * 2**20}, "not 1048576 characters"),
        ({"group": ""}, "not 0 characters"),
        ("yes", "must be true, false or an object"),
        ([], "must be true, false or an object"),
        (1, "must be true, false or an object"),
        ({"wieght": 1}, "unknown members"),
    ],
)
def test_bad_input_is_a_400(server, step: Any, message: str) -> None:
    answer = server.post(
        "/generate",
        {
            "input_ids": PROMPT,
            "sampling_params": {"n": 4, "max_new_tokens": 4, "custom_params": {"step": step}},
        },
    )
    assert answer.status_code == 400 and message in answer.text
    assert len(answer.text) < 1000
    assert finished(sample(server, PROMPT, 2, 4)) == 2


def test_members_may_have_different_prompts(server, threads) -> None:
    futures = [
        threads.submit(sample, server, prompt, n, 20, group="mixed")
        for prompt, n in ((PROMPT, 2), (LONG_PROMPT, 1), ([50], 3))
    ]
    answers = [answer for future in futures for answer in future.result()]
    assert {a["meta_info"]["step"]["group"] for a in answers} == {"mixed"}
    assert finished(answers) == 6


def test_abort_ends_a_group_and_frees_everything(server, threads) -> None:
    before = idle_free_tokens(server)
    futures = [threads.submit(sample, server, PROMPT, 12, 3000, group="doomed") for _ in range(2)]
    other = threads.submit(sample, server, PROMPT, 2, 300, group="spared")
    wait_until(lambda: step_state(server)["live_traces"] == 26)
    assert abort_group(server.url, "doomed") >= 24
    for future in futures:
        answers = future.result()
        assert len(answers) == 12
        for answer in answers:
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
            assert not answer["meta_info"].get("step", {}).get("pruned")
    assert finished(other.result()) == 2
    assert idle_free_tokens(server) == before
    assert step_state(server)["groups"] == 0
    # Reused after its end, the group begins anew.
    assert finished(sample(server, PROMPT, 3, 10, group="doomed")) == 3
    assert abort_group(server.url, "doomed") == 0


def test_abort_reaches_samples_that_have_not_begun(server, threads) -> None:
    """At once after the request was sent, while its prompt is computed or not even read."""
    future = threads.submit(sample, server, LONG_PROMPT, 24, 2000, group="early")
    aborted = 0
    deadline = time.monotonic() + 30
    while not future.done():
        assert time.monotonic() < deadline
        aborted += abort_group(server.url, "early")
    assert aborted
    idle_free_tokens(server)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"group": 3}', b'{"group": ""}', b'{"rid": "x"}']
)
def test_a_bad_abort_is_a_400(server, body: bytes) -> None:
    answer = requests.post(f"{server.url}/step/abort_group", data=body, timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_bad_abort_of_the_client_is_refused(server) -> None:
    with pytest.raises(RequestError, match="group must be"):
        abort_group(server.url, "")
    with pytest.raises(ServerError, match="404"):
        abort_group(f"{server.url}/nowhere", "q")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_a_client_that_leaves_ends_its_traces(server, stream: bool, path: str) -> None:
    before = idle_free_tokens(server)
    common = {"n": 8, "temperature": 1.0, "ignore_eos": True}
    body: dict[str, Any] = (
        {"input_ids": PROMPT, "sampling_params": {**common, "max_new_tokens": 3000}}
        if path == "/generate"
        else {
            "model": "default",
            "messages": [{"role": "user", "content": "1 + 1?"}],
            "max_tokens": 3000,
            **common,
        }
    )
    seen, gone = threading.Event(), threading.Event()

    def run() -> None:
        # Without a stream nothing comes before the timeout.
        with contextlib.suppress(requests.RequestException):
            answer = requests.post(
                f"{server.url}{path}",
                json={**body, "stream": stream},
                stream=True,
                timeout=(5, 120 if stream else 4),
            )
            for _ in answer.iter_lines():
                if seen.is_set():
                    break
            answer.close()
        gone.set()

    threading.Thread(target=run, daemon=True).start()
    wait_until(lambda: step_state(server)["live_traces"] == 8)
    seen.set()
    assert gone.wait(30)
    wait_until(lambda: step_state(server)["live_traces"] == 0, seconds=20)
    assert idle_free_tokens(server) == before


def metric(server: Server, name: str, **labels: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    values = []
    for line in text.splitlines():
        if re.match(rf"{name}(\{{|\s)", line) and all(
            f'{key}="{value}"' in line for key, value in labels.items()
        ):
            values.append(float(line.rsplit(" ", 1)[1]))
    return sum(values)


def test_metrics(server) -> None:
    names = ("step_traces_scored_total", "step_steps_scored_total", "step_tokens_freed_total")
    before = {name: metric(server, name) for name in names}
    pruned_before = metric(server, "step_traces_pruned_total", reason="decode")
    waited = metric(server, "step_waiting_seconds_count", kind="step")
    others = metric(server, "step_waiting_seconds_count", kind="other")
    scored = metric(server, "step_score_count")
    infos = [a["meta_info"]["step"] for a in sample(server, PROMPT, 32, 200)]
    ordinary(server, PROMPT, 5)
    idle_free_tokens(server)
    steps = sum(info["num_steps"] for info in infos)
    after = {name: metric(server, name) - before[name] for name in names}
    assert after["step_steps_scored_total"] == steps == metric(server, "step_score_count") - scored
    assert after["step_traces_scored_total"] == sum(info["num_steps"] > 0 for info in infos)
    victims = metric(server, "step_traces_pruned_total", reason="decode") - pruned_before
    assert victims == sum(info["pruned"] for info in infos) > 0
    assert after["step_tokens_freed_total"] > 10 * victims
    assert metric(server, "step_waiting_seconds_count", kind="step") - waited == 32
    assert metric(server, "step_waiting_seconds_count", kind="other") - others == 1
    assert metric(server, "step_groups_alive") == metric(server, "step_survivors") == 0
    assert metric(server, "sglang:num_running_reqs") == 0  # SGLang's own are still there


def test_hundreds_of_groups_come_and_go(server, threads) -> None:
    before = idle_free_tokens(server)
    answers = threads.map(
        lambda i: sample(server, PROMPT, 4, 8, group=f"many {i}", weight=1 + i % 3), range(300)
    )
    assert sum(finished(a) for a in answers) == 1200
    assert step_state(server)["groups"] == step_state(server)["live_traces"] == 0
    assert idle_free_tokens(server) == before


@pytest.mark.full
@pytest.mark.parametrize(
    ("prompt", "weight"),
    [(LONG_PROMPT, 1e-6), ([40 + i % 200 for i in range(2600)], 1)],
    ids=["a group of a tiny weight", "a prompt of most of the pool"],
)
def test_a_group_that_cannot_start_keeps_nobody_waiting(
    server: Server, threads: ThreadPoolExecutor, prompt: list[int], weight: float
) -> None:
    """It waits for the memory of those who run; who comes after it and fits starts."""
    free = idle_free_tokens(server)
    filling = fill(server, threads, "filling")
    waiting = threads.submit(sample, server, prompt, 2, 20, group="waiting", weight=weight)
    answers = [ordinary(server, [50 + i, *PROMPT], 10) for i in range(5)]
    answers += sample(server, [60, *PROMPT], 4, 10, group="late")
    longest = max(answer["meta_info"]["queue_time"] for answer in answers)
    filled = max(answer["meta_info"]["e2e_latency"] for answer in filling.result())
    assert longest < filled / 4, (longest, filled)
    assert len(waiting.result()) == 2
    assert idle_free_tokens(server) == free
