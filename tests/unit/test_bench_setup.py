"""What a bench is told: models, servers, shards, pools; and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from step_sglang.cli.common import resolve_model
from step_sglang.cli.main import app
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Job
from step_sglang.errors import RequestRefused, ServerError, StepError
from step_sglang.evaluation import pilot, serving
from step_sglang.evaluation.errors import BenchError
from step_sglang.evaluation.pilot import measured_lengths
from step_sglang.evaluation.profiles import Profile, profile_of
from step_sglang.evaluation.results import ResultWriter
from step_sglang.evaluation.serving import (
    Model,
    PoolSize,
    ServerHandle,
    Serving,
    probe_server,
    served,
)
from step_sglang.evaluation.setup import BenchOptions, memories_of, set_up, shard_of
from step_sglang.reasoner import model_path


def test_sampling_is_the_papers_by_the_models_name() -> None:
    assert profile_of("Qwen/Qwen3-4B-Thinking-2507").sampling == Sampling(0.6, 0.95, 20, 32768)
    assert profile_of("microsoft/Phi-4-reasoning-plus").sampling == Sampling(0.8, 0.95, 50, 32768)
    reasoner = profile_of("reasoner")
    assert reasoner.sampling == Sampling(1.0, 1.0, -1, 900) and reasoner.window == 20


def test_a_scorer_counts_by_its_content(tmp_path: Path) -> None:
    scorer = tmp_path / "scorer.safetensors"

    def meta(**more: Any) -> dict[str, Any]:
        chosen = BenchOptions("reasoner:test", "reasoner", "reasoner", limit=1, pool="64", **more)
        return set_up(chosen, lambda text: None).meta

    found = []
    for content in (b"one", b"another"):
        scorer.write_bytes(content)
        found.append(meta(scorer=str(scorer)))
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"scorer_sha256"}
    with ResultWriter(tmp_path / "out", found[0]):
        pass
    with (
        pytest.raises(BenchError, match="scorer_sha256"),
        ResultWriter(tmp_path / "out", found[1]),
    ):
        pass
    # What an earlier version did not write counts as equal.
    del found[0]["scorer_sha256"]
    for one in found:
        with ResultWriter(tmp_path / "before", one):
            pass
    assert meta()["scorer"] is None and meta()["scorer_sha256"]  # the embedded one


def test_shards_share_the_questions_without_overlap() -> None:
    jobs = tuple("abcdefg")
    parts = [shard_of(f"{k}/3", jobs) for k in (1, 2, 3)]
    assert sorted(place for part in parts for place, _ in part) == list(range(7))
    assert all(jobs[place] == job for part in parts for place, job in part)
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(BenchError, match="--shard"):
            shard_of(wrong, jobs)


def pools(profile: Profile, **options: Any) -> tuple[PoolSize, ...] | None:
    return memories_of(BenchOptions("d", "m", "m", **options), profile, lambda text: None)


def test_the_automatic_pool_holds_a_quarter_of_the_traces() -> None:
    profile = profile_of("reasoner")
    assert profile.mean_tokens is not None
    (memory,) = pools(profile, pool="auto", shard="1/2") or ()
    assert memory.tokens == 16 * profile.mean_tokens + profile.prompt_tokens
    other = profile_of("m")
    assert pools(other, pool="auto") is None
    assert pools(other, mem_fraction="0.9", shard="1/2") == (PoolSize(share=0.9),)
    for wrong, message in (
        ((None, "1/2"), "every shard would measure"),
        (("0.9", "1/1"), "exclude each other"),
    ):
        with pytest.raises(BenchError, match=message):
            pools(other, pool="auto", mem_fraction=wrong[0], shard=wrong[1])


def test_a_pilot_is_sampled_once_and_serves_any_n(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Job(f"q{i}", f"q{i}", "1") for i in range(9)]
    asked: list[str] = []

    @contextmanager
    def fake(*arguments: Any) -> Iterator[ServerHandle]:
        yield ServerHandle("http://x", 512, None, 100)

    class Source:
        def __init__(self, *arguments: Any) -> None:
            pass

        async def render(self, messages: Any) -> list[int]:
            asked.append(messages[0]["content"])
            if asked[-1] == "q1":
                raise RequestRefused("too long")
            return [1] * 10

        async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
            for index in range(body["sampling_params"]["n"]):
                info = {"completion_tokens": 20, "finish_reason": {"type": "stop"}}
                yield {"index": index, "text": "", "meta_info": info}

        async def close(self) -> None:
            pass

    monkeypatch.setattr(pilot, "served", fake)
    monkeypatch.setattr(pilot, "AsyncClient", Source)
    arguments = (Model("m", None), jobs, Sampling(), "", tmp_path)
    lengths = measured_lengths(*arguments)
    assert asked == ["q0", "q1", "q2", "q3"]
    assert (lengths.quarter(64), lengths.quarter(16)) == (330, 90)
    assert measured_lengths(*arguments) == lengths and len(asked) == 4
    (tmp_path / pilot.PILOT).write_text("{}")
    with pytest.raises(BenchError, match="remove it"):
        measured_lengths(*arguments)
    with pytest.raises(RequestRefused):
        measured_lengths(Model("m", None), jobs[1:2], Sampling(), "", tmp_path / "new")


def test_the_embedded_reasoner_is_known_by_name_and_by_path() -> None:
    assert resolve_model(None, None, "reasoner:test") == ("reasoner", str(model_path()))
    assert resolve_model(str(model_path()), None, "x.jsonl") == ("reasoner", str(model_path()))
    assert resolve_model("org/model", None, "aime-25") == ("org/model", "org/model")
    with pytest.raises(BenchError, match="--model"):
        resolve_model(None, None, "aime-25", BenchError)


def info(**step: Any) -> dict[str, Any]:
    state = {"step": {"policy": "fair", "capture": False, **step}} if step else {}
    return {"max_total_num_tokens": 512, "max_req_input_len": 95, "internal_states": [state]}


def test_a_server_is_looked_at_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(value: dict[str, Any]) -> None:
        monkeypatch.setattr(serving, "server_info", lambda url: value)

    answer(info())
    assert probe_server("http://x/v1", None) == serving.ServerHandle("http://x", 512, None, 100)
    with pytest.raises(BenchError, match="without STEP"):
        probe_server("http://x", "fair")
    answer(info(policy="fair"))
    assert probe_server("http://x", "fair").policy == "fair"
    with pytest.raises(BenchError, match="need paper"):
        probe_server("http://x", "paper")
    answer(info(capture=True))
    with pytest.raises(BenchError, match="--step-capture"):
        probe_server("http://x", "fair")
    answer({"error": "no"})
    with pytest.raises(ServerError, match="no SGLang server"):
        probe_server("http://x", None)


def test_step_needs_a_scorer(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="--scorer"),
        served(Serving("fair", PoolSize()), Model("m", None), 8, tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "no.jsonl", "--model", "m"), "cannot read no.jsonl"),
        (
            ("--dataset", "reasoner:test", "--methods", "steps"),
            "'steps' (did you mean 'step'?)",
        ),
        (("--dataset", "aime25", "--model", "m"), "'aime25' (did you mean 'aime-25'?)"),
        (("--dataset", "reasoner:test", "--n", "0"), "--n takes integers"),
        (
            ("--dataset", "reasoner:test", "--scorer", "no.pt"),
            "scorer no.pt does not exist",
        ),
        (("--dataset", "reasoner:test", "--pool", "64", "--mem-fraction", "0.5"), "exclude"),
        (("--dataset", "reasoner:test", "--url", "http://127.0.0.1:9"), "does not answer"),
    ],
)
def test_errors_come_before_anything_starts(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, StepError)
    assert message in str(result.exception)


def test_the_commands_are_registered() -> None:
    group = typer.main.get_command(app)
    assert {"bench", "report", "replay"} <= set(getattr(group, "commands", {}))
