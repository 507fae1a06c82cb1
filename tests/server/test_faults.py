"""What fails inside STEP costs scores and prunings, never a request or the server."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch

from tests.server.death import kill_while_pruning
from tests.server.expected import step_positions, step_scores
from tests.server.faults import Fault, plant
from tests.server.idle import free_tokens
from tests.server.launch import Server, one_core_each, serve
from tests.server.traces import PROMPT, TRACES, assert_same_victims, sample

pytestmark = pytest.mark.server

FAULTS = (
    Fault("step_sglang.scoring.slots", "step_score_", every=7),
    Fault("step_sglang.scoring.slots", "SlotState.reset", every=5),
    Fault("step_sglang.scoring.slots", "SlotState.reset", every=7, after=True),
    Fault("step_sglang.scoring.slots", "SlotState.results", every=23),
    Fault("step_sglang.pruning.policy", "worst_last", every=13),
    Fault("step_sglang.pruning.standings", "GroupStandings.take", every=3),
    Fault("step_sglang.pruning.standings", "GroupStandings.take", every=7, after=True),
    Fault("step_sglang.pruning.standings", "GroupStandings.grow", every=31),
    Fault("step_sglang.pruning.standings", "GroupStandings.rank", every=101),
    Fault("step_sglang.pruning.policy", "Candidates.reclaim", every=2),
    Fault("step_sglang.pruning.policy", "Candidates.reclaimable", every=4),
    Fault("step_sglang.pruning.groups", "Trace.add_step", every=50),
    Fault("step_sglang.pruning.groups", "Trace.meta", every=47, after=True),
    Fault("step_sglang.pruning.groups", "Trace.meta", every=40),
    Fault("step_sglang.pruning.groups", "GroupRegistry.join", every=45),
    Fault("step_sglang.pruning.metrics", "StepMetrics.step_scored", every=9),
    Fault("step_sglang.pruning.metrics", "StepMetrics.trace_pruned", every=9),
)
PLACES = {"scoring", "pruning", "admission", "requests", "responses", "metrics"}


@pytest.fixture(scope="module")
def faulty(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "3200"),
        *("--max-running-requests", "128", "--enable-metrics"),
        log=folder / "faults.log",
        **plant(folder, *FAULTS),
    ) as server:
        yield server


def failures(server: Server) -> dict[str, int]:
    found: dict[str, int] = server.info()["internal_states"][0]["step"]["failures"]
    return found


def test_every_request_is_answered_and_what_is_scored_is_right(
    faulty: Server, models: dict[str, Path], scorer: Path
) -> None:
    before = free_tokens(faulty)
    answers = [answer for _ in range(3) for answer in sample(faulty)]
    assert len({answer["meta_info"]["id"] for answer in answers}) == 3 * TRACES
    scored = missed = retracted = unsaid = 0
    for answer in answers:
        retracted += answer["meta_info"]["num_retractions"]
        step = answer["meta_info"].get("step")
        if step is None:  # the trace was never made, or its description failed
            unsaid += 1
            continue
        assert answer["meta_info"]["finish_reason"]["type"] in ("length", "abort")
        output, positions = answer["output_ids"], step["positions"]
        assert len(positions) == step["num_steps"] == len(step["step_scores"])
        assert set(positions) <= set(step_positions(models["qwen3"], output))
        missed += len(step_positions(models["qwen3"], output)) - len(positions)
        if not positions:
            continue
        scored += len(positions)
        expected = step_scores(models["qwen3"], scorer, PROMPT, output, positions)
        torch.testing.assert_close(
            torch.tensor(step["step_scores"]), torch.tensor(expected), rtol=0, atol=1e-5
        )
        assert abs(step["score"] - sum(expected) / len(expected)) < 1e-5
    counted = failures(faulty)
    print(f"{scored} steps scored, {missed} missed, {retracted} retractions, failures {counted}")
    assert scored > TRACES and missed > 0 and 0 < unsaid < TRACES
    assert retracted > 0  # SGLang's own, in the place of prunings that failed
    assert set(counted) == PLACES and min(counted.values()) >= 2
    assert faulty.info()["internal_states"][0]["step"]["live_traces"] == 0
    assert free_tokens(faulty) == before
    assert faulty.process.poll() is None


def test_they_are_counted_in_the_metrics_and_logged_once(faulty: Server) -> None:
    sample(faulty)  # alone, too, it has something to count
    counted = failures(faulty)
    assert counted["scoring"] >= 2
    text = requests.get(f"{faulty.url}/metrics", timeout=60).text
    series = re.findall(r'^step_failures_total\{.*where="(\w+)".*\} (\S+)$', text, re.MULTILINE)
    summed: Counter[str] = Counter()
    for where, count in series:  # of the scheduler, and of the HTTP server, where nothing failed
        summed[where] += int(float(count))
    assert +summed == counted
    lines = re.findall(r"STEP failed in (\w+)", faulty.log_text())
    assert sorted(lines) == sorted(counted)
    assert "RuntimeError: planted in step_score_" in faulty.log_text()


def test_what_requests_say_does_not_break_the_log(faulty: Server, tmp_path: Path) -> None:
    evil = "x\n[2030-01-01] STEP pruned everything \x1b[31m\u202e\u2028" + "long" * 5000
    before = faulty.log_text().count("STEP pruned")
    names = [f"{tmp_path}/rid", *(f"{tmp_path}/{i}{evil}" for i in range(1, TRACES))]
    answers = faulty.generate(
        input_ids=[PROMPT] * TRACES,
        rid=names,
        sampling_params={
            "max_new_tokens": 200,
            "ignore_eos": True,
            "custom_params": {"step": {"group": f"{tmp_path}/{evil}"[:256]}},
        },
    )
    assert [answer["meta_info"]["id"] for answer in answers] == names
    assert not list(tmp_path.iterdir())  # no name became a file's
    text = faulty.log_text()
    # Lines of the tests before may still come.
    lines = [line for line in text.split("\n") if "STEP pruned" in line][before:]
    assert len(lines) >= 10
    # Each of them is the engine's own, with what was said in quotes.
    own = re.compile(r"\[\d+-\d+-\d+ \d+:\d+:\d+\] STEP (pruned rid='|prunes without scores: )")
    assert all(own.match(line) for line in lines)
    assert max(map(len, lines)) < 700
    assert "\n[2030" not in text and "\x1b[31m" not in text
    assert "\u202e" not in text and "\u2028" not in text


@pytest.mark.timeout(1200)
def test_sigkill_of_the_scheduler(faulty: Server) -> None:
    kill_while_pruning(faulty, "sglang::scheduler")


@pytest.mark.full
def test_ranks_stay_together_when_one_of_them_fails(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    faults = (
        Fault("step_sglang.pruning.standings", "GroupStandings.take", every=2, rank=1),
        Fault("step_sglang.pruning.standings", "GroupStandings.take", every=5, rank=0),
        Fault("step_sglang.pruning.standings", "GroupStandings.grow", every=7, rank=1),
        Fault("step_sglang.scoring.slots", "step_score_", every=3, rank=1),
    )
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "3000"),
        *("--tp-size", "2", "--max-running-requests", "128"),
        log=tmp_path / "tp.log",
        SGLANG_CPU_OMP_THREADS_BIND=one_core_each(),
        **plant(tmp_path, *faults),
    ) as server:
        for _ in range(2):
            infos = [answer["meta_info"] for answer in sample(server)]
            assert len(infos) == TRACES
            assert sum(info["num_retractions"] for info in infos) > 0
        assert_same_victims(server, at_least=20)
        for rank in (0, 1):
            assert re.search(rf"TP{rank}\] STEP failed in pruning", server.log_text())
