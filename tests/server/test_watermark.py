"""A share of the pool for groups, on the real server."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server.launch import serve
from tests.server.test_pruning import POOL
from tests.server.traces import PROMPT, TRACES, sample

pytestmark = pytest.mark.server

SHARE = 0.5


@pytest.mark.full
def test_groups_fill_half_of_the_pool_and_others_the_rest(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    # Without a radix cache every prompt is its request's own, and the pool holds nothing else.
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        *("--max-running-requests", "128", "--disable-radix-cache"),
        *("--step-prune-at", str(SHARE), "--decode-log-interval", "1"),
        log=tmp_path / "server.log",
    ) as server:
        step = server.info()["internal_states"][0]["step"]
        assert step["prune_at"] == SHARE and step["kv_limit"] == int(POOL * SHARE)

        answers = sample(server)
        assert len(answers) == TRACES
        infos = [answer["meta_info"] for answer in answers]
        reasons = {info["step"].get("reason") for info in infos if info["step"]["pruned"]}
        assert reasons == {"watermark"}
        assert any(not info["step"]["pruned"] for info in infos)
        assert sum(info["num_retractions"] for info in infos) == 0
        log = server.log_text()
        used = [int(n) for n in re.findall(r"Decode batch.*?#token: (\d+)", log)]
        assert len(used) > 100
        # The share was used, and never exceeded.
        assert 0.45 * POOL < max(used) <= SHARE * POOL

        def ordinary(_: int) -> dict:
            return server.generate(
                input_ids=PROMPT,
                sampling_params={"temperature": 0, "max_new_tokens": 300, "ignore_eos": True},
            )

        with ThreadPoolExecutor(4) as pool:
            traces = pool.submit(sample, server)
            others = list(pool.map(ordinary, range(3)))
        infos = [answer["meta_info"] for answer in traces.result()]
        assert any(info["step"].get("reason") == "watermark" for info in infos)
        for answer in others:
            assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 300}
        used = [int(n) for n in re.findall(r"Decode batch.*?#token: (\d+)", server.log_text())]
        assert max(used) > SHARE * POOL  # theirs came on top
