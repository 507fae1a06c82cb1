"""What all tests share: profiles of generated tests, a folder for what is built once, workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# A loaded machine is slow at times, which is no defect. A test's own settings win.
settings.register_profile("step", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# What `make test-all` runs; a test may generate more in it.
settings.register_profile("full", settings.get_profile("step"))
settings.load_profile("step")

# Modules that use a server of tests/server/conftest.py, which is started for one worker only.
SHARED = {
    "test_api.py": "roomy",
    "test_fuzz.py": "roomy",
    "test_warm.py": "roomy",  # whose worker has a warm parent
    "test_features.py": "crowded",
    "test_pruned_choices.py": "crowded",
    "test_baselines.py": "reasoner",
    "test_bench.py": "reasoner",
    "test_metrics.py": "reasoner",
    "test_page.py": "reasoner",
    "test_refill.py": "reasoner",
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all worker processes of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def group_of(test: str) -> str:
    """Which tests run one after the other in one worker: those that share a server or a build.

    By the test's name, as xdist's own groups are marks that it adds to names, which pytest 9.2 does
    not take.
    """
    file, _, name = test.partition("::")
    folder, _, module = file.rpartition("/")
    if folder == "tests/server/answers":  # one server for the package
        return folder
    if folder == "tests/server" and module == "test_pruning.py":  # one for each configuration
        return f"{file}{name.partition('[')[2]}"
    if folder in ("tests/server", "tests/simt"):
        return SHARED.get(module, file)
    return test


class ByGroup(LoadScopeScheduling):
    """Gives the tests of a group to one worker; large groups first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    """Called by xdist, when it is asked for workers."""
    return ByGroup(config, log)
