"""Models for the server tests, built once."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from tests.models import build_model, build_scorer

# A run that is told to end must still stop its servers.
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random model per architecture."""
    root = tmp_path_factory.mktemp("models")
    return {kind: build_model(root / kind, kind) for kind in ("qwen3", "llama", "phi3")}


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random scorer that fits each of them."""
    return build_scorer(tmp_path_factory.mktemp("scorer") / "scorer.safetensors")
