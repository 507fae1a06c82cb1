"""SGLang's real scheduler on a virtual GPU: what plays, what is scored, how long it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from step_sglang import protocol
from step_sglang.client.http import AsyncClient
from step_sglang.client.sampling import Sampling
from step_sglang.evaluation.cost_model import Roofline
from step_sglang.evaluation.methods import METHODS, MethodSettings, SampleResult
from step_sglang.evaluation.replay import ReplayOutcome
from step_sglang.evaluation.replay import simulate as replayed
from step_sglang.evaluation.sampler import ServerSampler
from step_sglang.evaluation.simulation_input import as_recorded
from step_sglang.evaluation.virtual import environment
from step_sglang.simulation.clock import Clock
from step_sglang.simulation.gpu import GPUS, NETWORKS, step_time
from step_sglang.simulation.model import CLOCK_FILE, SPEED_FILE, Player, write_player
from step_sglang.simulation.played import PlayedGroup, in_units
from step_sglang.simulation.speed import Speed
from step_sglang.simulation.synthetic import RIGHT, Ranking, Sampled, scored
from step_sglang.voting.answers import extract_boxed
from step_sglang.voting.session import TraceFate
from step_sglang.voting.verifier import AnswerVerifier
from tests.server.launch import Server, serve

pytestmark = pytest.mark.server

UNIT, N, POOL, LIMIT = 64, 32, 180_000, 40_000  # real tokens
TIME = step_time(GPUS["h100"], NETWORKS["qwen3-8b"])
ALIKE = 0.03  # of the model of the scheduler in `step-sglang replay`, and the scheduler


def played() -> PlayedGroup:
    """32 traces of 17,000 tokens on average: three times the pool."""
    source = np.random.default_rng(5)
    lengths = source.lognormal(9.6, 0.5, N).clip(3000, 38_000).astype(int)
    traces = [Sampled(int(t), RIGHT if source.random() < 0.6 else "1") for t in lengths]
    return in_units(scored("q", 0, traces, Ranking(0.7), 128, LIMIT, 256, source), UNIT)


@pytest.fixture(scope="module")
def group() -> PlayedGroup:
    return played()


@pytest.fixture(scope="module")
def player(group: PlayedGroup, tmp_path_factory: pytest.TempPathFactory) -> Player:
    folder = tmp_path_factory.mktemp("player")
    Speed(TIME, UNIT).write(folder / SPEED_FILE)
    return write_player(folder, [group], LIMIT // UNIT + 64)


@pytest.fixture(scope="module")
def server(player: Player, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        player.folder,
        *("--enable-step", "--step-scorer", str(player.scorer), "--enable-metrics"),
        *("--max-total-tokens", str(POOL // UNIT)),
        log=tmp_path_factory.mktemp("log") / "virtual.log",
        **environment(player.folder, UNIT),
    ) as running:
        yield running


def asked(server: Server, player: Player, method: str) -> SampleResult:
    """Ask the question with a method; `seconds` of the result are simulated."""
    verifier = AnswerVerifier()
    clock = Clock(player.folder / CLOCK_FILE)

    async def ask() -> SampleResult:
        async with AsyncClient(server.url, 300) as client:
            await client.flush()
            sampler = ServerSampler(
                client, list(player.prompts[0]), Sampling(0.0, 1.0, 1, LIMIT // UNIT),
                MethodSettings(), extract_boxed, verifier, clock.now,
                {protocol.PLAY_KEY: [0, method]}, 4,
            )  # fmt: skip
            return await METHODS[method].ask(sampler, N)

    try:
        return asyncio.run(ask())
    finally:
        verifier.close()


def expected(group: PlayedGroup, policy: str) -> ReplayOutcome:
    """What the model of the scheduler makes of the same traces, pool and clock."""
    recorded = as_recorded(group, LIMIT // UNIT)
    return replayed(recorded, policy, POOL // UNIT, Roofline(Speed(TIME, UNIT)), unit=UNIT)


def test_traces_play_as_recorded_in_simulated_seconds(
    server: Server, player: Player, group: PlayedGroup
) -> None:
    sc, step = asked(server, player, "sc"), asked(server, player, "step")
    assert {trace.fate for trace in sc.traces} == {TraceFate.FINISHED}
    pruned = [trace for trace in step.traces if trace.fate is TraceFate.PRUNED]
    assert pruned and len(pruned) < N
    for sample in (sc, step):
        for trace, wanted in zip(sample.traces, group.traces, strict=True):
            if trace.fate is TraceFate.FINISHED:
                assert (trace.tokens, trace.answer) == (wanted.tokens, wanted.answer)
    for trace, wanted in zip(step.traces, group.traces, strict=True):
        scores = wanted.scores[: trace.num_steps]
        assert trace.score == pytest.approx(float(scores.mean()), abs=1e-5)
        if trace.fate is TraceFate.FINISHED:
            assert trace.num_steps == len(wanted.scores)
    # SGLang's own stamps are simulated seconds too: minutes, that took some seconds to simulate.
    latency = step.parts[0].seconds
    stamps = [trace.meta_info for trace in step.traces]
    lasted = max(s["request_finished_ts"] - s["forward_entry_time"] for s in stamps)
    assert latency > 100
    assert lasted == pytest.approx(latency, rel=0.02)
    assert sum(s["queue_time"] for s in stamps) / N < 1
    assert sum(trace.meta_info["queue_time"] for trace in sc.traces) / N > 20


@pytest.mark.parametrize(("method", "policy"), [("sc", "none"), ("step", "fair")])
def test_the_model_of_the_scheduler_agrees_with_the_scheduler(
    server: Server, player: Player, group: PlayedGroup, method: str, policy: str
) -> None:
    found, model = asked(server, player, method), expected(group, policy)
    pruned = sum(trace.fate is TraceFate.PRUNED for trace in found.traces)
    print(method, found.parts[0].seconds, model.seconds, pruned, model.pruned)
    assert found.parts[0].seconds == pytest.approx(model.seconds, rel=ALIKE)
    # One more or less: when the scheduler sees the last of the requests is the machine's matter.
    assert abs(pruned - model.pruned) <= max(1, ALIKE * N)


def test_a_request_that_names_no_traces_ends_at_once(server: Server) -> None:
    for play in (None, [7, "x"], ["q", "x"], 3):
        answer = server.generate(
            input_ids=[3, 3, 3],
            sampling_params={"max_new_tokens": 50, "custom_params": {protocol.PLAY_KEY: play}},
        )
        assert answer["meta_info"]["completion_tokens"] == 1
