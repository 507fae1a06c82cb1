"""Every query of deploy/ against a running server: its metrics, and the labels it asks them for."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest
import requests
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from step_sglang.client.launch import free_port
from tests.dashboards import DEPLOY, asked_of, queries, shown
from tests.server.launch import Server
from tests.server.test_page import ask

pytestmark = pytest.mark.server

SCRAPED = {"instance", "job"}  # labels that Prometheus adds
Series = dict[str, list[tuple[dict[str, str], float]]]


def scrape(server: Server) -> Series:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    found: Series = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name].append((sample.labels, sample.value))
    return found


def value(series: Series, name: str, **labels: str) -> float:
    return sum(v for known, v in series[name] if labels.items() <= known.items())


def labels_of(series: Series, pattern: str) -> list[dict[str, str]]:
    known = [samples for name, samples in series.items() if re.fullmatch(pattern, name)]
    return [labels for samples in known for labels, _ in samples]


def vote(server: Server) -> dict[str, int]:
    """What became of the traces of a vote that ends soon after two answers agree."""
    rules = {"traces": 8, "vote": "majority", "early": "posterior", "threshold": 0.4}
    return dict(ask(server, 1, **rules)[0]["meta_info"]["step"]["vote"])


def test_every_query_finds_its_metrics_and_labels(reasoner: Server) -> None:
    before = scrape(reasoner)
    pruned = sum(answer["meta_info"]["step"]["pruned"] for answer in ask(reasoner, 24))
    votes = [vote(reasoner)]
    while not votes[-1]["cancelled"]:
        assert len(votes) < 5, votes
        votes.append(vote(reasoner))
    pruned += sum(one["pruned"] for one in votes)
    until = time.monotonic() + 30
    while value(found := scrape(reasoner), "step_traces_alive"):  # what a vote cancelled ends soon
        assert time.monotonic() < until

    for query in queries():
        for name, labels in asked_of(query).items():
            wanted = {key: want for key, want in labels.items() if key not in SCRAPED}
            assert any(
                all(key in known and want in (None, known[key]) for key, want in wanted.items())
                for known in labels_of(found, name)
            ), (query, name, labels)
    for query, names in shown():
        for label in names - SCRAPED:
            assert all(
                label in known for name in asked_of(query) for known in labels_of(found, name)
            ), (query, label)  # fmt: skip

    def more(name: str, **labels: str) -> float:
        return value(found, name, **labels) - value(before, name, **labels)

    # A cancelled trace may be pruned before it ends.
    assert more("step_traces_pruned_total") >= pruned > 0
    assert more("step_votes_total", status="voted") == more("step_votes_total") == len(votes)
    assert more("step_votes_ended_early_total", rule="posterior") == 1
    assert more("step_votes_ended_early_total", rule="exact") == 0
    # Nothing failed, and yet every place is there: in the scheduler and in the HTTP server.
    places = [known["where"] for known, _ in found["step_failures_total"]]
    assert places.count("scoring") == places.count("page") == 2
    assert value(found, "step_failures_total") == 0


@pytest.mark.full
def test_prometheus_answers_every_query(reasoner: Server, tmp_path: Path) -> None:
    """The real one, which scrapes the server while it prunes and votes."""
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed (Debian's package prometheus has it)")
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "alerts.yml")]
    targets = [reasoner.url.removeprefix("http://")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    file, port = tmp_path / "prometheus.yml", free_port()
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"

    def result(query: str) -> list[dict]:
        answer = requests.get(f"{url}/api/v1/query", {"query": query}, timeout=10).json()
        assert answer["status"] == "success", (query, answer)
        return list(answer["data"]["result"])

    def wait(query: str) -> None:
        """Until it has an answer: a scrape of a busy server may take longer than it is given."""
        until, found = time.monotonic() + 60, []
        while not found:
            assert time.monotonic() < until, (query, (tmp_path / "log").read_text()[-2000:])
            time.sleep(0.5)
            with contextlib.suppress(requests.RequestException):
                found = result(query)

    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(
            [
                prometheus, f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait("count_over_time(step_traces_alive[1m]) > 2")
        ask(reasoner, 24)
        vote(reasoner)
        wait("sum(increase(step_traces_pruned_total[1m])) > 0")
        panels = [query for query, _ in shown() if query not in alerts()]
        assert len(panels) > 15
        for query in panels:
            wait(query)
        rules = requests.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"][0]["rules"]
        assert {rule["query"].count("step_") > 0 for rule in rules} == {True}
        assert {rule["health"] for rule in rules} == {"ok"}
        assert {rule["state"] for rule in rules} == {"inactive"}
    finally:
        running.terminate()
        running.wait(20)


def alerts() -> set[str]:
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
    return {rule["expr"] for rule in rules}
