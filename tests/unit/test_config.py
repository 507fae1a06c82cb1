"""Flags and engine arguments become one checked configuration."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from step_sglang.config import StepConfig, add_cli_arguments, take_options
from step_sglang.errors import ConfigError


def parse(*argv: str) -> StepConfig | None:
    parser = argparse.ArgumentParser()
    add_cli_arguments(parser)
    return take_options(vars(parser.parse_args(argv)))


def test_defaults() -> None:
    assert parse() is None
    assert parse("--enable-step", "--step-scorer", "s") == StepConfig("s")
    assert not StepConfig("s").scores_all


def test_every_flag() -> None:
    config = parse(
        *("--enable-step", "--step-scorer", "s", "--step-policy", "fair", "--step-scope", "all"),
        *("--step-min-survivors", "3", "--step-min-steps", "2"),
        *("--step-delimiter", r"\n\n", r"a\\nb", "###"),
    )
    assert config == StepConfig("s", "fair", "all", 3, 2, ("\n\n", r"a\nb", "###"))
    assert config.scores_all


def test_the_paper_policy_scores_all() -> None:
    assert StepConfig("s", policy="paper").scores_all
    with pytest.raises(ConfigError, match="contradicts"):
        StepConfig("s", policy="paper", scope="thinking")


def test_room_is_made_unless_told_otherwise() -> None:
    assert StepConfig("s").makes_room and StepConfig("s", admit="fair").makes_room
    assert not StepConfig("s", admit="queue").makes_room
    assert not StepConfig("s", policy="paper").makes_room
    with pytest.raises(ConfigError, match="contradicts"):
        StepConfig("s", policy="paper", admit="fair")


@pytest.mark.parametrize("flag", ["groups", "batch"])
@pytest.mark.parametrize(
    ("value", "meant"), [("off", "off"), ("auto", "auto"), ("3", 3), ("1", 1), ("64", 64)]
)
def test_limits(flag: str, value: str, meant: object) -> None:
    config = parse("--enable-step", "--step-scorer", "s", f"--step-max-{flag}", value)
    assert config is not None
    assert (config.group_limit if flag == "groups" else config.batch_limit) == meant
    option = {f"step_max_{flag}": int(value) if value.isdecimal() else value}
    assert take_options({"enable_step": True, "step_scorer": "s", **option}) == StepConfig(
        "s", **{name[len("step_") :]: given for name, given in option.items()}
    )


@pytest.mark.parametrize("value", ["0", "-1", "all", "", "3.5", "\u0663", "9" * 20, 0, True, 2.0])
def test_bad_limits(value: object) -> None:
    for flag in ("max_groups", "max_batch"):
        with pytest.raises(ConfigError, match="must be auto, off or an integer of at least 1"):
            StepConfig("s", **{flag: value})  # type: ignore[arg-type]


def test_limits_of_other_modes() -> None:
    assert StepConfig("s").group_limit == "off" and StepConfig("s").batch_limit == "auto"
    assert StepConfig("s", policy="paper").group_limit == "off"  # it knows no groups
    assert StepConfig("s", policy="paper", max_groups="off").group_limit == "off"
    with pytest.raises(ConfigError, match="knows no groups"):
        StepConfig("s", policy="paper", max_groups=3)
    capture = StepConfig(capture=True)
    assert capture.group_limit == capture.batch_limit == "off"


def test_a_capturing_server_needs_no_scorer() -> None:
    assert parse("--enable-step", "--step-capture") == StepConfig(capture=True)


def test_engine_arguments_are_taken_out() -> None:
    kwargs: dict[str, Any] = {
        "enable_step": True,
        "step_scorer": "s",
        "step_delimiter": "\n",
        "model_path": "m",
    }
    assert take_options(kwargs) == StepConfig("s", delimiters=("\n",))
    assert kwargs == {"model_path": "m"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_step": True}, "needs --step-scorer"),
        ({"step_scorer": "s"}, "without --enable-step"),
        ({"step_min_survivors": 2}, "--step-min-survivor given without"),
        ({"enable_step": "yes"}, "True or False"),
        ({"enable_step": True, "step_capture": 1}, "on or off"),
        ({"enable_step": True, "step_scorer": "s", "step_policy": "best"}, "fair, paper"),
        ({"enable_step": True, "step_scorer": "s", "step_scope": "some"}, "thinking, all"),
        ({"enable_step": True, "step_scorer": "s", "step_admit": "first"}, "fair, queue"),
        ({"enable_step": True, "step_scorer": "s", "step_min_survivors": 0}, "at least 1"),
        ({"enable_step": True, "step_scorer": "s", "step_min_steps": True}, "at least 1"),
        ({"enable_step": True, "step_scorer": "s", "step_min_steps": 2.0}, "integer"),
        ({"enable_step": True, "step_scorer": "s", "step_delimiters": [""]}, "non-empty"),
        ({"enable_step": True, "step_scorer": "s", "step_delimiters": 3}, "non-empty"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_options(options)
