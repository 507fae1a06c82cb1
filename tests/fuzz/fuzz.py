"""Runs one target under atheris (libFuzzer with Python coverage) and reports what it did."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import atheris
from torch._weights_only_unpickler import Unpickler


def main(name: str) -> None:
    """Fuzz ``name`` for ``--seconds``; new inputs that reach new code go to ``--corpus``."""
    parser = argparse.ArgumentParser(description=f"Fuzzes the {name} reader; pip install atheris.")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", help="a folder for what is found; the committed one is read")
    options = parser.parse_args()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="step-fuzz-", dir=memory) as folder:
        # libFuzzer ends its process without Python's clean-up.
        child = os.fork()
        if child == 0:
            os.environ["TMPDIR"] = folder
            _fuzz(name, options, Path(folder))
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def _fuzz(name: str, options: argparse.Namespace, folder: Path) -> None:
    # What reads a pickle is measured too.
    Unpickler.load = atheris.instrument_func(Unpickler.load)
    with atheris.instrument_imports(include=["step_sglang"]):
        from tests.fuzz import targets
    arguments = [
        sys.argv[0], f"-max_total_time={options.seconds}", "-print_final_stats=1",
        f"-max_len={targets.MAX_BYTES}", "-timeout=20", "-rss_limit_mb=4096",
        "-use_value_profile=1",
    ]  # fmt: skip
    kept = folder / "corpus"
    kept.mkdir()
    for number, content in enumerate(targets.corpus(name)):
        (kept / str(number)).write_bytes(content)
    folders = [options.corpus] if options.corpus else []
    folders.append(str(kept))

    def run(data: bytes) -> None:
        targets.TARGETS[name](data)

    atheris.Setup([*arguments, *folders], run)
    atheris.Fuzz()
