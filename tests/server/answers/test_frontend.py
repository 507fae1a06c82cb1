"""Programs of SGLang's frontend: forks are one group, gens continue a trace, errors stay apart."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.global_config import global_config

from step_sglang.client.frontend import endpoint, vote
from step_sglang.reasoner import Question
from tests.server.answers.conftest import wait_until_empty
from tests.server.launch import Server

pytestmark = pytest.mark.server

SAMPLING = {"temperature": 1.0, "max_tokens": 900}


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """SGLang's states join their threads when they are deleted, and thereby can lock up.

    A collection while a thread begins or ends finds the lock taken that `Thread.is_alive` wants.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _special_tokens() -> Iterator[None]:
    before = global_config.skip_special_tokens_in_output
    global_config.skip_special_tokens_in_output = False
    yield
    global_config.skip_special_tokens_in_output = before


def prompt(server: Server, question: Question) -> str:
    """The reasoner's own chat form, as plain text."""
    chat = {"messages": [{"role": "user", "content": question.question}]}
    tokens = server.post("/v1/tokenize", {**chat, "add_special_tokens": True}).json()["tokens"]
    text = server.post("/v1/detokenize", {"tokens": tokens, "skip_special_tokens": False}).json()
    return str(text["text"])


def steps(forks: Any, name: str) -> list[dict[str, Any]]:
    return [state.get_meta_info(name)["step"] for state in forks.states]


@sgl.function
def forked(s: Any, text: str, kept: dict[str, Any]) -> None:
    s += text
    forks = s.fork(4)
    forks += sgl.gen("answer", **SAMPLING)
    forks.join()
    kept["forks"], kept["vote"] = forks, vote(forks, "answer")


def test_forks_are_one_group_and_vote(server: Server, question: Question) -> None:
    backend = endpoint(server.url)
    groups = []
    for _ in range(2):
        kept: dict[str, Any] = {}
        state = forked.run(text=prompt(server, question), kept=kept, backend=backend)
        assert len(state["answer"]) == 4
        found = steps(kept["forks"], "answer")
        assert len({step["group"] for step in found}) == 1
        assert all(step["num_steps"] > 0 for step in found)
        winner = kept["vote"]
        assert winner.answer is not None and 0 < winner.share <= 1 and winner.errors == {}
        assert sum(t.count for t in winner.answers) == 4
        assert winner.fork in winner.answers[0].members
        groups.append(found[0]["group"])
    assert groups[0] != groups[1]
    wait_until_empty(server)


@sgl.function
def continued(s: Any, text: str, kept: dict[str, Any]) -> None:
    s += text
    forks = s.fork(3)
    forks += sgl.gen("first", temperature=1.0, max_tokens=60)
    for fork in forks.states:
        fork.sync()
    forks += sgl.gen("answer", **SAMPLING)
    forks.join()
    kept["forks"] = forks
    s += sgl.gen("after", temperature=1.0, max_tokens=4)
    kept["after"] = s.get_meta_info("after")


def test_several_gens_of_a_fork_continue_its_score(server: Server, question: Question) -> None:
    kept: dict[str, Any] = {}
    text = prompt(server, question)
    continued.run(text=text, kept=kept, backend=endpoint(server.url))
    first, last = steps(kept["forks"], "first"), steps(kept["forks"], "answer")
    for fork, before, after in zip(kept["forks"].states, first, last, strict=True):
        assert before["num_steps"] > 0 and after["group"] == before["group"]
        assert after["num_steps"] > before["num_steps"]
        # The same text read in one piece says the same.
        thoughts = (fork["first"] + fork["answer"]).split("</think>")[0]
        boundaries = thoughts.count("\n\n")
        assert boundaries - 1 <= after["num_steps"] <= boundaries
    # A gen of the program itself is no trace.
    assert "step" not in kept["after"]


@sgl.function
def nested(s: Any, text: str, kept: dict[str, Any]) -> None:
    s += text
    outer = s.fork(2)
    outer += sgl.gen("first", temperature=1.0, max_tokens=90)
    kept["inner"] = []
    for fork in outer.states:
        inner = fork.fork(2)
        inner += sgl.gen("second", temperature=1.0, max_tokens=40)
        inner.join()
        kept["inner"].append(inner)
    outer += sgl.gen("third", temperature=1.0, max_tokens=40)
    outer.join()
    kept["outer"] = outer


def test_nested_forks_are_groups_of_their_own(server: Server, question: Question) -> None:
    kept: dict[str, Any] = {}
    nested.run(text=prompt(server, question), kept=kept, backend=endpoint(server.url))
    groups = [{step["group"] for step in steps(inner, "second")} for inner in kept["inner"]]
    outer = {step["group"] for name in ("first", "third") for step in steps(kept["outer"], name)}
    assert [len(group) for group in (*groups, outer)] == [1, 1, 1]
    assert len(groups[0] | groups[1] | outer) == 3
    for before, after in zip(
        steps(kept["outer"], "first"), steps(kept["outer"], "third"), strict=True
    ):
        assert after["num_steps"] >= before["num_steps"] > 0


@sgl.function
def from_nothing(s: Any, texts: list[str], kept: dict[str, Any]) -> None:
    forks = s.fork(len(texts))
    forks += texts
    forks += sgl.gen("answer", temperature=1.0, max_tokens=20)
    forks += sgl.gen("more", temperature=1.0, max_tokens=20)
    forks.join()
    kept["forks"] = forks


def test_forks_of_an_empty_text_are_one_group(server: Server, question: Question) -> None:
    kept: dict[str, Any] = {}
    text = prompt(server, question)
    from_nothing.run(texts=[text, text], kept=kept, backend=endpoint(server.url))
    names = {s["group"] for name in ("answer", "more") for s in steps(kept["forks"], name)}
    assert len(names) == 1


@sgl.function
def failing(s: Any, text: str, kept: dict[str, Any]) -> None:
    s += text
    forks = s.fork(3)
    forks += [sgl.gen("first", temperature=t, max_tokens=30) for t in (1.0, -1.0, 1.0)]
    forks += [" and on "] * 3
    forks += sgl.gen("answer", **SAMPLING)
    forks.join()
    kept["vote"] = vote(forks, "answer", extract=lambda text: "same")
    kept["errors"] = [fork.error() for fork in forks.states]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_one_fork_does_not_lose_the_others(
    server: Server, question: Question, stream: bool
) -> None:
    kept: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = failing.run(
            text=prompt(server, question), kept=kept, backend=endpoint(server.url), stream=stream
        )
        state.sync()
        if stream:
            list(state.text_iter())
            deadline = time.monotonic() + 60
            while "errors" not in kept and time.monotonic() < deadline:
                time.sleep(0.05)
    assert kept["vote"].answer == "same" and kept["vote"].answers[0].members == (0, 2)
    # SGLang's own streaming drops the server's words.
    assert ("KeyError" if stream else "temperature") in kept["vote"].errors[1]
    assert [error is None for error in kept["errors"]] == [True, False, True]
    assert any("a fork failed" in str(warning.message) for warning in caught)


def test_a_pruned_fork_ends_by_itself(server: Server, question: Question) -> None:
    @sgl.function
    def crowded(s: Any, text: str, kept: dict[str, Any]) -> None:
        s += text
        forks = s.fork(24)
        forks += sgl.gen("first", temperature=1.0, max_tokens=500, ignore_eos=True)
        forks += sgl.gen("answer", temperature=1.0, max_tokens=20)
        forks.join()
        kept["forks"], kept["vote"] = forks, vote(forks, "answer", extract=lambda text: "same")

    kept: dict[str, Any] = {}
    crowded.run(text=prompt(server, question), kept=kept, backend=endpoint(server.url))
    infos = steps(kept["forks"], "first")
    pruned = [index for index, step in enumerate(infos) if step["pruned"]]
    assert pruned
    for index in pruned:
        fork = kept["forks"][index]
        assert fork["first"] and fork["answer"] == ""
        assert "pruned by STEP" in kept["vote"].errors[index]
    assert set(kept["vote"].answers[0].members).isdisjoint(pruned)
    wait_until_empty(server)


def test_plain_programs_on_a_stock_backend_keep_working(server: Server, question: Question) -> None:
    kept: dict[str, Any] = {}
    state = forked.run(
        text=prompt(server, question), kept=kept, backend=RuntimeEndpoint(server.url)
    )
    assert len(state["answer"]) == 4
    assert "step" not in kept["forks"][0].get_meta_info("answer")
    assert kept["vote"].answer is not None and sum(t.count for t in kept["vote"].answers) == 4


@sgl.function
def example(s: Any, question: str) -> None:
    s += sgl.user(question)
    forks = s.fork(4)
    forks += sgl.assistant(
        sgl.gen("plan", temperature=1.0, max_tokens=16) + sgl.gen("answer", **SAMPLING)
    )
    s["winner"] = vote(forks, "answer", extract=lambda text: "same").answer


def test_the_example_of_the_readme(server: Server, question: Question) -> None:
    backend = endpoint(server.url)
    state = example.run(question=question.question, backend=backend)
    assert state["winner"] == "same"
    batch = [{"question": question.question}, {"question": "1;A+1"}]
    assert [s["winner"] for s in example.run_batch(batch, backend=backend)] == ["same", "same"]
