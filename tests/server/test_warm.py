"""The warm parent: its children are programs like others, and nothing of theirs outlives it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tests.server.amended import amend
from tests.server.launch import COLD, can_be_warm, environment, start_warm

pytestmark = pytest.mark.server

SCRIPT = """
import json, multiprocessing, os, sys, time

def report():
    from sglang.srt import plugins
    print(json.dumps({"loaded": plugins._plugins_loaded}), flush=True)

if __name__ == "__main__":
    print(json.dumps({"arguments": sys.argv[1:], "session": os.getsid(0) == os.getpid()}))
    sys.stdout.flush()
    multiprocessing.set_start_method("spawn", force=True)  # as SGLang asks
    from sglang.srt import plugins
    plugins.load_plugins()
    child = multiprocessing.Process(target=report)
    child.start()
    child.join()
    if sys.argv[1] == "wait":
        time.sleep(600)
    sys.exit(int(sys.argv[1]))
"""
IDLE = "tests.server.idle"
DYING = """
import sys, time
from pathlib import Path
from tests.server.launch import start_warm

print(start_warm(sys.argv[1], "wait", output=Path(sys.argv[2])).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    return str(tmp_path / "script.py")


def test_a_program_has_its_arguments_its_output_and_its_exit_status(
    script: str, tmp_path: Path
) -> None:
    process = start_warm(script, "3", "two words", output=tmp_path / "log")
    assert process.wait(timeout=120) == process.returncode == 3
    said, child = (tmp_path / "log").read_text().splitlines()[:2]
    assert json.loads(said) == {"arguments": ["3", "two words"], "session": True}
    assert json.loads(child) == {"loaded": False}  # the forked process loads the plugins anew


def test_two_programs_end_in_any_order(script: str, tmp_path: Path) -> None:
    long = start_warm(script, "wait", output=tmp_path / "long")
    short = start_warm(script, "0", output=tmp_path / "short")
    assert short.wait(timeout=120) == 0
    assert long.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        long.wait(timeout=0.1)
    long.kill()
    assert long.wait(timeout=120) == -signal.SIGKILL
    long.terminate()  # nobody is hit by a signal to what has ended


@pytest.mark.full
def test_programs_end_with_the_test_process(script: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, script, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert process.stdout is not None
    server = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    psutil.wait_procs([server], timeout=60)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


AMENDED = """
import json, os, sys
from sglang.srt.managers import scheduler  # imported by the parent
import tests.server.idle  # not yet

print(json.dumps([scheduler.amended, tests.server.idle.amended, os.environ["STEP_TEST_FAULTS"]]))
"""


def mark(module: ModuleType) -> None:
    module.amended = True  # type: ignore[attr-defined]


def test_a_program_may_be_amended(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(AMENDED)
    functions = [(name, f"{__name__}:mark") for name in ("sglang.srt.managers.scheduler", IDLE)]
    env = {**amend(tmp_path, *functions), "STEP_TEST_FAULTS": "[]"}
    process = start_warm(str(tmp_path / "script.py"), output=tmp_path / "log", **env)
    assert process.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1]) == [True, True, "[]"]
    assert "amended" not in vars(sys.modules[IDLE])


def test_another_environment_starts_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(COLD, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")  # as importing SGLang does
    assert can_be_warm() and can_be_warm(SGLANG_PLATFORM="step_cpu")
    assert can_be_warm(SGLANG_PLUGINS="step_cpu")  # which nothing has read yet
    assert not can_be_warm(SGLANG_TEST_RETRACT="1")
    monkeypatch.setenv("PATH", "/somewhere")
    assert not can_be_warm()
    monkeypatch.undo()
    monkeypatch.setenv(COLD, "1")
    assert not can_be_warm()
