"""Mixed traffic on too small a pool; ``python -m tests.soak`` is longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.run import soak

pytestmark = pytest.mark.server


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("minutes", "pruned"),
    [pytest.param(1 / 3, 20, id="smoke"), pytest.param(3, 100, marks=pytest.mark.full)],
)
def test_nothing_is_lost_doubled_or_leaked(
    models: dict[str, Path], scorer: Path, tmp_path: Path, minutes: float, pruned: int
) -> None:
    report = soak(models["qwen3"], scorer, tmp_path / "soak.log", minutes=minutes)
    print(report)
    assert not report.problems, str(report)
    # All of it happened: every kind of client, with far too little memory.
    assert all(report.counts[kind] for kind in ("group", "ordinary", "long", "aborted", "left"))
    assert report.demand > 3 and report.counts["pruned"] > pruned, str(report)
