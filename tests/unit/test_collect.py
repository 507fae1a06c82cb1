"""Collecting from a fake server: what is stored, and every way a server or a source can fail."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from step_sglang.cli import main as cli
from step_sglang.client.launch import capture_flags, running_server, server_command
from step_sglang.client.sampling import Sampling
from step_sglang.data.questions import Job, QuestionSet, load_questions, load_traces, question_id
from step_sglang.errors import ServerError, SourceError
from step_sglang.reasoner import model_path
from step_sglang.scoring.scorer import load_scorer
from step_sglang.training import grade, setup
from step_sglang.training.collect import Collected, CollectSettings, collect
from step_sglang.training.errors import StoreError
from step_sglang.training.prompts import Prompter, load_prompter
from step_sglang.training.reader import Reader
from step_sglang.training.store import Writer
from tests.training_samples import FakeServer, fake_server, meta, planted_store

N = 10
JOBS = tuple(Job(question_id(f"{i};A+1"), f"{i};A+1", "7.0") for i in range(6))
SAMPLING = Sampling(1.0, 1.0, -1, 50)


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return load_prompter(str(model_path()), ["\n\n"])


@pytest.fixture
def server() -> Any:
    with fake_server(str(model_path())) as state:
        yield state


def gather(server: FakeServer, folder: Path, prompter: Prompter, jobs: Any = JOBS) -> Collected:
    settings = CollectSettings(SAMPLING, top_logprobs=2, concurrency=2, keep_text=True)
    store_meta = meta(n=len(jobs[0].traces) or N, hidden_size=prompter.hidden_size)
    with Writer(folder, store_meta) as writer:
        return collect(server.url, writer, jobs, prompter, settings)


def test_what_is_asked_and_what_is_stored(
    server: FakeServer, tmp_path: Path, prompter: Prompter
) -> None:
    done = gather(server, tmp_path, prompter)
    assert (done.questions, done.traces, done.refused) == (6, 60, ())
    body = server.bodies[0]
    assert sorted(b["sampling_params"]["n"] for b in server.bodies) == [2] * 6 + [8] * 6
    assert body["sampling_params"]["custom_params"] == {
        "step": {"hidden_states": True, "step_scores": True}
    }
    assert body["return_logprob"] is True and body["top_logprobs_num"] == 2
    assert body["sampling_params"]["temperature"] == 1.0
    prompts = {prompter.tokenizer.decode(b["input_ids"]) for b in server.bodies}
    assert prompts == {f"<|user|>{job.question}<|assistant|><think>" for job in JOBS}

    reader = Reader(tmp_path, with_text=True)
    shards = list(reader.stream())
    assert {shard.traces[0].question_id for shard in shards} == {job.id for job in JOBS}
    correct = 0
    for shard in shards:
        for trace in shard.traces:
            assert trace.text is not None
            tokens = prompter.tokenizer.encode(trace.text, add_special_tokens=False)
            boundary = prompter.tokenizer.convert_tokens_to_ids("\n\n")
            end = tokens.index(prompter.think_end)
            # one more boundary comes after the thinking, and is not a step
            assert tokens[end:].count(boundary) == 1
            assert trace.steps.positions.tolist() == [
                i for i in range(end) if tokens[i] == boundary
            ]
            rows = shard.hidden[trace.first_row : trace.first_row + trace.num_steps]
            assert rows[:, 0].tolist() == trace.steps.positions.tolist()
            assert trace.extracted in ("7", "8") and trace.correct == (trace.extracted == "7")
            assert trace.num_tokens == len(tokens) + 1
            logprobs = [-0.25 * (i % 2) for i in range(trace.num_tokens)]
            assert trace.mean_logprob == pytest.approx(np.mean(logprobs))
            first = trace.steps.positions[0]
            assert trace.steps.mean_logprob[0] == pytest.approx(np.mean(logprobs[: first + 1]))
            assert trace.steps.lowest_confidence.tolist() == [1.0] * trace.num_steps
            correct += trace.correct
    assert done.correct == correct == 40


def test_a_server_that_dies_in_the_middle(
    server: FakeServer, tmp_path: Path, prompter: Prompter
) -> None:
    server.fail_from = 7
    with pytest.raises(ServerError, match=r"does not answer .* are complete and stay"):
        gather(server, tmp_path, prompter)
    kept = len(Reader(tmp_path).shards)
    assert 1 <= kept <= 3
    server.fail_from = None
    assert gather(server, tmp_path, prompter).questions == 6 - kept
    reader = Reader(tmp_path)
    assert sorted(reader.traces(s)[0].question_id for s in reader.shards) == sorted(
        job.id for job in JOBS
    )
    asked = len(server.bodies)
    assert gather(server, tmp_path, prompter).questions == 0 and len(server.bodies) == asked


def test_a_server_that_is_not_there(tmp_path: Path, prompter: Prompter) -> None:
    with pytest.raises(ServerError, match="does not answer"):
        gather(FakeServer(url="http://127.0.0.1:9"), tmp_path, prompter)


def no_capture(part: dict[str, Any]) -> None:
    del part["meta_info"]["step"]["hidden_states"]


def no_step(part: dict[str, Any]) -> None:
    del part["meta_info"]["step"]


def aborted(part: dict[str, Any]) -> None:
    part["meta_info"]["finish_reason"] = {"type": "abort", "message": "pruned by STEP: full"}


def short_data(part: dict[str, Any]) -> None:
    part["meta_info"]["step"]["hidden_states"]["data"] = "AAAA"


def not_base64(part: dict[str, Any]) -> None:
    part["meta_info"]["step"]["hidden_states"]["data"] = "!"


def missing_row(part: dict[str, Any]) -> None:
    part["meta_info"]["step"]["positions"].pop()


def shifted(part: dict[str, Any]) -> None:
    step = part["meta_info"]["step"]
    step["positions"] = [position + 1 for position in step["positions"]]


def other_tokens(part: dict[str, Any]) -> None:
    part["output_ids"][0] += 1


def no_logprobs(part: dict[str, Any]) -> None:
    del part["meta_info"]["output_token_logprobs"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_capture, "--enable-step --step-capture"),
        (no_step, "--enable-step --step-capture"),
        (aborted, "ended a trace early: pruned by STEP: full"),
        (short_data, "cannot have 3 bytes"),
        (not_base64, "hidden states are unusable"),
        (missing_row, "hidden states for"),
        (shifted, "boundaries where this tokenizer finds"),
        (other_tokens, "other tokens"),
        (no_logprobs, "unusable: KeyError 'output_token_logprobs'"),
    ],
)
def test_unusable_answers(
    server: FakeServer, tmp_path: Path, prompter: Prompter, spoil: Any, message: str
) -> None:
    def tamper(part: dict[str, Any]) -> dict[str, Any]:
        part = copy.deepcopy(part)
        if len(server.bodies) > 4:
            spoil(part)
        return part

    server.tamper = tamper
    with pytest.raises(ServerError) as caught:
        gather(server, tmp_path, prompter)
    assert message in str(caught.value) and "complete and stay" in str(caught.value)
    assert len(Reader(tmp_path).shards) >= 1


def first_state(part: dict[str, Any], value: float) -> dict[str, Any]:
    """A step whose hidden state is not finite: as sampled, the server leaves it out."""
    part = copy.deepcopy(part)
    step = part["meta_info"]["step"]
    n, d = step["hidden_states"]["shape"]
    rows = np.frombuffer(base64.b64decode(step["hidden_states"]["data"]), np.float32).reshape(n, d)
    rows = rows.copy()
    rows[0, 3] = value
    if value == 0:
        rows, step["positions"] = rows[1:], step["positions"][1:]
    data = base64.b64encode(rows.tobytes()).decode()
    step["hidden_states"] = {"dtype": "float32", "shape": list(rows.shape), "data": data}
    return part


@pytest.mark.parametrize(
    ("value", "says"),
    [(0, "no hidden state of 1 of a trace's"), (np.nan, "1 of the"), (np.inf, "hidden states of")],
)
def test_a_hidden_state_that_is_not_finite_costs_its_question_alone(
    server: FakeServer, tmp_path: Path, prompter: Prompter, value: float, says: str
) -> None:
    bad = prompter.prompt(JOBS[2].question)
    server.tamper = lambda part: (
        first_state(part, value) if server.bodies[-1]["input_ids"] == bad else part
    )
    done = gather(server, tmp_path, prompter)
    assert done.questions == 5 and done.refused == () and len(done.unusable) == 1
    assert says in done.unusable[0] and "NaN or infinity" in done.unusable[0]
    assert "2;A+1" in done.unusable[0]
    server.tamper = lambda part: part
    assert gather(server, tmp_path, prompter).questions == 1
    server.tamper = lambda part: first_state(part, value)
    jobs = [Job(str(i), f"{i};A+1", "7") for i in range(20)]
    with pytest.raises(ServerError, match=r"most questions are not usable.*not finite"):
        gather(server, tmp_path / "all", prompter, jobs)
    assert len({tuple(body["input_ids"]) for body in server.bodies}) < 6 + 12
    with pytest.raises(ServerError, match=r"no question is usable.*not finite"):
        gather(server, tmp_path / "few", prompter, jobs[:3])


def test_a_trace_without_tokens_is_left_out(
    server: FakeServer, tmp_path: Path, prompter: Prompter
) -> None:
    lines = [
        {"question": f"{i};A+1", "answer": "7", "text": text}
        for i in range(3)
        for text in ("A:1\n\n</think>\\boxed{7}", "<think>" if i == 1 else "A:2\n\n</think>")
    ]
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    done = gather(server, tmp_path / "s", prompter, load_traces(file).jobs)
    assert done.questions == 2 and done.unusable == ("a trace has no token: '1;A+1'",)


def test_answers_are_read_as_in_a_vote(
    server: FakeServer, tmp_path: Path, prompter: Prompter
) -> None:
    def tamper(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "text": "So the answer is (C)."}

    server.tamper = tamper
    for kind, right in (("choice", N), ("boxed", 0)):
        job = replace(JOBS[0], answer="C", extract=kind)
        assert gather(server, tmp_path / kind, prompter, [job]).correct == right


def test_a_store_says_how_answers_were_read(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampling(extract: str) -> Any:
        jobs = tuple(replace(job, extract=extract) for job in JOBS)
        monkeypatch.setattr(setup, "load_questions", lambda *_: QuestionSet("q", jobs, ()))
        options = setup.CollectOptions("q", "reasoner", str(model_path()))
        return setup.plan_collection(options).meta.sampling

    assert sampling("choice") == {**sampling("boxed"), "extract": "choice"}


def test_refused_questions_are_left_out(
    server: FakeServer, tmp_path: Path, prompter: Prompter
) -> None:
    server.refuse = "3;A+1"
    done = gather(server, tmp_path, prompter)
    assert done.questions == 5 and "too long" in done.refused[0] and "3;A+1" in done.refused[0]
    server.refuse = ";A+1"
    with pytest.raises(ServerError, match=r"refuses every question.*too long"):
        gather(server, tmp_path / "other", prompter)


def test_a_server_of_another_model(tmp_path: Path, prompter: Prompter) -> None:
    with fake_server("m", d=64) as other, pytest.raises(ServerError, match=r"\[64\] wide.*128"):
        gather(other, tmp_path, prompter)


def test_traces_that_exist_already(server: FakeServer, tmp_path: Path, prompter: Prompter) -> None:
    steps = "A:0+1=1\n\nwait,A:0+1=1?ok\n\n"
    lines = [
        {"question": q, "answer": "1", "text": f"{think}{steps}</think>\\boxed{{{a}}}\n\n"}
        for q in ("0;A+1", "0;A+1;B+0")
        for think, a in (("<think>", 1), ("", 2))
    ]
    lines += [{"question": "1;A+1", "answer": "2", "text": "x"}, {"question": "2;A+1"}]
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = load_traces(file)
    assert [len(job.traces) for job in source.jobs] == [2, 2]
    assert len(source.problems) == 2
    done = gather(server, tmp_path / "s", prompter, source.jobs)
    assert (done.questions, done.traces, done.correct) == (2, 4, 2)
    body = server.bodies[0]
    start = body["sampling_params"]["custom_params"]["step"]["prompt_tokens"]
    assert body["sampling_params"]["max_new_tokens"] == 1
    assert prompter.tokenizer.decode(body["input_ids"]).count("<think>") == 1
    assert prompter.tokenizer.decode(body["input_ids"][:start]).endswith("<think>")
    for shard in Reader(tmp_path / "s").stream():
        for trace in shard.traces:
            assert trace.num_steps == 2 and trace.finish == "stop"
            rows = shard.hidden[trace.first_row : trace.first_row + 2]
            assert rows[:, 0].tolist() == trace.steps.positions.tolist()
            assert not np.isnan(trace.steps.mean_logprob).any()


def test_traces_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no \*\.jsonl file"):
        load_traces(tmp_path)
    common = {"question": "0;A+1", "answer": "1"}
    for name, texts in (("b.jsonl", ["three"]), ("a.jsonl", ["one", "two"]), ("c.txt", ["no"])):
        lines = [json.dumps({**common, "text": text}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (job,) = load_traces(tmp_path).jobs
    assert [trace.text for trace in job.traces] == ["one", "two", "three"]


def test_the_tokens_of_a_trace_win_over_its_text(
    server: FakeServer, tmp_path: Path, prompter: Prompter
) -> None:
    text = "A:0+1=1\n\n</think>\\boxed{1}"
    usual = prompter.output("q", text)
    one, two = (prompter.tokenizer.convert_tokens_to_ids(c) for c in ("0", "<0x30>"))
    sampled = [two if token == one else token for token in usual]
    assert prompter.tokenizer.decode(sampled) == text and sampled != usual
    common = {"question": "0;A+1", "answer": "1", "text": text}
    lines = [
        common,
        {**common, "tokens": sampled},
        *({**common, "tokens": bad} for bad in ([], "x", [1.5], [True], [None])),
    ]
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = load_traces(file)
    assert len(source.problems) == 5 and "unusable tokens" in source.problems[0]
    before = len(server.bodies)
    gather(server, tmp_path / "s", prompter, source.jobs)
    assert sorted(b["input_ids"][-len(usual) :] for b in server.bodies[before:]) == sorted(
        [usual, sampled]
    )
    traces = Reader(tmp_path / "s", with_text=True).traces(0)
    assert [trace.tokens for trace in traces] == [tuple(usual), tuple(sampled)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"question": "half \\ud83d", "answer": 1, "text": "t"}', "surrogates not allowed"),
        ('{"question": "q", "answer": 1, "text": "\\uDE00"}', "surrogates not allowed"),
        ('{"question": "q", "answer": 1, "text": "t", "more": 1' + 5000 * "0" + "}", "4300 digits"),
        ("[" * 100_000, "recursion"),
    ],
    ids=["question", "text", "digits", "deep"],
)
def test_a_line_that_python_cannot_hold_or_send(tmp_path: Path, row: str, says: str) -> None:
    file, whole = tmp_path / "q.jsonl", '{"question": "\\ud83d\\ude00", "answer": 1, "text": "t"}'
    file.write_text(f"{whole}\n{row}\n")
    for source in (load_questions(str(file)), load_traces(file)):
        assert [job.question for job in source.jobs] == ["😀"]
        assert "line 2 cannot be read" in source.problems[0] and says in source.problems[0]


def test_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    lines = [
        '{"question": "a", "answer": "so it is #### 42"}',
        '{"question": "b", "answer": "thus \\\\boxed{1/2}"}',
        '{"question": "c", "answer": 3}',
        '{"question": "d"}',
        '{"question": "a", "answer": "1"}',
        "not json",
        '{"question": "", "answer": "1"}',
        "[1]",
    ]
    file.write_text("\n".join(lines))
    source = load_questions(str(file))
    assert [(job.question, job.answer) for job in source.jobs] == [
        ("a", "42"), ("b", "1/2"), ("c", "3"),
    ]  # fmt: skip
    assert len(source.problems) == 5
    assert "line 4 has no question or no answer" in source.problems[0]
    assert len(load_questions(str(file), limit=2).jobs) == 2
    with pytest.raises(SourceError, match="nothing with 'problem' and 'answer'"):
        from step_sglang.data.questions import Fields

        load_questions(str(file), fields=Fields(question="problem"))
    with pytest.raises(SourceError, match="cannot read"):
        load_questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(SourceError, match="unknown split"):
        load_questions("reasoner:nonsense")
    found = load_questions("reasoner:scorer-train", 5).jobs
    other = load_questions("reasoner:scorer-validation", 5).jobs
    assert len(found) == 5 and not {j.id for j in found} & {j.id for j in other}


def test_blanks_at_the_ends_make_no_other_question(tmp_path: Path) -> None:
    texts, file = ("3+4? ", "3+4?", "\n3+4?"), tmp_path / "q.jsonl"
    lines = [json.dumps({"question": text, "answer": "7", "text": "t"}) for text in texts]
    file.write_text("\n".join(lines))
    found = load_questions(str(file))
    # Under the id that it has in stores of earlier versions.
    assert [(job.id, job.question) for job in found.jobs] == [(question_id("3+4? "), "3+4? ")]
    assert found.problems == ("line 2 repeats a question", "line 3 repeats a question")
    (job,) = load_traces(file).jobs
    assert (job.id, len(job.traces)) == (question_id("3+4? "), 3)


def test_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grade.graded("so \\boxed{0.5}", "stop", "1/2") == ("0.5", True)
    assert grade.graded("so \\boxed{0.6}", "stop", "1/2") == ("0.6", False)
    assert grade.graded("so \\boxed{1/2} and", "length", "1/2") == (None, False)
    assert grade.graded("none", "stop", "1/2") == (None, False)

    def forever(one: str, other: str) -> bool:
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(grade, "equivalent", forever)
    monkeypatch.setattr(grade, "TIME_LIMIT", 0.1)
    assert grade.graded("\\boxed{9^9^9}", "stop", "1") == ("9^9^9", False)


def test_a_server_that_does_not_start_is_stopped(tmp_path: Path) -> None:
    assert capture_flags(["\n\n", "##"], False)[-3:] == ["--step-delimiter", "\\n\\n", "##"]
    assert capture_flags(["##"], True)[-2:] == ["--step-scope", "all"]
    assert server_command("m", 1, ["--x", "--y"])[-4:] == ["--port", "1", "--x", "--y"]
    flags = ["--device", "cpu", "--no-such-flag"]
    log = tmp_path / "log"
    fake = tmp_path / "sglang"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    (fake / "launch_server.py").write_text("import sys; sys.exit(f'bad flags {sys.argv[-1]}')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ServerError, match="bad flags --no-such-flag"):  # noqa: SIM117
            with running_server("m", flags, log):
                pass
        (fake / "launch_server.py").write_text("import sys; sys.exit('and worse')")
        with pytest.raises(ServerError, match="and worse"):  # noqa: SIM117
            with running_server("m", flags, log):
                pass
    assert log.read_text().count("a server starts") == 2  # an earlier server's log stays
    assert "bad flags" in log.read_text()


def test_our_server_is_stopped_with_its_children(tmp_path: Path) -> None:
    fake = tmp_path / "sglang"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    (fake / "launch_server.py").write_text(
        "import subprocess, sys, http.server as h\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "open('children', 'w').write(str(child.pid))\n"
        "class H(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "h.HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), H)"
        ".serve_forever()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.chdir(tmp_path)
        with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
            with running_server("m", ["--device", "cpu"], tmp_path / "log"):
                child = int((tmp_path / "children").read_text())
                raise KeyboardInterrupt
    state = Path(f"/proc/{child}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a child of the server is still running")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["step-sglang", *arguments])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # the test process keeps its own
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_collect_command(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    store = str(tmp_path / "store")
    arguments = [
        "collect", "reasoner:scorer-train", "--url", server.url, "-o", store, "-n", "6",
        "--limit", "12", "--top-logprobs", "2",
    ]  # fmt: skip
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    assert "12 questions" in shown.out and "72 traces" in shown.out
    saved = Reader(store).meta
    assert saved.model == "reasoner" and saved.sampling["temperature"] == 1.0
    assert saved.source == "reasoner:scorer-train" and saved.confidence_window == 20
    assert run(monkeypatch, *arguments) == 0
    assert "12 in" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--top-p", "0.5") == 1
    assert "other settings" in " ".join(capsys.readouterr().err.split())


def test_the_server_serves_the_model_that_is_said(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def collected(model: str, served: str) -> str:
        with fake_server(served) as other:
            arguments = ["collect", "reasoner:scorer-train", "--limit", "1", "-n", "1"]
            store = str(tmp_path / f"{len(list(tmp_path.iterdir()))}")
            more = ["--url", other.url, "--model", model, "-o", store]
            assert run(monkeypatch, *arguments, *more) == 0
            return " ".join(capsys.readouterr().err.split())

    shown = collected("reasoner", "/models/some-finetune-of-it")
    assert "serves /models/some-finetune-of-it, and --model is reasoner: is that the same" in shown
    for served in (str(model_path()), "reasoner"):
        assert "is that the same" not in collected("reasoner", served)


def test_the_revision_reaches_tokenizer_server_and_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    old, new = "a" * 40, "b" * 40
    cached = {commit: tmp_path / "models--org--m" / "snapshots" / commit for commit in (old, new)}
    asked: list[str | None] = []

    def load(model: str, *rest: Any) -> Prompter:
        asked.append(rest[-1])
        return load_prompter(str(model_path()), *rest[:-1])

    monkeypatch.setattr(setup, "load_prompter", load)
    monkeypatch.setattr(
        setup, "model_revision", lambda model, wanted=None: cached[wanted or new].name
    )
    flags: list[str] = []

    @contextmanager
    def running(path: str, more: list[str], log: Path) -> Any:
        flags[:] = more
        with fake_server("org/m") as started:
            yield started.url

    monkeypatch.setattr("step_sglang.client.launch.running_server", running)
    arguments = ["collect", "reasoner:scorer-train", "--model", "org/m", "-n", "1", "-o"]
    store = str(tmp_path / "store")
    assert run(monkeypatch, *arguments, store, "--limit", "1", "--", "--revision", old) == 0
    assert asked == [old] and Reader(store).meta.revision == old
    assert flags[flags.index("--revision") + 1] == old
    # The main branch has moved on, and the message says how to go on.
    assert run(monkeypatch, *arguments, store, "--limit", "2") == 1
    assert f"use the same (--revision {old}), or another" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, store, "--limit", "2", "--revision", old) == 0
    assert flags[flags.index("--revision") + 1] == old and len(Reader(store).shards) == 2
    assert run(monkeypatch, *arguments, store, "--revision", old, "--", f"--revision={new}") == 1
    assert f"--revision is {old}, and after `--` it is {new}" in capsys.readouterr().err
    # A running server says with which it was started.
    with fake_server("org/m", revision=old) as server:
        at = ("--limit", "3", "--url", server.url)
        assert run(monkeypatch, *arguments, store, *at) == 0 and len(Reader(store).shards) == 3
        capsys.readouterr()
        run(monkeypatch, *arguments, str(tmp_path / "other"), *at, "--revision", new)
        assert f"was started with --revision {old}, and here it is {new}" in capsys.readouterr().err


def test_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    state = {
        "net.0.weight": torch.randn(512, 32), "net.0.bias": torch.randn(512),
        "net.2.weight": torch.randn(1, 512), "net.2.bias": torch.randn(1),
    }  # fmt: skip
    torch.save({"model_state_dict": state}, tmp_path / "in.pt")
    arguments = ["convert", str(tmp_path / "in.pt"), str(tmp_path / "s.safetensors")]
    arguments += ["--model", "some/model", "--delimiter", "\\n\\n"]
    assert run(monkeypatch, *arguments) == 0
    scorer = load_scorer(tmp_path / "s.safetensors")
    assert torch.equal(scorer.w1, state["net.0.weight"])
    assert scorer.info.model == "some/model" and scorer.info.delimiters == ("\n\n",)
    assert scorer.info.calibration is None
    assert run(monkeypatch, *arguments) == 1 and run(monkeypatch, *arguments, "--force") == 0
    # With traces of new questions it is calibrated too; with too few of them it is refused.
    for questions, status in ((12, 0), (5, 1)):
        store = planted_store(tmp_path / f"store{questions}", questions, d=32)
        more = ("--calibrate", str(store), "--force")
        named = ["planted" if one == "some/model" else one for one in arguments]
        assert run(monkeypatch, *named, *more) == status
    found = load_scorer(tmp_path / "s.safetensors").info
    assert found.model == "planted" and found.calibration is not None
    assert found.calibration.questions == 12
    said = capsys.readouterr().err
    assert "cannot calibrate" in said and "not to true answers" not in said
    meta_file = tmp_path / "store12" / "meta.json"
    stored = json.loads(meta_file.read_text())
    meta_file.write_text(json.dumps({**stored, "sampling": {"labels": "vote"}}))
    voted = ("--calibrate", str(tmp_path / "store12"), "--force")
    assert run(monkeypatch, *named, *voted) == 0
    assert "to the traces' own vote, not to true answers" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, *more[:1], str(tmp_path / "store12"), "--force") == 1
    assert "was trained for some/model" in capsys.readouterr().err
    capsys.readouterr()
    arguments[2] = str(tmp_path / "s.pt")
    assert run(monkeypatch, *arguments) == 1
    assert ".safetensors" in capsys.readouterr().err


def test_errors_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, "train", str(tmp_path), "-o", str(tmp_path)) == 1
    shown = capsys.readouterr()
    assert "error:" in shown.err and "Traceback" not in shown.err
    assert run(monkeypatch, "inspect", str(tmp_path / "none")) == 1
    assert run(monkeypatch, "collect", "reasoner:none", "-o", str(tmp_path / "s")) == 1
    assert run(monkeypatch, "collect", str(tmp_path), "-o", str(tmp_path / "s")) == 1
    assert not (tmp_path / "s").exists()


def test_the_store_error_of_a_full_disk_ends_the_run(
    server: FakeServer, tmp_path: Path, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = Writer.add, 0

    def add(self: Writer, result: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise StoreError("the disk is full")
        real(self, result)

    monkeypatch.setattr(Writer, "add", add)
    with pytest.raises(StoreError, match="full"):
        gather(server, tmp_path, prompter)
    assert len(Reader(tmp_path).shards) == 2


def test_the_module_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "step_sglang", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("collect", "train", "inspect", "convert"):
        assert name in shown.stdout
