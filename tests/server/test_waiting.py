"""One request that finds no room keeps nobody else waiting."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.launch import Server, serve
from tests.server.test_groups import (
    LONG_PROMPT,
    POOL,
    PROMPT,
    fill,
    idle_free_tokens,
    ordinary,
    sample,
)

pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.fixture(scope="module")
def server(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "256"),
        log=tmp_path_factory.mktemp("log") / "waiting.log",
    ) as running:
        yield running


@pytest.mark.parametrize(
    ("prompt", "weight"),
    [(LONG_PROMPT, 1e-6), ([40 + i % 200 for i in range(2600)], 1)],
    ids=["a group of a tiny weight", "a prompt of most of the pool"],
)
def test_a_group_without_a_claim_keeps_nobody_waiting(
    server: Server, prompt: list[int], weight: float
) -> None:
    """It waits for the memory of those who run; who comes after it has a claim and starts."""
    free = idle_free_tokens(server)
    with ThreadPoolExecutor(4) as threads:
        filling = fill(server, threads, "filling")
        waiting = threads.submit(sample, server, prompt, 2, 20, group="waiting", weight=weight)
        answers = [ordinary(server, [50 + i, *PROMPT], 10) for i in range(5)]
        late = sample(server, [60, *PROMPT], 4, 10, group="late")
        waits = [answer["meta_info"]["queue_time"] for answer in (*answers, *late)]
        assert not filling.done() and max(waits) < 1, waits
        filling.result()
        assert len(waiting.result()) == 2
    assert idle_free_tokens(server) == free
