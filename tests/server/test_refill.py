"""Branches of good traces in the places of pruned ones, on the real server and model."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import requests

from step_sglang.client.abort import abort_group
from step_sglang.reasoner import model_path, questions, scorer_path
from step_sglang.reasoner.tokenizer import build_tokenizer, prompt_text
from tests.server.expected import assert_scores
from tests.server.idle import idle_free_tokens, step_state
from tests.server.launch import Server, one_core_each, serve
from tests.server.pruned import LOG_REQUESTS, together

pytestmark = pytest.mark.server

N, LIMIT, POOL = 16, 900, 704  # a quarter of what sixteen traces want, whole pages of 16
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "page16": (("--page-size", "16"), {}),
    "no-overlap-page16": (("--page-size", "16", "--disable-overlap-schedule"), {}),
    "no-radix-chunked": (("--disable-radix-cache", "--chunked-prefill-size", "64"), {}),
    "no-overlap-no-radix-queue": (
        ("--disable-radix-cache", "--disable-overlap-schedule", "--step-admit", "queue"),
        {},
    ),
    "mixed-chunk-retract": (
        ("--enable-mixed-chunk", "--chunked-prefill-size", "32"),
        {"SGLANG_TEST_RETRACT": "1"},
    ),
    "watermark": (("--step-prune-at", "0.8"), {}),
}
QUESTIONS = questions("scorer-validation", 12, seed=5)
PROMPTS = [
    build_tokenizer().encode(prompt_text(q.question), add_special_tokens=False) for q in QUESTIONS
]


@pytest.fixture(
    scope="module",
    params=["shared", *(pytest.param(c, marks=pytest.mark.full) for c in CONFIGURATIONS)],
)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if request.param == "shared":
        yield request.getfixturevalue("reasoner")
        return
    flags, env = CONFIGURATIONS[request.param]
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--enable-metrics"),
        *("--max-total-tokens", str(POOL), *flags, *LOG_REQUESTS),
        log=tmp_path_factory.mktemp("log") / f"{request.param}.log",
        **env,
    ) as running:
        yield running


def body(number: int, n: int = N, **step: Any) -> dict[str, Any]:
    return {
        "input_ids": PROMPTS[number],
        "sampling_params": {
            "n": n,
            "temperature": 1.0,
            "max_new_tokens": LIMIT,
            "skip_special_tokens": False,
            "custom_params": {"step": {"refill": "best", "step_scores": True, **step}},
        },
    }


def branches_of(answers: list[dict]) -> list[dict]:
    return [a for a in answers if "branch" in a["meta_info"]["step"]]


def name_of(answer: dict) -> str:
    branch = answer["meta_info"]["step"].get("branch")
    return str(branch["name"] if branch else answer["meta_info"]["id"])


def check(answers: list[dict], number: int) -> int:
    """Check a group's answers; returns how many branches are among them."""
    assert len(answers) == N == len({a["meta_info"]["id"] for a in answers})
    by_name = {name_of(a): a for a in answers}
    for answer in answers:
        info, output = answer["meta_info"], answer["output_ids"]
        step = info["step"]
        assert_scores(model_path(), scorer_path(), PROMPTS[number], answer)
        assert "extra_tokens" not in step
        if step["pruned"]:
            assert info["finish_reason"]["message"].startswith("pruned by STEP")
        branch = step.get("branch")
        if branch is None:
            assert info["completion_tokens"] == len(output)
            continue
        taken = branch["position"] + 1
        # What it was given is not its own work; what the trace before it had generated is, if
        # that had begun.
        assert info["completion_tokens"] >= len(output) - taken
        assert branch["depth"] == len(branch["lineage"]) >= 1
        assert branch["parent"] == branch["lineage"][-1][0].partition("/")[0]
        steps = sum(position < taken for position in step["positions"])
        assert branch["lineage"][-1][1] == steps >= 3
        assert branch["position"] in step["positions"]
        parent = by_name.get(branch["lineage"][-1][0])
        if parent is not None:  # it may have been pruned, and replaced, since
            assert parent["output_ids"][:taken] == output[:taken]
            theirs = parent["meta_info"]["step"]["step_scores"][: steps - 1]
            assert step["step_scores"][: steps - 1] == pytest.approx(theirs, abs=1e-6)
    return len(branches_of(answers))


def ask(server: Server, number: int, **step: Any) -> list[dict]:
    return list(server.generate(**body(number, **step)))


def metric(server: Server, name: str) -> float:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    return sum(float(v) for v in re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.M))


def test_branches_go_on_from_their_parents_text(server: Server) -> None:
    before = idle_free_tokens(server)
    known = metric(server, "step_branches_total")
    branched = sum(check(ask(server, number), number) for number in range(3))
    assert branched >= 3
    assert idle_free_tokens(server) == before
    state = step_state(server)
    assert state["free_places"] == 0 and state["groups"] == 0
    assert not state["failures"], re.findall(r"(?s)STEP failed.{2000}", server.log_text())
    assert metric(server, "step_branches_total") >= known + branched
    assert metric(server, "step_families_alive") == 0
    assert server.log_text().count("STEP branched rid=") >= branched


def test_branches_never_outgrow_the_group(server: Server) -> None:
    """Nothing is pruned for a branch's sake: where nothing else runs there is the stated margin."""
    answers = ask(server, 3)
    check(answers, 3)
    finished = [a for a in answers if not a["meta_info"]["step"]["pruned"]]
    assert finished and all(a["meta_info"]["finish_reason"]["type"] != "abort" for a in finished)


@pytest.mark.parametrize("mode", ["random", "gambit"])
def test_other_rules(server: Server, mode: str) -> None:
    before = idle_free_tokens(server)
    total = 0
    for number in (4, 5):
        answers = ask(server, number, refill=mode)
        if mode == "random":
            check(answers, number)
        total += len(branches_of(answers))
    assert total
    assert idle_free_tokens(server) == before


def test_many_groups_and_an_ordinary_request(server: Server) -> None:
    before = idle_free_tokens(server)
    plain = {
        "input_ids": PROMPTS[0],
        "sampling_params": {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True},
    }
    alone = server.generate(**plain)["output_ids"]
    with ThreadPoolExecutor(8) as threads:
        groups = [threads.submit(server.generate, **body(number)) for number in range(4)]
        others = [threads.submit(server.generate, **plain) for _ in range(3)]
        for number, group in enumerate(groups):
            check(group.result(), number)
        for other in others:
            assert other.result()["output_ids"] == alone
            assert "step" not in other.result()["meta_info"]
    assert idle_free_tokens(server) == before


def test_a_request_without_refill_has_no_branches(server: Server) -> None:
    answers = ask(server, 6, refill=None)
    assert not branches_of(answers)
    assert any(a["meta_info"]["step"]["pruned"] for a in answers)


def test_an_aborted_group_ends_with_all_of_its_places(server: Server) -> None:
    before = idle_free_tokens(server)
    with ThreadPoolExecutor(1) as threads:
        doomed = threads.submit(server.post, "/generate", body(7, group="doomed", ignore=None))
        assert doomed.result().status_code == 400  # an unknown member
        long = body(7, group="doomed")
        long["sampling_params"].update(ignore_eos=True, max_new_tokens=600)
        doomed = threads.submit(server.post, "/generate", long)
        until(lambda: step_state(server)["free_places"] > 0)
        assert abort_group(server.url, "doomed") == N
        started = time.monotonic()
        answer = doomed.result()
    assert time.monotonic() - started < 20
    assert answer.status_code == 200
    kinds = {a["meta_info"]["finish_reason"]["type"] for a in answer.json()}
    assert "abort" in kinds
    assert idle_free_tokens(server) == before
    assert step_state(server)["free_places"] == 0


def test_a_client_that_leaves_takes_its_places_along(server: Server) -> None:
    before = idle_free_tokens(server)
    long = body(8)
    long["sampling_params"].update(ignore_eos=True, max_new_tokens=600)
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"{server.url}/generate", json=long, timeout=(5, 1))
    until(lambda: step_state(server)["live_traces"] == 0)
    until(lambda: step_state(server)["free_places"] == 0)
    assert idle_free_tokens(server) == before


def until(holds: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_voted_choice_streamed_or_not(server: Server) -> None:
    """The traces of a vote branch; its answer and its usage come as ever."""
    known = metric(server, "step_branches_total")
    for stream in (False, True):
        answer = requests.post(
            f"{server.url}/v1/chat/completions",
            json={
                "model": "m",
                "messages": [{"role": "user", "content": QUESTIONS[9].question}],
                "temperature": 1.0,
                "max_tokens": LIMIT,
                "stream": stream,
                "custom_params": {
                    "step": {"traces": N, "refill": "best", "early": "off", "suffix": ""}
                },
            },
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        if not stream:
            choice = answer.json()["choices"]
            assert len(choice) == 1 and "boxed" in choice[0]["message"]["content"]
            assert answer.json()["usage"]["completion_tokens"] > 1000
        else:
            assert answer.text.rstrip().endswith("data: [DONE]") and "boxed" in answer.text
            # The connection lives before a trace has finished, whose text is not sent until then.
            comments = [line for line in answer.text.splitlines() if line.startswith(": step ")]
            assert " 0 finished" in comments[0]
    assert metric(server, "step_branches_total") > known


def test_a_named_group_of_single_requests(server: Server) -> None:
    before = idle_free_tokens(server)
    branches = 0
    for number in (10, 11, 8):  # now and then none can end soon enough
        one = body(number, n=1, group=f"together-{number}")
        with ThreadPoolExecutor(N) as threads:
            answers = together(server, threads, [partial(server.generate, **one)] * N)
        branches += check([answer.result() for answer in answers], number)
        if branches:
            break
    assert branches
    assert idle_free_tokens(server) == before


@pytest.mark.parametrize(
    ("more", "step", "message"),
    [
        ({"stream": True}, {}, "do not stream it"),
        ({"return_logprob": True}, {}, "log-probabilities"),
        ({}, {"baseline": {"name": "random"}}, "leave baseline out"),
        ({}, {"min_survivors": N}, "give a min_survivors below n"),
        ({}, {"refill": "some"}, "must be one of off, best, random, gambit"),
        ({"n": 1}, {}, "ask for several samples"),
        ({"regex": "[0-9]+"}, {}, "a grammar does not go back"),
        ({"beam_width": 2}, {}, "beam search"),
    ],
)
def test_what_cannot_have_branches_is_refused(
    server: Server, more: dict, step: dict, message: str
) -> None:
    wrong = body(0, **step)
    for name, value in more.items():
        inside = name in ("n", "regex", "beam_width")
        (wrong["sampling_params"] if inside else wrong)[name] = value
    answer = server.post("/generate", wrong)
    # SGLang answers a refused stream with an event.
    refused = answer.status_code == 400 or ("stream" in more and '"code":400' in answer.text)
    assert refused and message in answer.text, answer.text
    assert server.process.poll() is None


@pytest.mark.full
def test_two_ranks_branch_alike(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--max-total-tokens", str(POOL)),
        *("--tp-size", "2", "--step-refill", "best"),
        log=tmp_path_factory.mktemp("log") / "tp.log",
        SGLANG_CPU_OMP_THREADS_BIND=one_core_each(),
    ) as server:
        before = idle_free_tokens(server)
        for number in range(3):
            # The server's setting, and no word of it in the request.
            check(ask(server, number, refill=None), number)
        text = server.log_text()
        seen = [
            re.findall(
                rf"TP{rank}\] STEP branched rid=('\w+') .*parent=('\w+') position=(\d+)", text
            )
            for rank in (0, 1)
        ]
        assert len(seen[0]) >= 3 and seen[0] == seen[1]
        assert idle_free_tokens(server) == before
