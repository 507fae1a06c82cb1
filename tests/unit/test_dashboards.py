"""The dashboard and the alerts ask for metrics that exist; promtool reads what it can."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

DEPLOY = Path(__file__).parents[2] / "deploy"
EXPORTED = """
from prometheus_client import REGISTRY
from step_sglang.pruning import metrics
before = set(REGISTRY._names_to_collectors)
metrics.StepMetrics({"model_name": "m"})
print(*(set(REGISTRY._names_to_collectors) - before))
"""


def queries() -> list[str]:
    board = json.loads((DEPLOY / "grafana" / "step.json").read_text())
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]] + [
        rule["expr"] for group in rules for rule in group["rules"]
    ]


def test_every_metric_of_a_query_is_exported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXPORTED], capture_output=True, text=True, check=True
    )
    exported = set(done.stdout.split())
    asked = {name for query in queries() for name in re.findall(r"\bstep_\w+", query)}
    assert len(asked) > 10
    assert asked <= exported


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
    ):
        done = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
