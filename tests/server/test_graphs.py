"""Scoring inside SGLang's real decode-graph runner, where Python does not run at replay."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.amended import amend
from tests.server.expected import assert_scores, step_positions
from tests.server.launch import Server, serve
from tests.server.recorded_graphs import FLAGS, GRAPHS, LOG, SIZES
from tests.server.traces import PROMPT, sample

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def graphs(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("graphs")
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), *FLAGS, "--decode-log-interval", "1"),
        log=folder / "graphs.log",
        **{LOG: str(folder / "replays")},
        **amend(folder, *GRAPHS),
    ) as server:
        yield server


def replays(server: Server) -> list[dict]:
    lines = (server.log.parent / "replays").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ends_apart(server: Server, n: int) -> list[dict]:
    """A group whose members end one after the other, each of which leaves a token in its row."""
    return list(
        server.generate(
            input_ids=[PROMPT] * n,
            sampling_params=[
                {
                    "temperature": 1.0,
                    "max_new_tokens": 36 + 3 * i,
                    "ignore_eos": True,
                    "custom_params": {"step": {"step_scores": True, "group": f"{n} apart"}},
                }
                for i in range(n)
            ],
        )
    )


def test_scores_of_replayed_passes(graphs: Server, models, scorer: Path) -> None:
    """Padded batches of every size, slots used again, stale boundary tokens in padded rows."""
    model, steps = models["qwen3"], 0
    for _ in range(8):  # until there are enough steps, and a boundary token in a padded row
        for n in (5, 3, 13, 1, 16, 6):
            for answer in ends_apart(graphs, n):
                steps += assert_scores(model, scorer, PROMPT, answer)
        # Each by itself: one of them may be the think-end token.
        stale = {i for line in replays(graphs) for i in line["padding_ids"]}
        boundaries = [i for i in stale if step_positions(model, [i, 0])]
        if steps > 100 and boundaries:
            break
    assert steps > 100
    seen = replays(graphs)
    assert {line["padded"] for line in seen} == set(SIZES)
    assert all(slot == 0 for line in seen for slot in line["padding_slots"])
    assert boundaries, "no padded row ever held a boundary token"
    # 44 traces, one after the other in at most 20 slots
    assert len({slot for line in seen for slot in line["slots"]}) <= 20
    state = graphs.info()["internal_states"][0]["step"]
    assert state["passes_lost"] == 0 and state["stopped"] is None
    assert state["failures"] == {}


def test_traces_beside_ordinary_requests_and_pruning(graphs: Server, models, scorer: Path) -> None:
    """Twenty running requests: the largest graph and eager passes take turns while it prunes."""
    answers = sample(graphs, 20, 200)
    pruned = [a for a in answers if a["meta_info"]["step"]["pruned"]]
    assert pruned
    for answer in answers:
        assert_scores(models["qwen3"], scorer, PROMPT, answer)
    ordinary = graphs.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 10})
    assert "step" not in ordinary["meta_info"]
    assert graphs.info()["internal_states"][0]["step"]["passes_lost"] == 0


def decoded(log: str) -> list[tuple[int, bool]]:
    """For every decode step in the log: requests that ran, and whether a graph was replayed."""
    lines = [line for line in log.splitlines() if "Decode batch" in line]
    found = [re.search(r"#running-req: (\d+),.*graph: (True|False)", line) for line in lines]
    return [(int(line[1]), line[2] == "True") for line in found if line is not None]


def test_traces_are_admitted_up_to_the_largest_graph(graphs: Server) -> None:
    """Of twenty that may run sixteen start; ordinary requests are not held back."""
    assert graphs.info()["internal_states"][0]["step"]["batch_limit"] == max(SIZES)
    assert "--max-running-requests" in next(
        line for line in graphs.log_text().splitlines() if "--step-max-batch" in line
    )
    before = len(graphs.log_text())
    assert len(sample(graphs, 20, 40)) == 20
    with_traces = decoded(graphs.log_text()[before:])
    assert max(rows for rows, _ in with_traces) == max(SIZES)
    assert all(replayed for _, replayed in with_traces)

    before = len(graphs.log_text())
    params = {"n": 20, "max_new_tokens": 40, "ignore_eos": True, "temperature": 1.0}
    params["custom_params"] = {"step": False}
    graphs.generate(input_ids=PROMPT, sampling_params=params)
    ordinary = decoded(graphs.log_text()[before:])
    assert max(rows for rows, _ in ordinary) == 20
    assert any(not replayed for _, replayed in ordinary)


@pytest.mark.full
@pytest.mark.parametrize("fault", ["after_capture", "only_with_traces"])
def test_a_graph_without_the_op_is_refused(
    fault: str, models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    where = {"after_capture": "scheduler", "only_with_traces": "forward"}[fault]
    planted = (f"step_sglang.patches.{where}", f"tests.server.recorded_graphs:{fault}")
    flags = ("--enable-step", "--step-scorer", str(scorer), *FLAGS)
    with (
        pytest.raises(RuntimeError, match=r"not in the decode graphs of batch sizes \[4, 8, 16"),
        serve(
            models["qwen3"],
            *flags,
            log=tmp_path / "log",
            **amend(tmp_path, *GRAPHS, planted),
        ),
    ):
        pass


@pytest.mark.full
def test_these_tests_find_state_that_was_replaced_after_capture(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    planted = ("step_sglang.patches.scheduler", "tests.server.recorded_graphs:another_table")
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), *FLAGS),
        log=tmp_path / "log",
        **amend(tmp_path, *GRAPHS, planted),
    ) as server:
        answers = sample(server, 4, 60)
    assert any(step_positions(models["qwen3"], a["output_ids"]) for a in answers)
    with pytest.raises(AssertionError):
        for answer in answers:
            assert_scores(models["qwen3"], scorer, PROMPT, answer)
