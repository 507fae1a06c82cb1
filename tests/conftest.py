"""What all tests share: profiles of generated tests, a folder for what is built once, groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine is slow at times, which is no defect. A test's own settings win.
settings.register_profile("step", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# What `make test-all` runs; a test may generate more in it.
settings.register_profile("full", settings.get_profile("step"))
settings.load_profile("step")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all worker processes of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a fixture, such as a server, run one after the other in one process."""
    for item in items:
        group = _group(item)
        if group is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str | None:
    """The widest fixture of its package or module that a test uses; None if it uses none."""
    if not isinstance(item, pytest.Function):
        return None
    known = item._fixtureinfo.name2fixturedefs
    for scope in ("package", "module"):
        for name in item.fixturenames:
            for definition in known.get(name, ()):
                if definition.scope == scope:
                    params = item.callspec.params if hasattr(item, "callspec") else {}
                    # No bracket: xdist looks for a group's name behind the last one.
                    return f"{definition.baseid}:{name}:{params.get(name, '')}"
    return None
