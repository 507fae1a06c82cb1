"""The hierarchical cache: what comes back from the host has room made for it, beside pruning."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.server.amended import amend
from tests.server.expected import assert_scores
from tests.server.idle import free_tokens, step_state
from tests.server.launch import Server, serve
from tests.server.traces import sample

pytestmark = [pytest.mark.server, pytest.mark.full]

POOL = 1600
POOL_HOST = "sglang.srt.mem_cache.pool_host"
AMENDMENTS = (
    (f"{POOL_HOST}.common", "tests.server.host_cache:without_registration"),
    (f"{POOL_HOST}.mha", "tests.server.host_cache:copies"),
)
LONG = [[40 + (i * step + step) % 200 for i in range(600)] for step in (1, 3, 7, 11)]


@pytest.fixture(scope="module", params=["write_through"])
def server(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    scorer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("host-cache")
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--enable-hierarchical-cache", "--hicache-ratio", "4", "--page-size", "16"),
        *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
        *("--hicache-write-policy", request.param, "--enable-cache-report"),
        log=folder / "server.log",
        **amend(folder, *AMENDMENTS),
    ) as running:
        yield running


def ask(server: Server, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True, **more}
    return dict(server.generate(input_ids=prompt, sampling_params=params))


def from_host(answer: dict[str, Any]) -> int:
    """Tokens of a prompt that came from the host."""
    return int((answer["meta_info"].get("cached_tokens_details") or {}).get("host", 0))


def test_what_comes_back_counts_in_the_room_that_pruning_makes(
    server: Server, models: dict[str, Path], scorer: Path
) -> None:
    """Prompts that are in the host's memory alone come back while a group fills the pool."""
    alone = {i: ask(server, prompt, 8)["output_ids"] for i, prompt in enumerate(LONG)}
    with ThreadPoolExecutor(8) as threads:
        group = threads.submit(sample, server, 32, 400, group="g")
        before = time.monotonic()
        while "STEP pruned" not in server.log_text():  # until the traces fill the pool
            assert time.monotonic() < before + 120
            time.sleep(0.05)
        others = [threads.submit(ask, server, LONG[i % 4], 8) for i in range(12)]
        answers = [future.result() for future in others]
        traces = group.result()
    loaded = [from_host(answer) for answer in answers]
    assert any(loaded), loaded
    # The first of them to come back found the pool full of traces.
    assert re.search(r"STEP pruned .*reason=admission", server.log_text())
    for i, answer in enumerate(answers):
        assert answer["output_ids"] == alone[i % 4]
    for answer in traces:
        assert_scores(models["qwen3"], scorer, list(range(40, 80)), answer)
    pruned = [answer["meta_info"]["step"]["pruned"] for answer in traces]
    assert any(pruned) and not all(pruned)
    assert sum(answer["meta_info"]["num_retractions"] for answer in (*answers, *traces)) == 0
    assert step_state(server)["failures"] == {} and step_state(server)["passes_lost"] == 0


def test_a_group_whose_prompt_comes_back(
    server: Server, models: dict[str, Path], scorer: Path
) -> None:
    """Its prompt is loaded once, and its traces are scored as ever."""
    for prompt in LONG:  # fill the pool with others
        ask(server, prompt, 8)
    body = {
        "input_ids": LONG[0],
        "sampling_params": {
            "n": 24, "temperature": 1.0, "max_new_tokens": 300, "ignore_eos": True,
            "custom_params": {"step": {"step_scores": True}},
        },
    }  # fmt: skip
    traces = server.generate(**body)
    for answer in traces:
        assert_scores(models["qwen3"], scorer, LONG[0], answer)
    pruned = [answer["meta_info"]["step"]["pruned"] for answer in traces]
    assert any(pruned) and not all(pruned)


def test_the_pool_comes_back(server: Server) -> None:
    assert free_tokens(server) == POOL
    assert "hit an exception" not in server.log_text()
    assert requests.get(f"{server.url}/health", timeout=30).status_code == 200
