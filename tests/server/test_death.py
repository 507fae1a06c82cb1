"""A server that is killed in the middle of pruning leaves no process behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest
import requests

from tests.server.launch import serve

pytestmark = pytest.mark.server


def test_sigkill_leaves_no_child(models: dict[str, Path], scorer: Path, tmp_path: Path) -> None:
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", "2000"),
        log=tmp_path / "death.log",
    ) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) >= 2

        def ask() -> None:
            body = {
                "text": "So",
                "sampling_params": {"n": 64, "max_new_tokens": 1000, "ignore_eos": True},
            }
            with pytest.raises(requests.ConnectionError):
                requests.post(f"{server.url}/generate", json=body, timeout=120)

        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 60
        while "STEP pruned" not in server.log_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "STEP pruned" in server.log_text()
        server.process.kill()
        asking.join(timeout=60)
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert len(gone) == len(children) and not alive
