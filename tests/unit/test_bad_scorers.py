"""Malformed and hostile scorer files: each one clear error, no hang, no memory, no code run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.unit.bad_scorers import MARK, write_all


def test_each_is_one_clear_error(tmp_path: Path) -> None:
    expected = write_all(tmp_path)
    assert len(expected) >= 50
    mark = tmp_path / "code-was-run"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.bad_scorers"],
        input=json.dumps(list(expected)),
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, MARK: str(mark), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [path for path, *_ in results] == list(expected)
    for path, said, _, _ in results:
        assert said.startswith(f"ScorerError: scorer {path}"), said
        rest = said.removeprefix(f"ScorerError: scorer {path}")
        assert expected[path] in said, (said, expected[path])
        assert rest.isprintable() and len(rest) < 600, ascii(rest)
    assert not mark.exists()
    slowest = max(seconds for _, _, seconds, _ in results)
    grown = results[-1][3] - results[0][3]
    print(f"{len(results)} files, slowest {slowest:.2f} s, {grown} KiB more at the peak")
    assert grown < 512 << 10
