"""The children that compare answers: limits, budgets, fairness, and that none outlives its use."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest

from step_sglang.voting.classes import FormQuestion, PairQuestion
from step_sglang.voting.pool import Account, PendingQuestion, Settled
from step_sglang.voting.tally import Ballot, Tally, tallying
from step_sglang.voting.verifier import AnswerVerifier, Comparison

ENDLESS = [f"{n}^{{9^{{9^9}}}}" for n in range(12, 60)]
# Each sum is an exact integer of more memory than a child may have.
BOMB = "\\frac{(10^{9^{9}}+1)!}{7}"


@pytest.fixture
def verifier() -> Iterator[AnswerVerifier]:
    found = AnswerVerifier(time_limit=1.0, budget=2.5, children=2, spare=True)
    yield found
    found.close()


def vote(comparison: Comparison, *answers: str) -> list[Tally]:
    return comparison.run(tallying([Ballot(answer, 1.0) for answer in answers]))


_of_others: set[int] = set()


@pytest.fixture(autouse=True)
def count_only_new_children() -> None:
    """Earlier tests of this process may have left a verifier with its children."""
    _of_others.clear()
    _of_others.update(child.pid for child in children())


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        try:
            if child.pid not in _of_others and "step_sglang.voting.verifier" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_beyond_the_budget_answers_compare_as_text(verifier: AnswerVerifier) -> None:
    comparison = verifier.comparison()
    found = vote(comparison, *ENDLESS, "\\frac12", "\\frac{2}{4}", "7", "7.0", ENDLESS[0])
    # The budget ends after three of them, and the last one's limit is what was left of it.
    assert verifier.counts["forms"] == 3 and 2.4 < comparison.spent < 3.0
    assert [t.count for t in found] == [2, 2] + [1] * (len(ENDLESS) + 1)
    assert vote(verifier.comparison(), "\\frac12", "\\frac{2}{4}")[0].count == 2


def test_a_limit_is_the_same_after_a_kill_and_a_spare_is_ready(verifier: AnswerVerifier) -> None:
    assert verifier.same("1/2", "\\frac{2}{4}")
    wait_for(lambda: len(children()) >= 2)
    for number in range(2):
        before = verifier.comparison()
        assert before.ask(FormQuestion(ENDLESS[number])) is None
        assert 0.9 < before.spent < 1.1  # not what the start of a child may take
    wait_for(lambda: verifier.counts["kills"] == 2)
    # One that was ready takes over, and the next one starts meanwhile.
    assert verifier.same("x+1", "1+x")
    wait_for(lambda: verifier.counts["starts"] >= 4)


def test_what_took_too_long_is_not_tried_again(verifier: AnswerVerifier) -> None:
    vote(verifier.comparison(), ENDLESS[0])
    again = verifier.comparison()
    vote(again, ENDLESS[0])
    assert again.spent == 0 and verifier.counts["forms"] == 1


def test_a_memory_bomb_hits_its_limit(verifier: AnswerVerifier) -> None:
    peak = 0
    asked = threading.Thread(target=vote, args=(verifier.comparison(), BOMB, "10^{10^{8}}+x"))
    asked.start()
    while asked.is_alive():
        for child in children():
            try:
                peak = max(peak, child.memory_info().vms)
            except psutil.Error:
                continue
        time.sleep(0.02)
    assert 0 < peak <= 520 << 20
    assert verifier.same("x+1", "1+x")


def test_a_stop_ends_the_work_at_once(verifier: AnswerVerifier) -> None:
    patient = AnswerVerifier(time_limit=500.0, budget=1000.0)
    try:
        comparison = patient.comparison()
        found: list[list[Tally]] = []
        work = threading.Thread(target=lambda: found.append(vote(comparison, *ENDLESS[:3])))
        work.start()
        wait_for(lambda: any(child.cpu_times().user > 2 for child in children()))
        (child,) = children()
        comparison.stop()
        work.join(10)
        assert [t.count for t in found[0]] == [1, 1, 1]
        child.wait(10)
    finally:
        patient.close()


def test_a_cancelled_task_ends_its_child_and_keeps_the_loop_free() -> None:
    patient = AnswerVerifier(time_limit=500.0, budget=1000.0)

    async def leave() -> float:
        work = asyncio.ensure_future(patient.comparison().arun(tallying([Ballot(ENDLESS[0], 1.0)])))
        longest, last = 0.0, time.monotonic()
        while not any(child.cpu_times().user > 2 for child in children()):
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return longest

    try:
        asyncio.run(leave())
        wait_for(lambda: not children(), 10)
        assert patient.same("x+1", "1+x")
    finally:
        patient.close()


def test_attackers_delay_others_by_one_short_limit_each(verifier: AnswerVerifier) -> None:
    slow = AnswerVerifier(time_limit=5.0, budget=30.0, children=2, spare=True)
    try:
        attackers = [slow.comparison() for _ in range(3)]
        threads = [
            threading.Thread(target=vote, args=(attacker, *ENDLESS[i * 9 : i * 9 + 9]), daemon=True)
            for i, attacker in enumerate(attackers)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: all(attacker.spent >= 1 for attacker in attackers), 120)
        spent = sum(attacker.spent for attacker in attackers)
        found = vote(slow.comparison(), "\\frac12", "\\frac{2}{4}", "x+1", "1+x", "\\sqrt{8}")
        assert [t.count for t in found] == [2, 2, 1]
        # Two children at work: what ran already, and no more than that.
        assert sum(attacker.spent for attacker in attackers) - spent <= 2 * 5 + 1
        assert any(thread.is_alive() for thread in threads)
        for attacker in attackers:
            attacker.stop()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    finally:
        slow.close()


def test_a_reply_after_a_stop_is_neither_given_nor_kept() -> None:
    asked = PendingQuestion(PairQuestion("x+1", "1+x"), Account(1.0))
    asked.settle(None)
    asked.settle(True, final=True)
    assert asked.future.result() == Settled(None, final=False)


def test_whoever_waits_when_it_is_closed_waits_no_longer() -> None:
    patient = AnswerVerifier(time_limit=500.0, budget=1000.0)
    found: list[list[Tally]] = []
    works = [
        threading.Thread(
            target=lambda one=one: found.append(vote(patient.comparison(), one)), daemon=True
        )
        for one in ENDLESS[:2]
    ]
    for work in works:
        work.start()
    wait_for(lambda: any(child.cpu_times().user > 2 for child in children()))
    patient.close()
    for work in works:
        work.join(10)
    assert [len(tallies) for tallies in found] == [1, 1]


def test_it_works_in_a_process_with_thousands_of_open_files(verifier: AnswerVerifier) -> None:
    """As a server with many clients has them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    with ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        last = 0
        while last < 1100:
            last = files.enter_context(open(os.devnull)).fileno()
        found: list[bool] = []
        work = threading.Thread(
            target=lambda: found.append(verifier.same("x+1", "1+x")), daemon=True
        )
        work.start()
        work.join(60)
        assert found == [True]


def test_a_closed_one_answers_by_text_and_has_no_child(verifier: AnswerVerifier) -> None:
    assert verifier.same("x+1", "1+x")
    verifier.close()
    assert verifier.comparison().ask(PairQuestion("y+1", "1+y")) is None
    wait_for(lambda: not children(), 10)


PARENT = """
import threading, time
from step_sglang.voting.classes import FormQuestion
from step_sglang.voting.verifier import AnswerVerifier
verifier = AnswerVerifier(time_limit=500.0, budget=1000.0, spare=True)
endless = (FormQuestion("12^{9^{9^9}}"),)
threading.Thread(target=verifier.comparison().ask, args=endless, daemon=True).start()
time.sleep(%s)
"""


def test_children_die_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT % 600])
    try:
        whole = psutil.Process(parent.pid)
        wait_for(lambda: any(c.cpu_times().user > 2 for c in whole.children()))
        left = whole.children()
        assert left
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    for child in alive:
        child.kill()
    assert not alive


def test_a_program_ends_while_its_answers_are_compared() -> None:
    started = subprocess.run([sys.executable, "-c", PARENT % 8], timeout=100, check=False)
    assert started.returncode == 0


def test_a_child_whose_parent_is_gone_ends() -> None:
    command = [sys.executable, "-m", "step_sglang.voting.verifier", "1"]
    done = subprocess.run(command, timeout=60, check=False, stdin=subprocess.PIPE)
    assert done.returncode == 0


def test_imports_are_light() -> None:
    """Flags are registered in every process, `--help` included; the child starts often."""
    for module, unwanted in (
        ("step_sglang.config", ("math_verify", "sympy", "torch")),
        ("step_sglang.voting.session", ("math_verify", "sympy", "torch")),
        ("step_sglang.voting.verifier", ("math_verify", "sympy", "torch", "sglang")),
    ):
        code = f"import sys, {module}; print([m for m in {unwanted} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        )
        assert done.stdout.strip() == "[]", (module, done.stdout)


def test_registering_the_flags_imports_no_parser() -> None:
    code = (
        "import argparse, sys; from step_sglang.patches import flags;"
        "flags.add_cli_args(None, argparse.ArgumentParser()); print('math_verify' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True,
        timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "False"
