"""Batches that SGLang pads beyond the slots: to a multiple of the ranks, as MoE models need it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import build_model
from tests.server.amended import amend
from tests.server.expected import step_positions
from tests.server.launch import one_core_each, serve
from tests.server.traces import sample

pytestmark = [pytest.mark.server, pytest.mark.full]

RANKS, RUNNING = 3, 4
PADDING = ("sglang.srt.distributed.parallel_state", "tests.server.padded:scatter_on_the_cpu")


def served(scorer: Path, folder: Path, *amendments: tuple[str, str]) -> tuple[int, dict[str, Any]]:
    """Steps of some groups' traces, and what the server says of STEP afterwards.

    Four requests have five slots, the padding's included; their batch has six rows.
    """
    model = build_model(folder / "model", vocab=384, kv_heads=RANKS)
    cores = one_core_each()
    environment = amend(folder, PADDING, *amendments, unpinned=True)
    with serve(
        model,
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "3000"),
        *("--tp-size", str(RANKS), "--moe-dense-tp-size", "1"),
        *("--max-running-requests", str(RUNNING)),
        log=folder / "log",
        SGLANG_CPU_OMP_THREADS_BIND=f"{cores}|{cores.split('|', maxsplit=1)[0]}",
        **environment,
    ) as server:
        steps = 0
        for n in (RUNNING, 2, RUNNING, 1):
            for answer in sample(server, n, 60):
                step = answer["meta_info"]["step"]
                # SGLang means this flag for MoE models: the MLP of this one, which stays divided,
                # computes something of its own, so there is nothing to compare the values with.
                if not amendments:
                    assert step["positions"] == step_positions(model, answer["output_ids"])
                    assert all(0 < score < 1 for score in step["step_scores"])
                steps += step["num_steps"]
        return steps, server.info()["internal_states"][0]["step"]


def test_a_batch_with_more_rows_than_there_are_slots(scorer: Path, tmp_path: Path) -> None:
    steps, state = served(scorer, tmp_path)
    assert steps > 10
    assert state["passes_lost"] == 0 and state["failures"] == {}


def test_room_for_slots_alone_does_not_do(scorer: Path, tmp_path: Path) -> None:
    planted = ("step_sglang.patches.scheduler", "tests.server.padded:rows_of_slots")
    _, state = served(scorer, tmp_path, planted)
    assert state["passes_lost"] > 10 and state["failures"].get("scoring")
