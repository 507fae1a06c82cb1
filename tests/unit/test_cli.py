"""The command line itself: help, versions, plans, and bad input as one sentence."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from step_sglang import __version__
from step_sglang.cli.main import app
from step_sglang.cli.serve import REASONER_POOL, first_request, server_command
from step_sglang.client.launch import free_port
from step_sglang.config import StepConfig, add_cli_arguments, take_options
from step_sglang.errors import ConfigError, ScorerError, SourceError, nearest
from step_sglang.evaluation.methods import ALIASES, METHODS
from step_sglang.evaluation.setup import DEFAULT_METHODS, QUESTION_SEED
from step_sglang.reasoner import model_path, questions, scorer_path
from step_sglang.scoring.scorer import ScorerInfo, save_scorer
from step_sglang.training.fit import ScorerNetwork
from step_sglang.training.store import Writer
from step_sglang.training.train import Shares, train_scorer
from step_sglang.voting.suffix import BOXED_SUFFIX, default_suffix
from tests.training_samples import D, meta, planted_store, question

COMMANDS = (
    "serve", "ask", "collect", "train", "inspect", "convert", "push", "bench", "report", "replay",
)  # fmt: skip


def helped(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return re.sub(r"[^\S\n]+", " ", result.output)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == f"step-sglang {__version__}"


def test_every_command_has_help_with_panels() -> None:
    shown = helped()
    for command in COMMANDS:
        assert f" {command} " in shown
    panels = {"collect": ("Questions", "Sampling", "What is stored"), "ask": ("Vote", "Sampling")}
    panels["bench"] = ("Questions", "Methods", "Model and server", "Memory", "Run", "Output")
    panels["train"] = ("Recipe", "Questions", "Run")
    for command, titles in panels.items():
        for title in titles:
            assert f" {title} " in helped(command), (command, title)


def test_the_help_of_bench_names_every_method_and_the_real_defaults() -> None:
    shown = helped("bench")
    assert all(name in shown for name in (*METHODS, *ALIASES))
    assert DEFAULT_METHODS in shown
    command = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    defaults = {param.name: param.default for param in command.params}
    assert defaults["methods"] == DEFAULT_METHODS and defaults["question_seed"] == QUESTION_SEED


def test_serve_starts_the_reasoner_with_its_own_scorer_and_a_pool_that_prunes() -> None:
    command, _ = server_command(
        "reasoner", ["--log-level", "error"], "auto", "0.0.0.0", 30001, None
    )
    assert command[:3] == [sys.executable, "-m", "sglang.launch_server"]
    said = " ".join(command)
    assert f"--model-path {model_path()}" in said and f"--step-scorer {scorer_path()}" in said
    assert said.endswith(f"--max-total-tokens {REASONER_POOL} --log-level error")
    assert "--host 0.0.0.0 --port 30001" in said and "--enable-step" in said


def test_a_first_request_is_one_that_the_model_can_answer() -> None:
    shown = first_request("reasoner", "http://h:1")
    assert questions("test", 1)[0].question in shown and "http://h:1/v1/chat" in shown
    assert ";A" not in first_request("org/model", "http://h:1")


@pytest.mark.parametrize(
    ("model", "scorer", "message"),
    [
        ("org/model", "auto", "no scorer is known for org/model"),
        ("org/model", "no.pt", "scorer no.pt does not exist"),
        ("./no-model", str(scorer_path()), "no model ./no-model"),
    ],
)
def test_serve_refuses_before_it_starts_anything(model: str, scorer: str, message: str) -> None:
    with pytest.raises((ScorerError, SourceError), match=re.escape(message)):
        server_command(model, [], scorer, "127.0.0.1", 30000, None)


def test_serve_refuses_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "reasoner", "--port", port])
    assert "give another --port" in str(result.exception)


def test_serve_leaves_nothing_behind() -> None:
    """A child of a server that is ended while it starts does not yet watch its parent."""
    child = "import time; time.sleep(600)"
    server = (
        "import subprocess, sys, time; "
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True); "
        "time.sleep(600)"
    )
    command = (
        "import sys; from step_sglang.cli import main, serve; "
        f"serve.server_command = lambda *_: ([sys.executable, '-c', {server!r}], {{}}); "
        f"main.app(['serve', 'reasoner', '--port', '{free_port()}'])"
    )
    serve = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE)
    try:
        assert serve.stdout is not None
        left = int(serve.stdout.readline())
        os.kill(left, 0)
    finally:
        serve.terminate()
    assert serve.wait(60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 20
    while Path(f"/proc/{left}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{left}").exists()


@pytest.mark.parametrize("seconds", ["-1", "nan"])
def test_watch_wants_a_time_that_is_one(seconds: str) -> None:
    result = CliRunner().invoke(app, ["watch", "--seconds", seconds])
    assert isinstance(result.exception, SourceError)
    assert "--seconds must be at least 0" in str(result.exception)


def test_a_wrong_value_of_a_server_flag_is_one_line() -> None:
    parser = argparse.ArgumentParser()
    add_cli_arguments(parser)
    for words, message in (
        (("--step-policy", "papper"), "not 'papper' (did you mean 'paper'?)"),
        (("--step-min-survivors", "two"), "must be an integer of at least 1, not 'two'"),
        (("--step-temperature", "hot"), "must be above 0, not 'hot'"),
    ):
        parsed = parser.parse_args(["--enable-step", "--step-scorer", "s", *words])
        with pytest.raises(ConfigError, match=re.escape(message)):
            take_options(vars(parsed))


def test_what_is_in_effect() -> None:
    assert StepConfig("s").effective()["admit"] == "fair"
    paper = StepConfig("s", policy="paper").effective()
    assert (paper["scope"], paper["admit"]) == ("all", "queue")


def test_nearest_names() -> None:
    assert nearest("aime25", ["aime-25", "hmmt-25"]) == " (did you mean 'aime-25'?)"
    assert nearest("zzz", ["aime-25"]) == ""


def test_what_is_appended_to_a_question() -> None:
    assert default_suffix("org/model") == BOXED_SUFFIX
    assert default_suffix("org/model", "choice") == ""
    assert default_suffix("reasoner") == default_suffix(str(model_path())) == ""


def test_inspect_is_a_table_and_takes_the_folder_of_train(tmp_path: Path) -> None:
    from step_sglang.training.fit import Recipe

    store = planted_store(tmp_path / "store", 16)
    train_scorer(store, tmp_path / "out", Recipe(epochs=1), Shares(0.2, 0.3))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert len(result.output.splitlines()) < 60 and "{" not in result.output.split("sampling")[0]
    assert "hidden size" in result.output and "AUC within the question" in result.output
    empty = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert "holds no scorer.safetensors" in str(empty.exception)


def test_few_questions_come_with_a_warning_and_no_interval(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", 16)
    arguments = ["train", str(store), "-o", str(tmp_path / "out"), "--epochs", "1", "--test", "0.3"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "far too few" in result.output and "[" not in result.output.split("epoch  1")[-1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "measured on 5 questions: far too few" in card and "intervals" not in card
    figures = card.split("## Figures")[1]
    assert not re.search(r"\d \(0?\.?\d+.*-", figures), figures


def test_an_interval_within_the_question_counts_those_with_both_kinds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shares = [0.5] + [1.0, 0.0] * 6
    with Writer(tmp_path / "mixed", meta()) as writer:
        for i, share in enumerate(shares):
            writer.add(question(f"q{i}", rng, share=share))
    scorer = ScorerNetwork(D).as_scorer(ScorerInfo("planted"))
    save_scorer(scorer, tmp_path / "s.safetensors")
    arguments = ["inspect", str(tmp_path / "s.safetensors"), "--on", str(tmp_path / "mixed")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    ranked, votes = result.stdout.split("AUC within the question")[1].split("accuracy")
    assert "[" not in ranked and "[" in votes  # 13 questions vote
    assert "measured on 1 question with right and wrong traces: far too few" in result.stderr


def test_shares_of_a_trace_are_in_their_order(tmp_path: Path) -> None:
    """Also of a file that an earlier version wrote, in the order of the alphabet."""
    at = {share: [float(share[:-1]) / 1000, None, None] for share in ("100%", "25%", "50%", "75%")}
    training = {"test": {"auc_within_question": {"running mean": at}}}
    scorer = ScorerNetwork(D).as_scorer(ScorerInfo("planted", training=training))
    save_scorer(scorer, tmp_path / "s.safetensors")
    card = str(tmp_path / "card.md")
    arguments = ["inspect", str(tmp_path / "s.safetensors"), "--card", card]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in (result.stdout, Path(card).read_text()):
        assert re.search(r"25%.*50%.*75%.*100%", text), text
        assert re.search(r"0\.025.*0\.050.*0\.075.*0\.100", text), text
