"""What the dashboard and the alerts of deploy/ ask Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

DEPLOY = Path(__file__).parents[1] / "deploy"
# Words of PromQL that stand where a metric could.
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset", "group_left"}
# For one of several names; SGLang's change with the version of Prometheus that scrapes them.
_NAMED = re.compile(r"\{__name__=~\"([^\"]+)\"\}")
_GROUPING = re.compile(r"\bby\s*\(([^)]*)\)")
_METRIC = re.compile(r"(?<![\w:\[.$])([a-zA-Z_][\w:]*)\s*(\{[^}]*\})?(?!\s*\(|[\w:])")
_MATCHER = re.compile(r"(\w+)\s*(=~|!~|!=|=)\s*\"([^\"]*)\"")


def _panels() -> list[dict[str, Any]]:
    return list(json.loads((DEPLOY / "grafana" / "step.json").read_text())["panels"])


def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """Every expression."""
    asked = [target["expr"] for panel in _panels() for target in panel["targets"]]
    return asked + [rule["expr"] for rule in _rules()]


def shown() -> list[tuple[str, set[str]]]:
    """Every expression that a text stands beside, and the labels that the text shows."""
    texts = [
        (target["expr"], re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for panel in _panels()
        for target in panel["targets"]
    ]
    texts += [
        (rule["expr"], re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        for rule in _rules()
    ]
    return [(query, set(labels)) for query, labels in texts]


def asked_of(query: str) -> dict[str, dict[str, str | None]]:
    """The metrics of an expression, by name or pattern, and of each the labels that it must have.

    With the value where a matcher wants one, else with None.
    """
    grouped = [
        label.strip() for text in _GROUPING.findall(query) for label in text.split(",") if label
    ]
    found: dict[str, dict[str, str | None]] = {name: {} for name in _NAMED.findall(query)}
    for name, matchers in _METRIC.findall(_NAMED.sub("", _GROUPING.sub("", query))):
        if name in WORDS:
            continue
        labels = found.setdefault(name, {})
        for label, operator, value in _MATCHER.findall(matchers):
            labels[label] = value if operator == "=" else None
        for label in grouped:
            labels.setdefault(label, None)
    return found
