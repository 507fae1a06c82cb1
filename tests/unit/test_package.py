"""What `import step_sglang` gives, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import step_sglang
from step_sglang.client.solve import asolve, solve

PROGRAM = """
import sys
import step_sglang
heavy = {"httpx", "math_verify", "numpy", "scipy", "sglang", "torch"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
step_sglang.solve, step_sglang.asolve
late = {"scipy", "sglang", "torch"}
assert not late & set(sys.modules), late & set(sys.modules)
import step_sglang.cli.main  # whoever asks for help waits for none of them
assert not late & set(sys.modules), late & set(sys.modules)
"""


def test_solve_is_at_the_top() -> None:
    assert step_sglang.solve is solve and step_sglang.asolve is asolve
    with pytest.raises(AttributeError, match="no attribute 'sovle'"):
        step_sglang.sovle  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
