"""What owners of a GPU run, run without one: its first run there must not be its first run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run")
def test_skipped_gpu_tests_are_no_success() -> None:
    arguments = ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-k", "largest or warm_up")
    assert run(*arguments).returncode == 0
    done = run(*arguments, "--require-all")
    assert done.returncode == 1
    assert "0 tests passed and 2 were skipped, so this proves nothing" in done.stdout
    none = run(*arguments[:-1], "no_such_test", "--require-all")
    assert none.returncode == 1 and "0 tests passed and 0 were skipped" in none.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it has one")
def test_the_report_asks_for_a_device() -> None:
    done = run("bench/gpu_report.py")
    assert done.returncode == 1 and "torch finds no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_parts_that_need_no_server() -> None:
    done = run("bench/gpu_report.py", "--device", "cpu", "--quick", "--skip", "tests", "a")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "```text" and lines[-1] == "```"
    assert any(line.startswith("commit ") and len(line.split()[1]) >= 40 for line in lines)
    assert sum(": right, device cpu" in line for line in lines) == 3
    for weights in ("fp32", "bf16"):
        for case in ("0 of   64", "64 of   64", "0 of 4096", "100 of 4096"):
            assert any(f" {weights} " in line and f" {case} " in line for line in lines), case


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_report() -> None:
    done = run("bench/gpu_report.py", "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this part failed" not in done.stdout
    assert done.stdout.count("exit status 0") == 2  # the emulated kernel's tests, the servers
    assert " passed" in done.stdout and "on, all scored" in done.stdout


def test_the_sanitizers_are_called_as_they_want_it(tmp_path: Path) -> None:
    """A stand-in for NVIDIA's program: it says what it is given, and runs nothing."""
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "FAILED $*"\n')
    program.chmod(0o755)
    code = (
        "import argparse, bench.gpu_report as r\n"
        "r.build.find_toolkit = lambda: None\n"
        f"r.shutil.which = lambda name: {str(tmp_path)!r} + '/' + name\n"
        "print(*r.sanitizer(argparse.Namespace(device='cuda')), sep='\\n')"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    for tool in ("memcheck", "initcheck", "synccheck", "racecheck"):
        given = f"FAILED --tool {tool} --error-exitcode 1 --target-processes all {sys.executable}"
        assert f"-- {tool}\n" in done.stdout and given[:160] in done.stdout
    assert done.stdout.count("exit status 0") == 4


def test_a_library_that_the_report_builds_is_its_tests_too(tmp_path: Path) -> None:
    """The parts run in other processes, which must find what this one has built."""
    code = (
        "import sys, torch, bench.gpu_report as r\n"
        "torch.cuda.is_available = lambda: True\n"
        "r.op.has_cuda, r.op.load_cuda = lambda: False, lambda path: None\n"
        "r.cuda_library = lambda say: r.Path('/built/here.so')\n"
        "r.PARTS = (('child', lambda options: iter([r.said('printenv', r.protocol.CUDA_LIBRARY_ENV"
        ")])),)\n"
        "sys.argv = ['r']\nsys.exit(r.main())"
    )
    done = run("-c", code)
    assert done.returncode == 0 and "/built/here.so" in done.stdout, done.stdout + done.stderr


def test_a_part_that_fails_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    code = (
        "import sys, bench.gpu_report as r\n"
        "def broken(options): raise RuntimeError('no luck')\n"
        "r.PARTS = (('first', broken), *r.PARTS[:1])\n"
        "sys.argv = ['r', '--device', 'cpu']\nsys.exit(r.main())"
    )
    done = run("-c", code)
    assert done.returncode == 1
    assert "RuntimeError: no luck" in done.stdout and "== machine" in done.stdout
