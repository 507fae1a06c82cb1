"""Fails open: what a guarded body raises is swallowed, counted, and logged once."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from step_sglang.patches import guard as module
from step_sglang.patches.forward import StepHostOutput
from step_sglang.patches.guard import guard
from step_sglang.pruning.groups import GroupRegistry


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_counts", module.Counter())
    monkeypatch.setattr(module, "_logged", set())
    monkeypatch.setattr(module, "_observer", None)


def test_counts_every_failure_and_logs_the_first_of_each_kind(caplog) -> None:
    seen: list[str] = []
    module.observe(seen.append)
    with caplog.at_level(logging.ERROR):
        for error in (KeyError("a"), KeyError("b"), IndexError(), KeyError("c")):
            with guard("scoring") as body:
                raise error
            assert body.failed
        with guard("pruning"):
            raise KeyError
    assert module.counts() == {"scoring": 4, "pruning": 1}
    assert seen == ["scoring"] * 4 + ["pruning"]
    assert [(r.args, r.exc_info[0]) for r in caplog.records] == [
        (("scoring",), KeyError),
        (("scoring",), IndexError),
        (("pruning",), KeyError),
    ]


def test_as_a_decorator() -> None:
    @guard("requests")
    def divide(by: int) -> float:
        return 6 / by

    assert divide(2) == 3
    assert divide(0) is None and divide(0) is None
    assert divide(3) == 2
    assert divide.__name__ == "divide" and module.counts() == {"requests": 2}


def test_nothing_failed() -> None:
    with guard("scoring") as body:
        pass
    assert not body.failed and module.counts() == {}


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_order_to_end_is_no_failure(error: type[BaseException]) -> None:
    with pytest.raises(error), guard("scoring"):
        raise error
    assert module.counts() == {}


def test_a_counter_that_fails_harms_nothing() -> None:
    def broken(where: str) -> None:
        raise OSError(where)

    module.observe(broken)
    with guard("metrics"):
        raise ValueError
    assert module.counts() == {"metrics": 1}


def test_while_a_graph_is_captured_the_server_must_not_start(monkeypatch) -> None:
    """A graph without the op would be replayed without ever scoring."""
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="op"), guard("scoring"):
        raise ValueError("op")


def test_a_score_that_cannot_be_recorded_costs_the_others_nothing() -> None:
    groups = GroupRegistry()
    traces = [groups.join("g", step_scores=True) for _ in range(3)]
    traces[1].step_scores = ()  # type: ignore[assignment]  # takes no score
    values = torch.tensor([[[0.25, 0.25]], [[0.5, 0.5]], [[0.75, 0.75]]])
    output = StepHostOutput(values, hidden=None, kept=None, owners=(), confidences=None)
    reqs = [SimpleNamespace(step_trace=trace, output_ids=[7, 8]) for trace in traces]
    commit = SimpleNamespace(output_index=2, token_ids=(8,))
    output.consume(SimpleNamespace(reqs=reqs), [commit] * 3)
    assert [traces[i].step_scores for i in (0, 2)] == [[0.25], [0.75]]
    assert [traces[i].positions for i in (0, 2)] == [[1], [1]]
    assert module.counts() == {"scoring": 1}
