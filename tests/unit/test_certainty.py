"""Step scores without a scorer."""

from __future__ import annotations

import math

import pytest
import torch

from step_sglang.config import NO_SCORER, StepConfig
from step_sglang.patches.preflight import load_config_scorer
from step_sglang.pruning.groups import GroupRegistry
from step_sglang.scoring.certainty import Certainty
from step_sglang.scoring.confidence import token_confidences
from step_sglang.scoring.locate import locate_scorer


def test_a_steps_score_is_its_least_certain_token_and_the_next_begins_anew() -> None:
    certainty = Certainty()
    assert certainty.end_step() is None
    for probability in (0.9, 0.3, 1.0):
        certainty.add(-math.log(probability))
    assert certainty.end_step() == pytest.approx(0.3)
    assert certainty.end_step() is None
    certainty.add(0.0)
    assert certainty.end_step() == 1.0


def test_a_token_whose_logits_were_not_finite_counts_as_nothing() -> None:
    certainty = Certainty()
    certainty.add(math.nan)
    assert certainty.end_step() is None
    certainty.add(0.5)
    certainty.add(math.nan)
    assert certainty.end_step() == pytest.approx(math.exp(-0.5))


def test_the_likeliest_tokens_confidence_is_what_more_candidates_say_of_it() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    expected = -logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(token_confidences(logits, (1,))[:, 0], expected)
    torch.testing.assert_close(token_confidences(logits, (1, 20))[:, 0], expected)


def test_without_a_scorer_every_trace_has_its_certainty_and_with_one_none() -> None:
    assert GroupRegistry().join("q").certainty is None
    groups = GroupRegistry(by_certainty=True)
    one, other = groups.join("q"), groups.join("q")
    assert one.certainty is not None and one.certainty is not other.certainty
    assert one.top_k == 0 and not groups.watched  # it is no signal of a baseline


def test_the_server_needs_no_file_for_it() -> None:
    config = StepConfig(NO_SCORER)
    assert config.by_certainty and config.scorer_file == ""
    assert not StepConfig("s").by_certainty and StepConfig("s").scorer_file == "s"
    assert locate_scorer(NO_SCORER, "m") == NO_SCORER
    blank = load_config_scorer(config, 64)
    assert blank.hidden_size == 64 and not blank.w1.any()
    assert config.effective()["scorer"] == "none"
