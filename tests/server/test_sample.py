"""A server that keeps groups for training: what they become, and what other requests notice."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from transformers import AutoTokenizer

from step_sglang.gathering.choice import is_chosen
from step_sglang.reasoner import model_path, questions
from step_sglang.reasoner.tokenizer import prompt_text
from step_sglang.training.reader import Reader
from tests.server.idle import idle_free_tokens, step_state
from tests.server.launch import Server, serve
from tests.server.launch import start_command as start

pytestmark = pytest.mark.server

N, SHARE, POOL = 12, 0.5, 1300  # half of what a group asks for
QUESTIONS = [q.question for q in questions("scorer-train", 12, seed=5)]
_names = (f"group {i}" for i in itertools.count())
CHOSEN = (name for name in _names if is_chosen(name, SHARE))
OTHERS = (name for name in _names if not is_chosen(name, SHARE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sampled") / "groups"


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", "none", "--enable-metrics"),
        *("--step-sample", str(folder), "--step-sample-share", str(SHARE)),
        *("--max-total-tokens", str(POOL), "--step-refill", "best"),
        log=tmp_path_factory.mktemp("log") / "sample.log",
    ) as running:
        yield running


def generate(server: Server, question: str = QUESTIONS[0], n: int = N, **step: Any) -> list[dict]:
    return server.generate(
        text=prompt_text(question),
        sampling_params={
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": 300,
            "skip_special_tokens": False,
            "custom_params": {"step": step},
        },
    )


def chat(server: Server, messages: list[dict[str, str]], **more: Any) -> Any:
    body = {"model": "default", "messages": messages, "temperature": 1.0, "max_tokens": 300}
    answer = server.post("/v1/chat/completions", {**body, "return_meta_info": True, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def rows(folder: Path, group: str) -> list[dict[str, Any]]:
    """The traces of a group, with what its line says of all of them."""
    text = "".join(file.read_text() for file in sorted(folder.glob("*.jsonl")))
    found = [json.loads(line) for line in text.split("\n") if line]
    return [row | trace for row in found if row["group"] == group for trace in row.pop("traces")]


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def counted(server: Server, name: str, label: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(rf"^{name}{{[^}}]*{label}[^}}]*}} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_a_chosen_group_runs_to_its_end_and_others_are_pruned(server: Server, folder: Path) -> None:
    before = idle_free_tokens(server)
    name, other = next(CHOSEN), next(OTHERS)
    answers = generate(server, group=name, refill="best")
    infos = [answer["meta_info"] for answer in answers]
    assert all(info["step"]["sampled"] is True for info in infos)
    assert not any(info["step"]["pruned"] or "branch" in info["step"] for info in infos)
    # They did not fit together: some had to wait, as without STEP.
    assert sum(info["completion_tokens"] for info in infos) > POOL
    spared = [answer["meta_info"]["step"] for answer in generate(server, group=other)]
    assert not any("sampled" in step for step in spared)
    assert any(step["pruned"] or "branch" in step for step in spared)
    until(lambda: len(rows(folder, name)) == N)
    found = rows(folder, name)
    prompt = AutoTokenizer.from_pretrained(model_path())(prompt_text(QUESTIONS[0]))["input_ids"]
    assert all(row["prompt"] == prompt for row in found)
    assert all(row["question"] == prompt_text(QUESTIONS[0]) for row in found)
    by_text = {row["text"]: row for row in found}
    for answer in answers:
        row = by_text[answer["text"]]
        assert row["tokens"] == answer["output_ids"]
        assert row["finish"] == answer["meta_info"]["finish_reason"]["type"]
        assert row["score"] == answer["meta_info"]["step"]["score"]
        wanted = row["extracted"] is not None and row["extracted"] == row["voted"]
        assert row["agrees"] == wanted
    assert found[0]["agreement"] == pytest.approx(sum(r["agrees"] for r in found) / N, abs=1e-6)
    assert not rows(folder, other)
    assert idle_free_tokens(server) == before


def test_the_prompt_is_kept_as_it_was_served(server: Server, folder: Path) -> None:
    name = next(CHOSEN)
    messages = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": QUESTIONS[1]},
        {"role": "assistant", "content": "\\boxed{0}"},
        {"role": "user", "content": QUESTIONS[2]},
    ]
    step = {"group": name}
    choices = chat(server, messages, n=N, custom_params={"step": step}, skip_special_tokens=False)
    until(lambda: len(rows(folder, name)) == N)
    found = rows(folder, name)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert {row["question"] for row in found} == {prompt}
    assert tokenizer.decode(found[0]["prompt"]) == prompt
    assert sorted(row["text"] for row in found) == sorted(c["message"]["content"] for c in choices)


def test_a_vote_waits_for_all_of_a_chosen_group(server: Server, folder: Path) -> None:
    for name in (next(CHOSEN), next(OTHERS)):
        step = {"traces": N, "group": name, "early": "posterior", "threshold": 0.4, "shrink": 0.45}
        messages = [{"role": "user", "content": QUESTIONS[3]}]
        (choice,) = chat(server, messages, custom_params={"step": {**step, "prune_at": 0.3}})
        info = choice["meta_info"]["step"]
        vote = info["vote"]
        if is_chosen(name, SHARE):
            assert vote["finished"] == N and info["sampled"] is True
            until(lambda name=name: len(rows(folder, name)) == N)
            assert len(rows(folder, name)) == N
        else:
            assert vote["finished"] < N and not rows(folder, name)


def test_groups_that_nobody_named_are_chosen_by_their_ids(server: Server, folder: Path) -> None:
    fates: set[bool] = set()
    for _ in range(40):
        step = generate(server, n=4)[0]["meta_info"]["step"]
        assert step.get("sampled", False) == is_chosen(step["group"], SHARE)
        fates.add(step.get("sampled", False))
        if len(fates) == 2:
            break
    assert fates == {True, False}


def test_who_is_not_kept(server: Server, folder: Path) -> None:
    out = generate(server, n=4, group=(declined := next(CHOSEN)), sample=False)
    few = generate(server, group=(small := next(CHOSEN)), n=3)
    judged = generate(server, group=(other := next(CHOSEN)), baseline={"name": "random"})
    for answers in (out, few, judged):
        assert not any("sampled" in answer["meta_info"]["step"] for answer in answers)
    assert any(answer["meta_info"]["step"]["pruned"] for answer in judged)
    marker = next(CHOSEN)
    generate(server, n=4, group=marker)
    until(lambda: rows(folder, marker))
    assert not any(rows(folder, name) for name in (declined, small, other))
    text = "custom_params.step.sample must be true or false"
    params = {"n": 4, "custom_params": {"step": {"sample": "no"}}}
    answer = server.post("/generate", {"text": "x", "sampling_params": params})
    assert answer.status_code == 400 and text in answer.text


def test_a_group_whose_client_leaves_is_forgotten(server: Server, folder: Path) -> None:
    name = next(CHOSEN)
    params = {"n": N, "temperature": 1.0, "max_new_tokens": 300, "ignore_eos": True}
    params["custom_params"] = {"step": {"group": name}}
    body = {"text": prompt_text(QUESTIONS[0]), "sampling_params": params, "stream": True}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as answer:
        next(answer.iter_lines())
    until(lambda: step_state(server)["live_traces"] == 0)
    marker = next(CHOSEN)
    generate(server, n=4, group=marker)
    until(lambda: rows(folder, marker))
    assert not rows(folder, name)
    begun = counted(server, "step_groups_sampled_total", 'fate="begun"')
    assert begun > counted(server, "step_groups_sampled_total", 'fate="stored"') > 0


@pytest.mark.full
def test_a_scorer_is_trained_on_what_was_kept(server: Server, folder: Path, tmp_path: Path) -> None:
    for question in [q.question for q in questions("scorer-train", 16, seed=6)]:
        generate(server, question, 8, group=next(CHOSEN))
    store = tmp_path / "store"
    log = tmp_path / "capture.log"
    with serve(model_path(), "--enable-step", "--step-capture", log=log) as capturing:
        process = start(
            *("collect", folder, "--from-traces", "--labels", "vote", "--agreement", "0.3"),
            *("--url", capturing.url, "-o", store, "-n", 8, "--dtype", "float32"),
            *("--model", "reasoner"),
        )
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    reader = Reader(store)
    by_question: dict[str, list[dict[str, Any]]] = {}
    for file in folder.glob("*.jsonl"):
        for line in file.read_text().strip().split("\n"):
            row = json.loads(line)
            traces = [row | trace for trace in row.pop("traces")]
            by_question.setdefault(row["question"], []).extend(traces)
    assert len(reader.shards) >= 5
    for shard in reader.stream():
        known = by_question[shard.traces[0].question]
        assert max(row["agreement"] for row in known) >= 0.3
        for trace in shard.traces:
            assert trace.correct in {row["agrees"] for row in known}
            assert trace.answer in {row["voted"] for row in known}
    for seed in range(10):  # a split with both kinds on each side
        process = start(
            *("train", store, "-o", tmp_path / "scorer", "--epochs", 2, "--threads", 1),
            *("--validation", 0.3, "--test", 0.3, "--seed", seed),
        )
        out, err = process.communicate(timeout=300)
        if "needs both kinds" not in " ".join(err.split()):
            break
    assert process.returncode == 0, err
    assert "wrote" in out and "against the traces' own vote" in " ".join(err.split())
    assert (tmp_path / "scorer" / "scorer.safetensors").exists()


def test_a_folder_that_cannot_be_written_costs_groups_and_nothing_else(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    """Last: the files are in another place afterwards."""
    shutil.move(folder, tmp_path / "elsewhere")
    folder.write_text("not a folder")
    for lost in (1, 2):
        answers = generate(server, n=4, group=next(CHOSEN))
        assert len(answers) == 4
        until(lambda lost=lost: counted(server, "step_failures_total", '"sampling"') == lost)
    assert server.log_text().count("STEP cannot keep a group in --step-sample") == 1
    # SGLang's own start may log one, where the port opens late.
    assert "Traceback" not in server.log_text().partition("ready to roll")[2]
    folder.unlink()
    folder.mkdir()
    name = next(CHOSEN)
    generate(server, n=4, group=name)
    until(lambda: len(rows(folder, name)) == 4)
    assert counted(server, "step_groups_sampled_total", 'fate="lost"') == 2
    assert step_state(server)["failures"] == {}
