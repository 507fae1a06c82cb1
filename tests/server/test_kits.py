"""What SGLang's own test kits find in order on a stock server, they find in order with STEP.

The kits are imported late: they import most of SGLang, for which every run of tests would pay.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.models import build_model

if TYPE_CHECKING:
    from tests.server.kits.catalogue import Setup
    from tests.server.kits.runner import Outcomes

pytestmark = pytest.mark.server

SETUPS = ("main", "waiting timeout", "running timeout", "abort leak")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary has every token id that the kits draw, its context all that they ask for."""
    return build_model(tmp_path_factory.mktemp("kits") / "model", vocab=32064, context=131072)


def compare(setup: Setup, model: Path, scorer: Path, folder: Path, *, quick: bool) -> Outcomes:
    """Run stock, then with STEP, then with STEP and every request a trace."""
    from tests.server.kits.runner import kit_server, run_kits, traces_ended

    with kit_server(setup, model, folder / "stock.log") as server:
        stock = run_kits(setup, server, model, quick=quick)
    for name, reason in stock.items():
        print(f"{name}: {f'fails on stock: {reason}' if reason else 'passes on stock'}")
    passed = frozenset(name for name, reason in stock.items() if not reason)
    with kit_server(setup, model, folder / "step.log", scorer) as server:
        run = partial(run_kits, setup, server, model, only=passed, attempts=1 if quick else 3)
        assert run() == dict.fromkeys(passed, "")
        before = traces_ended(server)  # of kits that ask for n > 1 by themselves
        assert run(traces=True) == dict.fromkeys(passed, "")
        assert traces_ended(server) > before
    return stock


@pytest.mark.full
def test_quick_kits(model: Path, scorer: Path, tmp_path: Path) -> None:
    from tests.server.kits.catalogue import MAIN

    stock = compare(MAIN, model, scorer, tmp_path, quick=True)
    # All of them were chosen because they pass here.
    assert not any(stock.values()), stock


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", SETUPS)
def test_all_kits(model: Path, scorer: Path, tmp_path: Path, name: str) -> None:
    from tests.server.kits.catalogue import MAIN, OTHERS

    setups = {"main": MAIN, **OTHERS}
    assert tuple(setups) == SETUPS
    stock = compare(setups[name], model, scorer, tmp_path, quick=False)
    assert not all(stock.values()), "none passes on stock"
