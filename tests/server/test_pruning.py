"""The whole path on the real server: scores, pruning, memory, in the configurations that differ."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.expected import assert_scores
from tests.server.idle import free_tokens
from tests.server.launch import Server, serve
from tests.server.traces import NEW_TOKENS, PROMPT, TRACES, sample

pytestmark = pytest.mark.server

POOL = (len(PROMPT) + TRACES * NEW_TOKENS) // 4 // 16 * 16  # a quarter of the demand, whole pages

CONFIGURATIONS = {
    "qwen3-plain": ("qwen3", (), {}),
    "qwen3-page16": ("qwen3", ("--page-size", "16"), {}),
    "llama-no-overlap-no-radix-chunked": (
        "llama",
        ("--disable-overlap-schedule", "--disable-radix-cache", "--chunked-prefill-size", "16"),
        {},
    ),
    "phi3-page16-no-overlap-queue": (
        "phi3",
        ("--page-size", "16", "--disable-overlap-schedule", "--step-admit", "queue"),
        {},
    ),
    "qwen3-mixed-chunk-retract": (
        "qwen3",
        ("--enable-mixed-chunk", "--chunked-prefill-size", "32"),
        # SGLang's own test switch: retracts every third pass, so traces resume again and again.
        {"SGLANG_TEST_RETRACT": "1"},
    ),
}


# The plain one, and the one that differs most from it.
QUICK = ("qwen3-plain", "phi3-page16-no-overlap-queue")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
        for name in CONFIGURATIONS
    ],
)
def running(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    scorer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path, Server]]:
    kind, flags, env = CONFIGURATIONS[request.param]
    with serve(
        models[kind],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "128", *flags),
        log=tmp_path_factory.mktemp("log") / f"{request.param}.log",
        **env,
    ) as server:
        yield request.param, models[kind], server


def test_prunes_instead_of_retracting(running, scorer: Path) -> None:
    name, model, server = running
    before = free_tokens(server)
    answers = sample(server)
    infos = [answer["meta_info"] for answer in answers]

    assert len(answers) == TRACES
    assert len({info["id"] for info in infos}) == TRACES
    assert len({info["step"]["group"] for info in infos}) == 1
    pruned = [info for info in infos if info["step"]["pruned"]]
    finished = [info for info in infos if not info["step"]["pruned"]]
    assert pruned and finished
    for info in pruned:
        reason = info["finish_reason"]
        assert reason["type"] == "abort" and reason["status_code"] is None
        assert reason["message"].startswith("pruned by STEP")
        assert 0 < info["completion_tokens"] < NEW_TOKENS
    for info in finished:
        assert info["finish_reason"] == {"type": "length", "length": NEW_TOKENS}
    retracted = sum(info["num_retractions"] for info in infos)
    if name.endswith("retract"):
        assert retracted > 0  # by the test switch
    else:
        assert retracted == 0
    steps = sum(assert_scores(model, scorer, PROMPT, answer) for answer in answers)
    assert steps > TRACES
    # The pool was full before the first trace died: nothing is pruned earlier.
    assert f"STEP pruned rid={pruned[0]['id']!r}" in server.log_text()
    assert free_tokens(server) == before
    assert server.process.poll() is None


def test_nothing_is_pruned_while_memory_lasts(running) -> None:
    name, _, server = running
    infos = [answer["meta_info"] for answer in sample(server, n=8, tokens=50)]
    assert [info["step"]["pruned"] for info in infos] == [False] * 8
    if not name.endswith("retract"):
        assert sum(info["num_retractions"] for info in infos) == 0


def test_an_ordinary_request_survives_among_traces(running) -> None:
    _, _, server = running

    def ordinary(_: int) -> dict:
        return server.generate(
            input_ids=PROMPT,
            sampling_params={"temperature": 0, "max_new_tokens": 300, "ignore_eos": True},
        )

    with ThreadPoolExecutor(4) as pool:
        traces = pool.submit(sample, server)
        answers = list(pool.map(ordinary, range(3)))
    assert any(answer["meta_info"]["step"]["pruned"] for answer in traces.result())
    for answer in answers:
        assert "step" not in answer["meta_info"]
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 300}
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


def test_the_pool_was_full_when_the_first_trace_was_pruned(running) -> None:
    """From the log: at the first pruning no page was free."""
    name, _, server = running
    if name.endswith("queue"):
        assert "reason=admission" not in server.log_text()
    line = next(line for line in server.log_text().splitlines() if "STEP pruned" in line)
    freed = int(line.split("tokens_freed=")[1].split()[0])
    used, size = map(int, line.split("pool_used=")[1].split("/"))
    assert freed > 0
    # One running request needs at most one page for its next token.
    assert size - (used + freed) < TRACES * 16
