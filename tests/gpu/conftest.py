"""``--require-all``: a run that skipped something, or ran nothing, has proved nothing.

Tests that need more devices than there are (``DEVICES`` of their module) are deselected.
"""

from __future__ import annotations

import pytest
import torch

_OPTION = "--require-all"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, action="store_true", help="fail where a test was skipped or none ran")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    there = max(1, torch.cuda.device_count())
    module = pytest.Module
    needs = {
        item: getattr(getattr(item.getparent(module), "obj", None), "DEVICES", 1) for item in items
    }
    config.hook.pytest_deselected(items=[item for item in items if needs[item] > there])
    items[:] = [item for item in items if needs[item] <= there]


def _counts(config: pytest.Config) -> tuple[int, int]:
    """Tests that passed, and that were skipped."""
    stats = config.pluginmanager.get_plugin("terminalreporter").stats
    return len(stats.get("passed", ())), len(stats.get("skipped", ()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption(_OPTION, default=False):
        return
    passed, skipped = _counts(session.config)
    if (skipped or not passed) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    passed, skipped = _counts(config)
    if config.getoption(_OPTION, default=False) and (skipped or not passed):
        terminalreporter.write_line(
            f"{_OPTION}: {passed} tests passed and {skipped} were skipped, so this proves nothing: "
            "it needs a CUDA device and the CUDA library (STEP_CUDA=1 pip install "
            "--no-build-isolation -e .)",
            red=True,
        )
