"""The bench on the real server: every method, a kill in the middle, the report, the replay."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import mean, median, variance

import psutil
import pytest
import typer
from typer.core import TyperGroup

from step_sglang.cli.main import app
from step_sglang.evaluation.results import RESULTS, load_results
from step_sglang.evaluation.traces import load_groups
from step_sglang.evaluation.trial_result import TrialResult
from tests.server.launch import Server
from tests.server.launch import start_command as start

# Minutes of sampling; the page's own run of `bench` and `report` is in `make test`.
pytestmark = [pytest.mark.server, pytest.mark.full, pytest.mark.timeout(1200)]

N, QUESTIONS, POOL, WARMUP = 8, 2, 700, 4
SMALL = 220  # KV tokens for a random model; its prompt has 83
METHODS = (
    "cot", "sc", "slim-sc-random", "slim-sc-diversity", "deepconf-low", "deepconf-high", "random",
    "longest", "step", "sc-early", "step-early", "step-exact",
)  # fmt: skip
PRUNING = ("random", "longest", "step", "step-exact")  # in a pool this small


@pytest.fixture(scope="module")
def server(reasoner: Server) -> Server:
    return reasoner


def run(*arguments: object, status: int = 0) -> str:
    """Run the command to its end; returns what it printed, or its messages if it is to fail."""
    process = start(*arguments)
    out, err = process.communicate(timeout=900)
    assert process.returncode == status, err
    return err if status else out


def arguments(folder: Path, methods: str, questions: int = QUESTIONS) -> tuple[object, ...]:
    return (
        *("bench", "--methods", methods, "--dataset", "reasoner:test", "--limit", questions),
        *("--n", N, "--warmup", WARMUP, "--watch", 0.05, "-o", folder),
    )


def wait_for_lines(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 400
    file = folder / RESULTS
    while not (file.exists() and file.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def measured(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all methods, killed once in the middle and run again."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    command = (*arguments(folder, ",".join(METHODS)), "--url", server.url, "--record")
    process = start(*command)
    wait_for_lines(folder, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # As a kill in the middle of a write leaves it.
    with (folder / RESULTS).open("ab") as file:
        file.write(b'{"question": "')
    kept = (folder / RESULTS).read_bytes()
    out = run(*command)
    assert (folder / RESULTS).read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert re.search(r"^ *STEP +8 ", out, re.MULTILINE)
    return folder


def by_method(folder: Path) -> dict[str, list[TrialResult]]:
    found: dict[str, list[TrialResult]] = defaultdict(list)
    for result in load_results([folder]).results:
        found[result.method].append(result)
    return found


def test_nothing_is_lost_or_doubled_by_a_kill(measured: Path) -> None:
    lines = (measured / RESULTS).read_text().splitlines()
    assert len(lines) == (len(METHODS) + 1) * QUESTIONS
    results = by_method(measured)
    assert set(results) == {*METHODS, "record"}
    assert all(len({r.question for r in found}) == QUESTIONS for found in results.values())


def test_every_method_does_what_it_is(measured: Path) -> None:
    results = by_method(measured)
    for name, found in results.items():
        for result in found:
            # Where DeepConf's warm-up agrees it samples no more.
            sizes = {1} if name == "cot" else {WARMUP, N} if name[:4] == "deep" else {N}
            assert len(result.traces) in sizes and result.pool == POOL
            if name[:4] != "deep" and not name.endswith(("-early", "-exact")):
                assert result.cancelled == 0
            assert result.latency >= sum(result.phases) * 0.99
            assert all(t.decode is not None for t in result.traces if t.fate == "finished")
            assert all(t.tokens > 0 for t in result.traces if t.fate == "finished")
            reasons = {t.reason for t in result.traces if t.fate == "pruned"}
            allowed = {"decode", "admission"}
            if name.startswith("slim-sc"):
                allowed = {"similarity"}
            elif name.startswith("deepconf"):
                allowed = {"confidence"}
            assert reasons <= (
                allowed if name not in ("cot", "sc", "sc-early", "record") else set()
            )
    for name in PRUNING:
        assert all(r.pruned > 0 for r in results[name]), name
        waits = [t.wait / r.latency for r in results[name] for t in r.traces if t.wait is not None]
        assert median(waits) < 1 / 2, name
    assert max(t.wait or 0 for r in results["sc"] for t in r.traces) > 0


def test_deepconf_stops_what_falls_below_its_threshold(measured: Path) -> None:
    for result in by_method(measured)["deepconf-low"]:
        warmup, rest = result.traces[:WARMUP], result.traces[WARMUP:]
        assert len(result.phases) == 2 and result.threshold is not None
        confidences = sorted(t.confidence for t in warmup if t.confidence is not None)
        assert all(t.fate == "finished" for t in warmup)
        assert confidences[-2] <= result.threshold <= confidences[-1]
        for trace in rest:
            if trace.fate == "cancelled":
                continue  # the others agreed
            assert trace.confidence is not None
            # One that falls below with its last token has finished.
            assert trace.fate == "finished" or trace.confidence < result.threshold


def test_the_pool_was_watched(measured: Path) -> None:
    usage = [u for r in load_results([measured]).results for u in r.usage]
    assert usage and all(0 <= u.share <= 1 for u in usage)
    assert max(u.share for u in usage) > 0.3 and max(u.running for u in usage) > 1


def test_the_report(measured: Path) -> None:
    run("report", measured)
    text = (measured / "report.md").read_text()
    for title in ("CoT", "SC", "Slim-SC (random)", "DeepConf-low", "STEP", "random victim"):
        assert text.count(f"| {title} | ") == 2
    assert "AUC within the question" in text and "recorded" not in text.split("AUC")[0]
    names = {"report.tex", "latency.png", "breakdown.png", "ranking.png"}
    assert names <= {file.name for file in measured.iterdir()}


def test_replay_predicts_the_live_runs(measured: Path) -> None:
    groups = list(load_groups([measured]))
    assert len(groups) == QUESTIONS and all(group.whole for group in groups)
    for group in groups:
        for trace in group.traces:
            assert len(trace.times) == len(trace.confidences)
            assert list(trace.times) == sorted(trace.times)
            assert len(trace.positions) == len(trace.step_scores) > 0
    options = ("--pool", POOL, "--policies", "none,fair", "--votes", "weighted", "--json")
    sc, step = (json.loads(line) for line in run("replay", measured, *options).splitlines())
    live = by_method(measured)
    # Other traces of the same questions. SC generates them whole: the sums differ as lengths do.
    error = 0.0
    for group in groups:
        (ours,) = (r for r in live["sc"] if r.question == group.question)
        error += N * sum(variance(t.tokens for t in one.traces) for one in (group, ours))
    error = error**0.5 / QUESTIONS
    assert abs(sc["tokens"] - mean(r.tokens for r in live["sc"])) <= 6 * error
    # With STEP the pool bounds the sum: the difference has a standard error of about a tenth, and
    # of about one pruned trace.
    assert step["tokens"] == pytest.approx(mean(r.tokens for r in live["step"]), rel=0.5)
    assert abs(step["pruned"] - mean(r.pruned for r in live["step"])) <= N / 2
    assert sc["pruned"] == 0 and step["retracted"] == 0
    assert step["seconds"] < sc["seconds"] and step["tokens"] < sc["tokens"]


def test_what_a_server_cannot_do_is_refused(server: Server, tmp_path: Path) -> None:
    message = run(*arguments(tmp_path, "step-paper"), "--url", server.url, status=1)
    assert "--step-policy fair, and these methods need paper" in " ".join(message.split())
    message = run(*arguments(tmp_path, "sc"), "--url", server.url, "--pool", 64, status=1)
    assert "not --url" in message


@pytest.mark.full
def test_its_own_server_with_the_papers_policy_dies_in_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    process = start(*arguments(folder, "step-paper", 40), "--pool", POOL)
    wait_for_lines(folder, 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    launched = next(c for c in children if "launch_server" in command_line(c))
    os.kill(launched.pid, signal.SIGKILL)
    message = " ".join(process.communicate(timeout=120)[1].split())
    assert process.returncode == 1
    assert "and stay; run the same command again to go on" in message
    results = by_method(folder)["step-paper"]
    assert 2 <= len(results) < 40
    assert all(r.pruned > 0 and r.memory == f"{POOL} tokens" for r in results)
    deadline = time.monotonic() + 30
    while any(map(lives, children)):
        assert time.monotonic() < deadline, [c for c in children if lives(c)]
        time.sleep(0.1)


def command_line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def lives(process: psutil.Process) -> bool:
    """Whether it runs; nobody may be there to reap an orphan."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def paper_commands() -> list[list[str]]:
    """The commands of docs/paper.md, as words."""
    text = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("Qwen/Qwen3-4B-Thinking-2507", "qwen3"),
        # The same architecture once more.
        pytest.param("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "qwen3", marks=pytest.mark.slow),
        ("microsoft/Phi-4-reasoning-plus", "phi3"),
    ],
)
def test_the_papers_command_with_a_small_random_model(
    model: str, kind: str, models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    command = next(c for c in paper_commands() if c[1] == "bench" and model in c)
    # One server instead of two: the reference's policy is tested above.
    small = {
        "--model": models[kind],
        "--scorer": scorer,
        "--dataset": tmp_path / "questions.jsonl",
        "--n": 12,
        "--repeats": 1,
        "--mem-fraction": None,
        "--max-new-tokens": 60,
        "--methods": command[command.index("--methods") + 1].replace("step-paper,", ""),
        "-o": tmp_path / "results",
    }
    words: list[object] = []
    for flag in command[2::2]:
        assert flag in small, f"{flag} is new in docs/paper.md"
        if small[flag] is not None:
            words += [flag, small[flag]]
    (tmp_path / "questions.jsonl").write_text('{"question": "How much is 1+1?", "answer": "2"}\n')
    run("bench", *words, "--pool", SMALL, "--warmup", 3, "--window", 8, "--slim-delay", 2)
    results = by_method(tmp_path / "results")
    assert set(results) == {"cot", "sc", "slim-sc-diversity", "deepconf-low", "step"}
    (step,), (sc,) = results["step"], results["sc"]
    assert sc.pruned == 0
    # Traces run side by side: unless many ended early, they needed more than there was.
    lengths = sorted((t.tokens for t in step.traces), reverse=True)
    assert step.pruned > 0 or max(i * length for i, length in enumerate(lengths, 1)) <= SMALL
    meta = json.loads((tmp_path / "results" / "meta.json").read_text())
    assert meta["suffix"].endswith("\\boxed{}.")


def test_every_command_of_the_paper_page_is_known() -> None:
    known = typer.main.get_command(app)
    assert isinstance(known, TyperGroup)
    commands = paper_commands()
    assert len(commands) >= 5
    for words in commands:
        options = {name for param in known.commands[words[1]].params for name in param.opts}
        assert {word for word in words[2:] if word.startswith("-")} <= options
