"""Groups that are kept for training: which, what of them, where, and how they are read."""

from __future__ import annotations

import json
import resource
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from step_sglang.config import StepConfig
from step_sglang.data.questions import Fields, load_traces, question_id
from step_sglang.errors import ConfigError, RequestError, SourceError
from step_sglang.gathering.choice import is_chosen
from step_sglang.gathering.folder import ABOUT, Folder, prepare
from step_sglang.gathering.record import GroupInProgress, KeptTrace, line, voting
from step_sglang.gathering.writer import LOST, MAX_WAITING, STORED, UNVOTED, Writer
from step_sglang.pruning.groups import GroupRegistry
from step_sglang.pruning.request import parse_request, spared
from step_sglang.reasoner import model_path
from step_sglang.training.errors import TrainError
from step_sglang.training.prompts import load_prompter
from step_sglang.training.setup import CollectOptions, plan_collection
from step_sglang.training.voted import Labels
from step_sglang.voting.answers import extract_boxed
from step_sglang.voting.classes import run_here
from step_sglang.voting.request import parse_vote
from step_sglang.voting.session import TraceFate, VoteRules, VoteSession


def kept(answers: list[str | None], group: str = "g", question: str = "what?") -> GroupInProgress:
    """A complete group whose traces gave these answers; None: it was cut off."""
    found = GroupInProgress(group, len(answers), array("i", [1, 2]), extract_boxed)
    for i, answer in enumerate(answers):
        text = "so \\boxed{7" if answer is None else f"so \\boxed{{{answer}}}"
        finish = "length" if answer is None else "stop"
        whole = found.add(KeptTrace(f"{i:02}", text, array("i", [5, i]), finish, 0.5))
        assert whole == (i == len(answers) - 1)
    found.question = question
    return found


def written(group: GroupInProgress) -> bytes:
    vote = run_here(voting(group))
    assert vote is not None
    return b"".join(line(group, vote))


def test_a_share_of_the_groups_is_chosen_by_their_ids_alone() -> None:
    ids = [f"group {i}" for i in range(20_000)]
    small = {name for name in ids if is_chosen(name, 0.05)}
    large = {name for name in ids if is_chosen(name, 0.3)}
    assert 0.045 < len(small) / len(ids) < 0.055 and 0.29 < len(large) / len(ids) < 0.31
    assert small < large
    assert all(is_chosen(name, 1.0) for name in ids)
    assert is_chosen("group 20", 0.05) == ("group 20" in small)


def test_the_majority_labels_and_who_was_cut_off_disagrees() -> None:
    group = kept(["1/2", "3", "\\frac{1}{2}", "0.5", None, "3"])
    vote = run_here(voting(group))
    assert vote is not None and vote.winner == "1/2" and vote.agreement == 0.5
    assert vote.agrees == (True, False, True, True, False, False)
    row = json.loads(b"".join(line(group, vote)))
    traces = row["traces"]
    assert [trace["agrees"] for trace in traces] == list(vote.agrees)
    assert traces[4]["extracted"] is None and traces[4]["finish"] == "length"
    assert row["prompt"] == [1, 2] and traces[3]["tokens"] == [5, 3]
    assert row["voted"] == "1/2" and row["agreement"] == 0.5
    assert run_here(voting(kept([None, None]))) is None


def test_the_order_of_traces_does_not_tell_who_ended_first() -> None:
    group = GroupInProgress("g", 2, array("i", [1]), extract_boxed)
    for rid in ("b", "a"):
        group.add(KeptTrace(rid, f"\\boxed{{{rid}}}", array("i", [1]), "stop", None))
    assert [trace["text"][-2] for trace in json.loads(written(group))["traces"]] == ["a", "b"]


def test_a_group_is_one_line_whose_least_size_is_known_before(tmp_path: Path) -> None:
    group = kept(["7", "7", "8", None])
    group.prompt = array("i", [123456] * 10_000)
    size = len(written(group))
    assert group.least_bytes < size < 3 * group.least_bytes  # the prompt is written once
    assert written(group).count(b"\n") == 1

    def unwanted(_: str) -> str | None:
        raise AssertionError("it can never fit: there is no need to read its answers")

    told = Told()
    group.extract, group.prompt = unwanted, array("i", [1] * 400_000)
    writer = told.writer(tmp_path)
    writer.put(group)
    writer.close()
    assert told.fates == [LOST] and not told.errors and not list(tmp_path.iterdir())


def test_a_full_folder_makes_room_for_the_latest(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 8000)
    for i in range(100):
        assert folder.add(f"{i:099}\n".encode())
    found = sorted(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in found) <= 8000 and len(found) > 4
    rows = [int(line) for file in found for line in file.read_text().splitlines()]
    assert rows == list(range(100))[-len(rows) :] and len(rows) >= 60
    assert not folder.add(b"x" * 8001)  # would never fit
    folder.close()
    assert all(file.stat().st_mode & 0o077 == 0 for file in found)


def test_a_file_that_another_process_writes_is_spared(tmp_path: Path) -> None:
    other = Folder(tmp_path, 1000)
    assert other.add(b"x" * 99 + b"\n")
    (theirs,) = tmp_path.iterdir()
    mine = Folder(tmp_path, 1000)
    for _ in range(30):
        assert mine.add(b"y" * 99 + b"\n")
    assert theirs.exists() and other.add(b"z\n")
    assert not mine.add(b"y" * 950)  # the other's still counts
    other.close()
    assert mine.add(b"y" * 950) and not theirs.exists()


def test_files_may_be_removed_by_whoever_has_read_them(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 1_000_000)
    folder.add(b"first\n")
    for file in tmp_path.iterdir():
        file.unlink()
    folder.add(b"second\n")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"second\n"]


@pytest.mark.parametrize("processes", [9, 12, 16])
def test_many_processes_share_a_folder_though_none_of_their_files_is_full(
    tmp_path: Path, processes: int
) -> None:
    folders = [Folder(tmp_path, 100_000) for _ in range(processes)]
    for _ in range(40):
        assert all([folder.add(b"x" * 999 + b"\n") for folder in folders])
    held = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 50_000 < held <= 100_000
    for folder in folders:
        folder.close()


def test_a_disk_that_is_full_gets_no_empty_files(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 100_000)
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        for _ in range(5):
            with pytest.raises(OSError, match="File too large"):
                folder.add(b"x" * 100 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert not list(tmp_path.iterdir())
    assert folder.add(b"first\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            folder.add(b"x" * 100 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"first\n"]


def test_the_folder_at_start_up(tmp_path: Path) -> None:
    prepare(tmp_path / "new" / "folder", "m")
    prepare(tmp_path / "new" / "folder", "m")
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="holds groups of m, and this server serves other"):
        prepare(tmp_path / "new" / "folder", "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--step-sample .*file: cannot write there"):
        prepare(tmp_path / "file", "m")


class Told:
    """What a writer said."""

    def __init__(self) -> None:
        self.fates: list[str] = []
        self.errors: list[Exception] = []

    def writer(self, folder: Path) -> Writer:
        return Writer(folder, 1, self.fates.append, self.errors.append)

    def wait(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.fates) < number:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_writer_votes_and_writes(tmp_path: Path) -> None:
    told = Told()
    writer = told.writer(tmp_path)
    writer.put(kept(["7", "7", "8", "7"]))
    writer.put(kept([None] * 4))
    writer.close()
    assert told.fates == [STORED, UNVOTED] and not told.errors
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())["traces"]) == 4


def test_a_folder_that_goes_away_costs_groups_and_nothing_else(tmp_path: Path) -> None:
    told, folder = Told(), tmp_path / "folder"
    folder.mkdir()
    writer = told.writer(folder)
    writer.put(kept(["7"] * 4))
    told.wait(1)
    (file,) = folder.iterdir()
    file.unlink()
    folder.rmdir()
    folder.write_text("in its place")
    writer.put(kept(["7"] * 4))
    told.wait(2)
    assert isinstance(told.errors[0], OSError)
    folder.unlink()
    folder.mkdir()
    writer.put(kept(["7"] * 4))
    writer.close()
    assert told.fates == [STORED, LOST, STORED] and len(told.errors) == 1


def test_nobody_waits_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    add: Callable[[Folder, bytes], bool] = Folder.add

    def wait(folder: Folder, data: bytes) -> bool:
        slow.wait(60)
        return add(folder, data)

    monkeypatch.setattr(Folder, "add", wait)
    told = Told()
    writer = told.writer(tmp_path)
    began = time.monotonic()
    for _ in range(MAX_WAITING + 5):
        writer.put(kept(["7"] * 4))
    assert time.monotonic() - began < 5
    lost = told.fates.count(LOST)
    assert lost in (4, 5)  # one may be in the thread's hands
    slow.set()
    writer.close()
    assert told.fates.count(STORED) == MAX_WAITING + 5 - lost


def test_a_request_opts_out() -> None:
    asked = parse_request({"step": {"sample": False}})
    assert asked is not None and not asked.sample
    assert parse_request({"step": {}}).sample  # type: ignore[union-attr]
    with pytest.raises(RequestError, match=r"custom_params\.step\.sample must be true or false"):
        parse_request({"step": {"sample": "no"}})
    # It is an ordinary request all the same, where the server votes on all of them.
    config = StepConfig("s", traces=4)
    assert parse_vote({"custom_params": {"step": {"sample": False}}}, config) is not None


def test_a_chosen_group_loses_no_trace() -> None:
    step = {"group": "g", "prune_at": 0.2, "refill": "best", "min_survivors": 2, "weight": 3}
    params = {"other": 1, "step": step}
    changed = spared(params)
    least = changed["step"].pop("min_survivors")
    assert changed == {"other": 1, "step": {"group": "g", "refill": "off", "weight": 3}}
    assert params["step"] is step and step["min_survivors"] == 2
    assert parse_request(spared(params)) is not None
    # Neither where other requests name the same group.
    registry = GroupRegistry()
    for number in (8, 8, 1):
        for _ in range(number):
            trace = registry.join("g", min_survivors=least if number > 1 else 1, samples=number)
    assert trace.group.survivors == 17 and not trace.group.prunable


def chunk(index: int, *, ended: bool, sampled: bool) -> dict[str, Any]:
    step = {"score": 0.9, "num_steps": 3, "pruned": False}
    if sampled:
        step["sampled"] = True
    info = {"id": str(index), "completion_tokens": 1, "step": step}
    info["finish_reason"] = {"type": "stop"} if ended else None
    return {"index": index, "text": "\\boxed{7}", "output_ids": [1], "meta_info": info}


@pytest.mark.parametrize("sampled", [False, True])
def test_the_vote_of_a_kept_group_ends_with_its_last_trace(sampled: bool) -> None:
    session = VoteSession(5, VoteRules(early="posterior", threshold=0.2, shrink=0.4))
    for index in range(5):
        session.feed(chunk(index, ended=False, sampled=sampled))
    for index in range(4):
        session.feed(chunk(index, ended=True, sampled=sampled))
        session.count()
        if sampled:
            assert not session.surplus()
    assert session.decided() != sampled
    session.feed(chunk(4, ended=True, sampled=sampled))
    session.count()
    assert session.decided()


@pytest.mark.parametrize("lost", ["memory", "vote", "abort"])
def test_a_kept_group_that_lost_a_trace_is_voted_as_any_other(lost: str) -> None:
    session = VoteSession(5, VoteRules(shrink=0.4))
    for index in range(4):
        session.feed(chunk(index, ended=index > 0, sampled=True))
        session.count()
    assert not session.decided() and not session.surplus()
    end = chunk(0, ended=True, sampled=True)
    if lost == "abort":
        end["meta_info"]["finish_reason"] = {"type": "abort", "message": "", "status_code": 503}
    else:
        end["meta_info"]["step"] |= {"pruned": True, "reason": lost}
    session.feed(end)
    session.count()
    assert session.num(TraceFate.FINISHED) == 3 and session.decided()


def folder_of(tmp_path: Path, *groups: GroupInProgress) -> Path:
    tmp_path.mkdir(exist_ok=True)
    folder = Folder(tmp_path, 1_000_000)
    for group in groups:
        assert folder.add(written(group))
    folder.close()
    return tmp_path


def test_kept_groups_are_read_with_their_votes(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        kept(["7", "7", "7", None], "a", "one"),
        kept(["1", "2", "3", "1"], "b", "two"),
        kept(["1", "1", "1", "1"], "c", "two"),
        kept(["9"] * 6, "d", "three"),
        kept(["9"] * 3, "e", "four"),
        kept(["1", "2", "3", "4"], "f", "five"),
    )
    found = load_traces(folder, agreement=0.5)
    jobs = {job.question: job for job in found.jobs}
    assert set(jobs) == {"one", "two", "three"}
    assert jobs["one"].prompt == (1, 2) and jobs["one"].answer == "7"
    assert [t.agrees for t in jobs["one"].traces] == [True, True, True, False]
    assert [t.finish for t in jobs["one"].traces] == ["stop"] * 3 + ["length"]
    assert jobs["one"].traces[0].tokens == (5, 0) and jobs["one"].traces[0].extracted == "7"
    # The group that agrees most, of a question that came twice.
    assert all(trace.agrees for trace in jobs["two"].traces)
    said = "; ".join(found.problems)
    assert "1 of 6 groups, of which less than 0.5 agrees" in said
    assert "2 traces too many of 'three'" in said and "has 3 traces, not 4: 'four'" in said
    assert "1 groups whose question another group asks too" in said
    unlabelled = load_traces(folder, fields=Fields(answer=None))
    assert {job.answer for job in unlabelled.jobs} == {""}
    assert all(trace.agrees is None for job in unlabelled.jobs for trace in job.traces)


def test_groups_of_one_name_and_question_stay_apart(tmp_path: Path) -> None:
    """Clients choose the names: the traces of one that disagreed are not those of the other."""
    groups = [["7", "8", "9", "6"], ["7"] * 4, ["7"] * 4]
    folder = folder_of(tmp_path, *(kept(answers, "q1", "one") for answers in groups))
    for least in (0.5, 0.1):
        found = load_traces(folder, agreement=least)
        (job,) = found.jobs
        assert len(job.traces) == 4 and all(trace.agrees for trace in job.traces)
    broken = folder / "broken.jsonl"
    broken.write_text('{"question": "q", "voted": "7", "traces": [3, {}, {"text": "x"}]}\n')
    assert (
        sum("has no recorded vote" in text for text in load_traces(folder, agreement=0.5).problems)
        == 3
    )


def test_a_question_is_the_same_whatever_stands_around_it(tmp_path: Path) -> None:
    """Its groups must not lie on both sides of a split, nor in a test store beside this one."""
    prompter = load_prompter(str(model_path()), ["\n\n"], suffix=" Box it.")

    def rendered(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(
            prompter.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    prompts = [
        rendered(("user", "1;A+1")),
        rendered(("system", "Think."), ("user", "1;A+1 Box it.")),
        rendered(("user", "2;A+1"), ("assistant", "3"), ("user", "1;A+1")),
        rendered(("user", "2;A+1")),
        "3;A+1",  # of no chat
    ]
    groups = [kept(["7"] * 4, question=prompt) for prompt in prompts]
    found = load_traces(folder_of(tmp_path, *groups), agreement=0.5, asked=prompter.asked)
    assert [job.id for job in found.jobs] == [question_id(f"{i};A+1") for i in (1, 2, 3)]
    assert found.jobs[0].question == prompts[0]
    assert "2 groups whose question another group asks too" in found.problems


def test_what_cannot_be_labelled_by_a_vote_is_one_message(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "kept", kept(["1", "2", "3", "4"]))
    with pytest.raises(SourceError, match=r"a recorded vote of which at least 0\.9 agrees"):
        load_traces(folder, agreement=0.9)
    with pytest.raises(SourceError, match=r"line 1 is a group .* give --labels vote\)$"):
        load_traces(folder)
    assert len(load_traces(folder, fields=Fields(answer=None)).jobs) == 1
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"question": "q", "answer": "7", "text": "\\boxed{7}"}) + "\n")
    with pytest.raises(SourceError, match="line 1 has no recorded vote"):
        load_traces(plain, agreement=0.5)
    options = CollectOptions("reasoner:train", "m", "m", labels=Labels("vote"))
    with pytest.raises(SourceError, match="--labels vote needs --from-traces"):
        plan_collection(options)
    with pytest.raises(TrainError, match="--agreement must be a share"):
        Labels("vote", 1.5)


def test_traces_of_another_model_are_warned_of(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, kept(["7", "7", "7", "8"]))
    path = str(model_path())

    def problems() -> str:
        options = CollectOptions(
            str(folder), "reasoner", path, from_traces=True, labels=Labels("vote")
        )
        plan = plan_collection(options)
        assert plan.meta.sampling["labels"] == "vote" and plan.meta.n == 4
        return " ".join(plan.problems)

    prepare(folder, path)
    assert problems() == ""
    (folder / ABOUT).write_text(json.dumps({"model": "other"}))
    assert "are other's" in problems()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sample": "d", "sample_share": 0.0}, "--step-sample-share must be a share"),
        ({"sample": "d", "sample_share": 1.5}, "--step-sample-share must be a share"),
        ({"sample": "d", "sample_share": "some"}, "--step-sample-share must be a share"),
        ({"sample": "d", "sample_limit": 0}, "--step-sample-limit must be a number of megabytes"),
        ({"sample_share": 0.5}, "--step-sample-share needs --step-sample DIR"),
        ({"sample_limit": 5}, "--step-sample-limit needs --step-sample DIR"),
        ({"sample": "d", "policy": "paper"}, "--step-policy paper knows no groups"),
        ({"sample": "d", "capture": True}, "--step-capture serves `collect`"),
        ({"sample": 3}, "--step-sample must be a folder"),
    ],
)
def test_settings_that_cannot_be(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StepConfig("s", **more)
