"""Scorers by name: on the Hub, in the table of published ones, and what goes wrong, over HTTP."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from step_sglang.cli.main import app
from step_sglang.client.launch import free_port
from step_sglang.config import StepConfig
from step_sglang.errors import ScorerError
from step_sglang.patches import preflight
from step_sglang.reasoner import model_path, scorer_path
from step_sglang.scoring import locate, published
from step_sglang.scoring.hub import HubReference, parse_reference
from step_sglang.scoring.locate import known_scorer, locate_scorer, other_model, same_model
from step_sglang.scoring.published import PUBLISHED, RAW_VARIABLE, git_blob_id
from step_sglang.scoring.scorer import ScorerInfo, load_scorer, save_scorer
from step_sglang.training.card import card_text
from step_sglang.training.push import push_scorer
from tests.hub import TOKEN, Hub, running_hub

OURS = scorer_path().read_bytes()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does in a process that begins with it."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as running:
        point_at(monkeypatch, running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv(RAW_VARIABLE, f"{running.url}/raw")
        monkeypatch.setenv("STEP_CACHE", str(tmp_path / "step"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield running


def reference_file(tmp_path: Path, width: int = 64) -> bytes:
    """A checkpoint as the reference implementation saves it."""
    file = tmp_path / "made.pt"
    state = {
        "net.0.weight": torch.randn(512, width),
        "net.0.bias": torch.zeros(512),
        "net.2.weight": torch.randn(1, 512),
        "net.2.bias": torch.zeros(1),
    }
    torch.save({"model_state_dict": state}, file)
    return file.read_bytes()


def refusal(given: str, model: str = "m") -> str:
    with pytest.raises(ScorerError) as caught:
        locate_scorer(given, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_names_a_repository_and_what_a_path() -> None:
    assert parse_reference("org/name") == HubReference("org/name")
    assert parse_reference("org/name@v1") == HubReference("org/name", None, "v1")
    assert parse_reference("o/n/a/s.pt@abc") == HubReference("o/n", "a/s.pt", "abc")
    for path in ("scorer.pt", "./o/n", "/o/n", "~/o/n", "out/scorer.safetensors", "a b/c"):
        assert parse_reference(path) is None


def test_the_only_scorer_of_a_repository_is_downloaded_once(hub: Hub) -> None:
    hub.add("org/s", scorer__safetensors=OURS, model__safetensors=b"large", README__md=b"card")
    file = locate_scorer("org/s", "m")
    assert Path(file).read_bytes() == OURS and load_scorer(file).info.model == "reasoner"
    assert locate_scorer("org/s", "m") == file
    fetched = [asked for asked in hub.asked if asked.startswith("GET /org/s/resolve")]
    assert len(fetched) == 1


def test_a_file_of_the_reference_at_a_revision(hub: Hub, tmp_path: Path) -> None:
    data = reference_file(tmp_path)
    held = hub.add("org/s", deep___Qwen_step_scorer__pt=data)
    held.commits.append({})  # removed since
    first = hub.repositories["org/s"]
    commit = next(c for c in [_id(0), _id(1)] if first.at(c) == (c, first.commits[0]))
    file = locate_scorer(f"org/s/deep/Qwen_step_scorer.pt@{commit}", "m")
    assert load_scorer(file).hidden_size == 64
    assert load_scorer(locate_scorer(f"org/s@{commit}", "m")).hidden_size == 64
    assert "no file 'deep/Qwen_step_scorer.pt'" in refusal("org/s/deep/Qwen_step_scorer.pt")


def _id(number: int) -> str:
    import hashlib

    return hashlib.sha1(f"commit {number}".encode()).hexdigest()


def test_without_network_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    held = hub.add("org/s", scorer__safetensors=OURS)
    there, _ = held.at("main") or ("", {})
    file = locate_scorer("org/s", "m")
    for offline in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            point_at(patch, f"http://127.0.0.1:{free_port()}")
            assert locate_scorer("org/s", "m") == file
            assert locate_scorer(f"org/s@{there}", "m") == file
            assert locate_scorer("org/s/scorer.safetensors", "m") == file
            for given in ("org/other", "org/other/scorer.pt"):
                message = refusal(given)
                assert f"scorer {given} is not in the cache and the Hub does not answer" in message


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_fails_is_as_one_that_does_not_answer(hub: Hub, status: int) -> None:
    hub.add("org/s", scorer__safetensors=OURS, README__md=b"card")
    hub.add("org/other", scorer__safetensors=OURS)
    file = locate_scorer("org/s", "m")
    hub.status = status
    assert locate_scorer("org/s", "m") == file
    assert locate_scorer("org/s/scorer.safetensors", "m") == file
    for given in ("org/other", "org/s/other_scorer.pt"):
        message = refusal(given)
        assert f"scorer {given} is not in the cache and the Hub fails (HTTP {status}" in message
    hub.status = 418
    assert "the Hub refuses scorer org/other (HTTP 418" in refusal("org/other")


def test_each_thing_that_goes_wrong_is_one_sentence(hub: Hub) -> None:
    hub.add("org/two", a_scorer__safetensors=OURS, b_scorer__pt=OURS)
    hub.add("org/none", model__safetensors=b"large")
    hub.add("org/gated", gated=True, scorer__safetensors=OURS)
    assert "holds 2 scorers (a_scorer.safetensors, b_scorer.pt): name one" in refusal("org/two")
    assert "org/none holds no scorer" in refusal("org/none")
    assert "org/gated is gated: ask for access on its page, and set HF_TOKEN" in refusal(
        "org/gated"
    )
    assert "the Hub has no repository org/missing" in refusal("org/missing")
    assert "org/two has no branch, tag or commit 'v9'" in refusal("org/two@v9")
    assert refusal("out/scorer.pt").endswith("scorer out/scorer.pt does not exist")


def test_a_gated_repository_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/gated", gated=True, scorer__safetensors=OURS)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Path(locate_scorer("org/gated", "m")).read_bytes() == OURS


def test_a_path_is_never_looked_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    assert refusal("results/run") == "scorer results/run does not exist"
    assert locate_scorer(str(scorer_path()), "m") == str(scorer_path())
    assert locate_scorer(str(scorer_path().parent), "m") == str(scorer_path())  # train's folder
    assert f"the folder {tmp_path} holds no scorer.safetensors" in refusal(str(tmp_path))
    assert locate_scorer("", "m") == ""
    assert not hub.asked


def test_auto_downloads_what_the_table_names_and_checks_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = reference_file(tmp_path)
    entry = replace(PUBLISHED[0], blob=git_blob_id(data))
    monkeypatch.setattr(locate, "PUBLISHED", (entry,))
    path = f"/raw/{entry.repository}/{entry.commit}/{entry.path}"
    assert "answers 404" in refusal("auto", entry.model)
    hub.raw[path] = b"something else"
    assert "is another file than the scorer of" in refusal("auto", entry.model)
    hub.raw[path] = data
    for model in (entry.model, f"/models/{entry.model.split('/')[1]}"):
        file = locate_scorer("auto", model)
        assert load_scorer(file).hidden_size == 64
    monkeypatch.setenv(RAW_VARIABLE, f"http://127.0.0.1:{free_port()}")  # no network
    assert locate_scorer("auto", entry.model) == file
    Path(file).unlink()
    assert "cannot be downloaded from" in refusal("auto", entry.model)


def test_auto_knows_the_papers_models_and_the_embedded_one() -> None:
    assert {entry.model: entry.hidden_size for entry in PUBLISHED} == {
        "Qwen/Qwen3-4B-Thinking-2507": 2560,
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": 4096,
        "microsoft/Phi-4-reasoning-plus": 5120,
    }
    assert locate_scorer("auto", "reasoner") == str(scorer_path())
    assert locate_scorer("auto", str(model_path())) == str(scorer_path())
    cached = f"/c/models--Qwen--Qwen3-4B-Thinking-2507/snapshots/{'a' * 40}"
    assert known_scorer(cached) is PUBLISHED[0]
    message = refusal("auto", "org/unknown")
    assert "no scorer is known for org/unknown" in message and PUBLISHED[2].model in message


def test_git_knows_files_by_the_same_id() -> None:
    assert git_blob_id(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert published.RAW_GITHUB.startswith("https://")


def test_a_scorer_of_another_model_or_revision_is_named(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same_model("Qwen/Qwen3-4B", "/models/qwen3-4b/")
    assert not same_model("Qwen/Qwen3-4B", "other/Qwen3-4B")
    (tmp_path / "other" / "Qwen3-4B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for copy in ("other/Qwen3-4B", "other/Qwen3-4B/", "./other/Qwen3-4B"):
        assert same_model("Qwen/Qwen3-4B", copy)
    assert not same_model("Qwen/Qwen3-4B", "another/Qwen3-4B")
    at = "/c/models--o--n/snapshots/" + "b" * 40
    assert other_model("o/n", "b" * 40, at, None) is None
    assert other_model("o/n", None, at, None) is None
    assert "at aaaaaaaaaaaa, and bbbbbbbbbbbb is served" in str(
        other_model("o/n", "a" * 40, at, None)
    )
    scorer = load_scorer(scorer_path())
    config = StepConfig("s.pt")
    with caplog.at_level(logging.WARNING):
        preflight._check_model(scorer, config, str(model_path()), None)
        assert not caplog.text
        preflight._check_model(scorer, config, "org/another", None)
    assert "was trained for reasoner, and org/another is served" in caplog.text
    file = tmp_path / "s.safetensors"
    save_scorer(replace(scorer, info=ScorerInfo("org/first", revision="c" * 40)), file)
    assert load_scorer(file).info.revision == "c" * 40
    with pytest.raises(ScorerError, match=r"\(of org/first\).*but org/served's are 64 wide"):
        preflight.load_config_scorer(StepConfig(str(file)), 64, "org/served")


def test_push_and_serve_from_what_was_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "scorer.safetensors").write_bytes(OURS)
    (folder / "ranking.png").write_bytes(b"plot")
    (folder / "private.txt").write_text("stays")
    (folder / "old").mkdir()
    for name in ("me.png", "taxes.pdf", "old/ranking.png", "old/README.md", "ranking.jpg"):
        (folder / name).write_bytes(b"stays")
    with pytest.raises(ScorerError, match="set HF_TOKEN"):
        push_scorer(folder, "me/s", False, "first")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(ScorerError, match=r"refused me/s \(HTTP 401.*HF_TOKEN"):
        push_scorer(folder, "me/s", False, "first")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = CliRunner().invoke(app, ["push", str(folder), "me/s"])
    assert result.exit_code == 0, result.output
    held = hub.repositories["me/s"].commits[-1]
    assert set(held) == {"scorer.safetensors", "README.md", "ranking.png"}
    assert b"![ranking](ranking.png)" in held["README.md"] and b"me.png" not in held["README.md"]
    assert f"{hub.url}/me/s/commit/" in result.output
    assert "--step-scorer me/s" in result.output
    assert Path(locate_scorer("me/s", "reasoner")).read_bytes() == OURS
    point_at(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ScorerError, match="nothing was pushed to me/s"):
        push_scorer(folder, "me/s", False, "again")
    for name in ("me", "me/a--b", "me/-s"):
        with pytest.raises(ScorerError, match=f"'{name}' is no name of a repository: "):
            push_scorer(folder, name, False, "again")
    with pytest.raises(ScorerError, match="does not exist"):
        push_scorer(tmp_path, "me/s", False, "again")


def test_only_the_card_of_this_scorer_is_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    scorer, card = load_scorer(scorer_path()), tmp_path / "README.md"
    save_scorer(scorer, tmp_path / "scorer.safetensors")
    card.write_text("# My project\n")
    with pytest.raises(ScorerError, match=r"README\.md is no card of a scorer"):
        push_scorer(tmp_path, "me/s", False, "first")
    assert card.read_text() == "# My project\n" and not hub.repositories
    card.write_text("A word of my own.\n".join(card_text(scorer).partition("## Figures\n")))
    push_scorer(tmp_path, "me/s", False, "first")
    assert b"A word of my own." in hub.repositories["me/s"].commits[-1]["README.md"]
    save_scorer(replace(scorer, b2=scorer.b2 + 1), tmp_path / "scorer.safetensors")
    with pytest.raises(ScorerError, match="describes another scorer than the one beside it"):
        push_scorer(tmp_path, "me/s", False, "second")
    card.unlink()
    push_scorer(tmp_path, "me/s", False, "second")
    assert len(hub.repositories["me/s"].commits) == 3


def test_a_card_says_what_the_file_says(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    result = CliRunner().invoke(app, ["inspect", str(scorer_path()), "--card", str(card)])
    assert result.exit_code == 0, result.output
    text = card.read_text()
    figures = load_scorer(scorer_path()).info.training["test"]["auc_within_question"]
    value, low, high = figures["running mean"]["50%"]
    assert f"| {value:.3f} ({low:.3f}-{high:.3f}) |" in text
    assert "| data | reasoner:scorer-train |" in text and "95 train, 17 validation" in text
    assert "base_model" not in text  # the embedded reasoner is on no Hub
    bare = replace(load_scorer(scorer_path()), info=ScorerInfo("Qwen/Qwen3-8B"))
    text = card_text(bare, ["roc.png"])
    assert "base_model: Qwen/Qwen3-8B\n" in text and "The file states none." in text
    assert "| data | unknown |" in text and "![roc](roc.png)" in text


def test_the_environment_variables_of_the_hub_count(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/s", scorer__safetensors=OURS)
    done = subprocess.run(
        [sys.executable, "-m", "step_sglang", "inspect", "org/s", "--json"],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["hidden_size"] == load_scorer(scorer_path()).hidden_size
