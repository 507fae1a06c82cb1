"""Three minutes of mixed traffic on too small a pool; ``python -m tests.soak`` is longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.run import soak

pytestmark = pytest.mark.server


@pytest.mark.timeout(1800)
def test_nothing_is_lost_doubled_or_leaked(
    models: dict[str, Path], scorer: Path, tmp_path: Path
) -> None:
    report = soak(models["qwen3"], scorer, tmp_path / "soak.log", minutes=3)
    print(report)
    assert not report.problems, str(report)
    # All of it happened: every kind of client, with far too little memory.
    assert all(report.counts[kind] for kind in ("group", "ordinary", "long", "aborted", "left"))
    assert report.demand > 3 and report.counts["pruned"] > 100, str(report)
