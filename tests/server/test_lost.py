"""Passes that nothing scored are counted, never silent; when all are lost, STEP stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from step_sglang.patches.forward import MAX_LOST_PASSES
from tests.server.amended import amend
from tests.server.expected import step_positions, step_scores
from tests.server.launch import Server, serve
from tests.server.recorded_graphs import FLAGS as GRAPH_FLAGS
from tests.server.recorded_graphs import GRAPHS
from tests.server.traces import PROMPT, sample

pytestmark = pytest.mark.server

MODEL = "sglang.srt.models.qwen3"


def state(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.info()["internal_states"][0]["step"]
    return found


def metric(server: Server, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    (line,) = [line for line in text.splitlines() if line.startswith(name + "{")]
    return float(line.rsplit(" ", 1)[1])


def serve_amended(
    models: dict[str, Path], scorer: Path, folder: Path, function: str, *flags: str
) -> Any:
    return serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--enable-metrics"),
        *("--max-running-requests", "128", "--max-total-tokens", "3200", *flags),
        log=folder / "log",
        **amend(folder, (MODEL, f"tests.server.bypasses:{function}")),
    )


def test_a_model_that_never_comes_to_the_hook(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    with serve_amended(models, scorer, tmp_path, "always") as server:
        (first,) = sample(server, 1, MAX_LOST_PASSES // 2)
        step = first["meta_info"]["step"]
        assert step["num_steps"] == 0 and step["score"] is None and step["step_scores"] == []
        assert "stopped" not in step
        assert state(server)["passes_lost"] == MAX_LOST_PASSES // 2

        answers = sample(server, 24, 200)
        for answer in answers:
            step = answer["meta_info"]["step"]
            assert step["stopped"] == (
                f"scoring was bypassed by the model or a plugin in {MAX_LOST_PASSES} forward "
                "passes in a row"
            )
            assert step["num_steps"] == 0 and not step["pruned"]
            assert answer["meta_info"]["finish_reason"]["type"] == "length"
        ends = [step_positions(models["qwen3"], answer["output_ids"]) for answer in answers]
        assert any(ends)  # there was what to score
        # Once stopped, it serves as stock SGLang does: retraction in the place of pruning.
        assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
        (after,) = sample(server, 1, 5)
        assert "bypassed" in after["meta_info"]["step"]["stopped"]

        info = state(server)
        assert info["passes_lost"] == MAX_LOST_PASSES and "bypassed" in info["stopped"]
        assert metric(server, "step_passes_lost_total") == MAX_LOST_PASSES
        assert metric(server, "step_stopped") == 1
        text = server.log_text()
        assert text.count("STEP lost a forward pass") == 1
        assert text.count("STEP stopped for good") == 1
        assert "STEP pruned" not in text


@pytest.mark.full
def test_passes_that_are_lost_now_and_then(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    """Each reported score is that of the step it is reported for; the lost ones are missing."""
    with serve_amended(models, scorer, tmp_path, "every_third") as server:
        answers = sample(server, 8, 150)
        info = state(server)
    scored = missed = 0
    for answer in answers:
        step, output = answer["meta_info"]["step"], answer["output_ids"]
        positions = step["positions"]
        all_steps = step_positions(models["qwen3"], output)
        assert set(positions) <= set(all_steps)
        expected = step_scores(models["qwen3"], scorer, PROMPT, output, positions)
        torch.testing.assert_close(
            torch.tensor(step["step_scores"]), torch.tensor(expected), rtol=0, atol=1e-5
        )
        scored += len(positions)
        missed += len(all_steps) - len(positions)
    assert scored > 2 * missed * 0.5 and missed > 0
    assert 0 < info["passes_lost"] < 3 * MAX_LOST_PASSES and info["stopped"] is None


@pytest.mark.full
def test_decode_graphs_of_such_a_model_are_refused(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    with (
        pytest.raises(RuntimeError, match=r"does not call LogitsProcessor\.forward with a"),
        serve(
            models["qwen3"],
            *("--enable-step", "--step-scorer", str(scorer), *GRAPH_FLAGS),
            log=tmp_path / "log",
            **amend(tmp_path, *GRAPHS, (MODEL, "tests.server.bypasses:always")),
        ),
    ):
        pass
