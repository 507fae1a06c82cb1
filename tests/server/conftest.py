"""Models for the server tests, built once, and the servers that several modules use."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from step_sglang.reasoner import model_path, scorer_path
from tests.models import build_model, build_scorer
from tests.server.launch import Server, serve
from tests.server.pruned import LOG_REQUESTS, POOL

# A run that is told to end must still stop its servers.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

KINDS = ("qwen3", "llama", "phi3")


@pytest.fixture(scope="session")
def models(shared: Path) -> dict[str, Path]:
    """One random model per architecture."""
    root = shared / "models"
    with FileLock(shared / "models.lock"):
        if not root.exists():
            part = shared / "models.part"  # should a build fail, the others do not take a half
            for kind in KINDS:
                build_model(part / kind, kind)
            part.rename(root)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="session")
def scorer(shared: Path) -> Path:
    """A random scorer that fits each of them."""
    path = shared / "scorer.safetensors"
    with FileLock(shared / "scorer.lock"):
        return path if path.exists() else build_scorer(path)


@pytest.fixture(scope="package")
def roomy(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A random model with STEP, and more memory than the tests ask for."""
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--enable-metrics"),
        *("--max-total-tokens", "8192"),
        log=tmp_path_factory.mktemp("log") / "roomy.log",
    ) as running:
        yield running


@pytest.fixture(scope="package")
def crowded(
    models: dict[str, Path], scorer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A random model with STEP, in a pool too small for the groups of `tests/server/pruned.py`."""
    with serve(
        models["qwen3"],
        *("--enable-step", "--step-scorer", str(scorer), "--max-total-tokens", str(POOL)),
        # A random model would fill its limit with the white space that JSON allows.
        *("--max-running-requests", "64", "--constrained-json-disable-any-whitespace"),
        *LOG_REQUESTS,
        log=tmp_path_factory.mktemp("log") / "crowded.log",
    ) as running:
        yield running


@pytest.fixture(scope="package")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded reasoner with its scorer, in a pool of 700 tokens."""
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--enable-metrics"),
        *("--max-total-tokens", "700", "--decode-log-interval", "10", *LOG_REQUESTS),
        log=tmp_path_factory.mktemp("log") / "reasoner.log",
    ) as running:
        yield running
