"""A server whose HTTP process is killed in the middle of pruning leaves no process behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.death import kill_while_pruning
from tests.server.launch import serve

pytestmark = [pytest.mark.server, pytest.mark.full]


@pytest.mark.timeout(1200)
def test_sigkill_of_the_http_process(models: dict[str, Path], scorer: Path, tmp_path: Path) -> None:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "2000"),
        log=tmp_path / "death.log",
    ) as server:
        kill_while_pruning(server, None)
