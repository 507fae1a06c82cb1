"""A seeded mix of hostile actions; ``python -m tests.mix`` does more of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from tests.mix.plan import SETTINGS, Setting
from tests.mix.run import flags, mix
from tests.models import build_model
from tests.server.launch import Server, serve

pytestmark = pytest.mark.server

SHORT, LONG = 120, 240  # actions


@pytest.fixture(scope="module")
def same_shape(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The model that is served, and one for updates of its weights."""
    return models["qwen3"], build_model(tmp_path_factory.mktemp("other") / "model", seed=7)


@contextmanager
def started(
    models: tuple[Path, Path], scorer: Path, setting: Setting, log: Path
) -> Iterator[Server]:
    with serve(models[0], *flags(setting, scorer), log=log) as server:
        yield server


@pytest.fixture(scope="module")
def server(
    same_shape: tuple[Path, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("mix") / "mix.log"
    with started(same_shape, scorer, SETTINGS["updates"], log) as running:
        yield running


@pytest.mark.timeout(900)
def test_a_short_mix(server: Server, same_shape: tuple[Path, Path]) -> None:
    outcome = mix(server, same_shape, "updates", SETTINGS["updates"], seed=0, count=SHORT)
    print(outcome)
    assert not outcome.problems, str(outcome)
    # All of it happened, with far too little memory: how often depends on the machine's speed.
    counts = outcome.tally.counts
    kinds = ("group", "ordinary", "voted", "named", "turn", "left", "aborted", "slow reader")
    assert all(counts[kind] for kind in kinds), str(outcome)
    assert counts["pruned"], str(outcome)


SERIES = re.compile(r"^([a-z_:]+\{[^}]*\})", re.MULTILINE)


def series(server: Server) -> set[str]:
    """Every series on ``/metrics``, by its name and labels."""
    return set(SERIES.findall(requests.get(f"{server.url}/metrics", timeout=60).text))


def test_names_never_become_labels(server: Server) -> None:
    """Ids that requests choose are without bound, so a series for each would fill any memory."""

    def send(number: int) -> None:
        step = {"group": f"spy-group-{number}", "trace": f"spy-trace-{number}"}
        answer = server.generate(
            input_ids=[[50 + number % 100, 60, 61]] * 4,
            rid=[f"spy-rid-{number}-{i}" for i in range(4)],
            sampling_params={
                "max_new_tokens": 12,
                "ignore_eos": True,
                "custom_params": {"step": step},
            },
        )
        assert len(answer) == 4

    send(0)
    before = series(server)
    assert any(line.startswith("step_steps_scored_total{") for line in before)
    for number in range(1, 100):
        send(number)
    after = series(server)
    assert not [line for line in after if "spy-" in line]
    assert len(after - before) < 20, sorted(after - before)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("seeds", "count"),
    [
        pytest.param(1, SHORT, marks=pytest.mark.full, id="short"),
        pytest.param(3, LONG, marks=pytest.mark.slow, id="long"),
    ],
)
def test_a_mix_on_every_setting(
    same_shape: tuple[Path, Path],
    scorer: Path,
    tmp_path: Path,
    name: str,
    seeds: int,
    count: int,
) -> None:
    with started(same_shape, scorer, SETTINGS[name], tmp_path / f"{name}.log") as server:
        for seed in range(1, seeds + 1):
            outcome = mix(server, same_shape, name, SETTINGS[name], seed, count)
            print(outcome)
            assert not outcome.problems, str(outcome)
