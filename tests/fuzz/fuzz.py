"""Runs one target under atheris (libFuzzer with Python coverage) and reports what it did."""

from __future__ import annotations

import argparse
import sys

import atheris
from torch._weights_only_unpickler import Unpickler


def main(name: str) -> None:
    """Fuzz ``name`` for ``--seconds``; new inputs that reach new code go to ``--corpus``."""
    parser = argparse.ArgumentParser(description=f"Fuzzes the {name} reader; pip install atheris.")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", help="a folder for what is found; the committed one is read")
    options = parser.parse_args()
    # What reads a pickle is measured too.
    Unpickler.load = atheris.instrument_func(Unpickler.load)
    with atheris.instrument_imports(include=["step_sglang"]):
        from tests.fuzz import targets
    arguments = [
        sys.argv[0], f"-max_total_time={options.seconds}", "-print_final_stats=1",
        f"-max_len={targets.MAX_BYTES}", "-timeout=20", "-rss_limit_mb=4096",
        "-use_value_profile=1",
    ]  # fmt: skip
    folders = [options.corpus] if options.corpus else []
    if targets.CORPUS[name].is_dir():
        folders.append(str(targets.CORPUS[name]))
    atheris.Setup([*arguments, *folders], targets.TARGETS[name])
    atheris.Fuzz()
