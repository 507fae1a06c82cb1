"""The dashboard and the alerts ask for metrics that exist; promtool reads and tries what it can.

`server/test_metrics.py` asks a real server, of labels too.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from step_sglang import protocol
from tests.dashboards import DEPLOY, asked_of, queries

# One process each, as a server has: both count failures.
EXPORTED = """
import json
from prometheus_client import REGISTRY
from step_sglang.{0} import {1}
before = set(REGISTRY._names_to_collectors)
{1}({{"model_name": "m"}})
names = set(REGISTRY._names_to_collectors) - before
series = [[s.name, s.labels, s.value] for f in REGISTRY.collect() for s in f.samples]
print(json.dumps([sorted(names), [s for s in series if s[0] in names]]))
"""


Series = tuple[tuple[str, dict[str, str], float], ...]


@functools.cache
def exported(module: str, name: str) -> tuple[frozenset[str], Series]:
    """Names of the metrics, and every series."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORTED.format(module, name)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names, series = json.loads(done.stdout)
    return frozenset(names), tuple(tuple(one) for one in series)


def test_every_metric_of_a_query_is_exported() -> None:
    known = exported("pruning.metrics", "StepMetrics")[0]
    known = known | exported("voting.metrics", "VoteMetrics")[0]
    asked = {name for query in queries() for name in asked_of(query) if name.startswith("step_")}
    assert len(asked) > 15
    assert asked <= known


def words(prefix: str) -> set[str]:
    return {value for name, value in vars(protocol).items() if name.startswith(prefix)}


def test_every_series_begins_at_0() -> None:
    """One that appears with its first event is no increase to anybody."""
    found = exported("pruning.metrics", "StepMetrics")[1]
    found = found + exported("voting.metrics", "VoteMetrics")[1]
    found = found + exported("gathering.metrics", "GatheringMetrics")[1]
    for name, label, values in (
        ("step_failures_total", "where", words("IN_")),
        ("step_traces_pruned_total", "reason", words("PRUNED_FOR_")),
        ("step_branches_total", "reason", words("BRANCHED_FOR_")),
        ("step_waiting_seconds_count", "kind", {"step", "other"}),
        ("step_groups_sampled_total", "fate", {"begun", "stored", "unvoted", "lost"}),
        ("step_votes_total", "status", {"voted", "no_answer", "no_finished_trace"}),
        ("step_votes_ended_early_total", "rule", set(protocol.EARLY_RULES) - {"off"}),
    ):
        series = {labels[label]: value for known, labels, value in found if known == name}
        assert series == dict.fromkeys(values, 0.0), name


def test_what_a_query_asks_for() -> None:
    assert asked_of('sum by (le, kind) (rate(a_bucket{x="1", y=~"2|3"}[5m])) / b > bool 3') == {
        "a_bucket": {"x": "1", "y": None, "le": None, "kind": None},
        "b": {"le": None, "kind": None},
    }
    assert asked_of("min_over_time(a[10m]) > 0 and sglang:b == 0 or max(c offset 5m)") == {
        "a": {}, "sglang:b": {}, "c": {},
    }  # fmt: skip
    assert asked_of('{__name__=~"x[:_]y"} > d') == {"x[:_]y": {}, "d": {}}


def test_promtool_accepts_the_rules_and_queries(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus has it)")
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries())]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    for command in (
        ["check", "config", str(DEPLOY / "prometheus.yml")],
        ["check", "rules", str(file)],
        ["test", "rules", str(Path(__file__).with_name("alerts.yml"))],
    ):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
