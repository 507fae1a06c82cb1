"""The files of deploy/ agree with each other, with the package and with the programs they start."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from step_sglang.config import add_cli_arguments

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAGES = re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE)


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"])


def resources() -> dict[tuple[str, str], dict[str, Any]]:
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def pod(kind: str, name: str) -> dict[str, Any]:
    return dict(resources()[kind, name]["spec"]["template"])


def container(kind: str, name: str) -> dict[str, Any]:
    (only,) = pod(kind, name)["spec"]["containers"]
    return dict(only)


WORKERS = [
    compose()["worker-0"]["command"],
    compose()["worker-1"]["command"],
    container("StatefulSet", "step-worker")["args"],
]
ROUTERS = [compose()["router"]["command"], container("Deployment", "step-router")["args"]]


def flags(command: list[str]) -> dict[str, str]:
    return dict(word.partition("=")[::2] for word in command if word.startswith("--"))


def router_flags(package: str) -> argparse.ArgumentParser:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no router: pip install {package.replace('_', '-')}")
    parser = argparse.ArgumentParser()
    importlib.import_module(f"{package}.router_args").RouterArgs.add_cli_args(parser)
    return parser


def test_workers_are_started_with_flags_that_exist() -> None:
    parser = argparse.ArgumentParser()
    add_cli_arguments(parser)
    ours = {name for action in parser._actions for name in action.option_strings}
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    srt = Path(spec.submodule_search_locations[0]) / "srt"
    engine = {  # fields of its arguments, wherever it declares them; importing it takes long
        "--" + node.target.id.replace("_", "-")
        for source in [srt / "server_args.py", *(srt / "arg_groups").rglob("*.py")]
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for command in WORKERS:
        assert {"--enable-step", "--step-scorer", "--enable-metrics"} <= set(flags(command))
        assert set(flags(command)) <= ours | engine
        # A container is reached from outside, at the port that all of the files name.
        assert flags(command)["--host"] == "0.0.0.0"


def test_routers_are_started_with_flags_that_exist() -> None:
    parser = router_flags("smg")
    for command in ROUTERS:
        known = vars(parser.parse_args(command))
        assert known["policy"] == "consistent_hashing"
        assert len(known["worker_urls"]) == 2
        assert "smg==" in DOCKERFILE and '"smg.launch_router"' in DOCKERFILE


def test_sglang_router_takes_the_policy_that_the_docs_name() -> None:
    assert router_flags("sglang_router").parse_args(["--policy", "manual"]).policy == "manual"


def test_versions() -> None:
    version = PROJECT["project"]["version"]
    (engine,) = [one for one in PROJECT["project"]["dependencies"] if one.startswith("sglang>")]
    assert (
        re.search(r"^ARG SGLANG_VERSION=(.+)$", DOCKERFILE, re.MULTILINE)[1]
        == (engine.rpartition("=")[2])
    )
    images = [service["image"] for service in compose().values()]
    images += [container("StatefulSet", "step-worker")["image"]]
    images += [container("Deployment", "step-router")["image"]]
    assert {image.rpartition(":")[2] for image in images} == {version}
    assert {image.rpartition(":")[0] for image in images} == {"step-sglang", "step-sglang-router"}
    texts = [DOCKERFILE, (DEPLOY / "README.md").read_text()]
    for text in texts:
        assert set(re.findall(r"step-sglang(?:-router)?:([\d.]+\d)", text)) == {version}


def test_ports_agree() -> None:
    services = resources()
    worker, router = container("StatefulSet", "step-worker"), container("Deployment", "step-router")
    ports = {flags(command)["--port"] for command in WORKERS + ROUTERS}
    metrics = {flags(command)["--prometheus-port"] for command in ROUTERS}
    assert len(ports) == len(metrics) == 1
    port, of_metrics = int(*ports), int(*metrics)
    exposed = re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.MULTILINE)
    assert sorted(exposed) == [f"{port}", f"{port} {of_metrics}"]
    assert worker["ports"] == [{"name": "http", "containerPort": port}]
    assert [one["containerPort"] for one in router["ports"]] == [port, of_metrics]
    for name in ("step-worker", "step-router"):
        assert [one["port"] for one in services["Service", name]["spec"]["ports"]] == [port]
    for command in ROUTERS:
        assert all(word.endswith(f":{port}") for word in command if word.startswith("http:"))
    for template, scraped in (
        (pod("StatefulSet", "step-worker"), port), (pod("Deployment", "step-router"), of_metrics),
    ):  # fmt: skip
        assert template["metadata"]["annotations"]["prometheus.io/port"] == str(scraped)
    for one in (worker, router):
        probes = [one[name] for name in one if name.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
    assert compose()["router"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    for name in ("worker-0", "worker-1"):
        assert f"http://127.0.0.1:{port}/health_generate" in compose()[name]["healthcheck"]["test"]
    scraped = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = scraped[0]["static_configs"][0]["targets"]
    assert all(target.endswith(f":{port}") for target in targets)


def test_the_router_names_the_workers_that_there_are() -> None:
    named, routed = ROUTERS
    assert [word for word in named if word.startswith("http:")] == [
        f"http://{name}:30000" for name in compose() if name.startswith("worker-")
    ]
    workers = resources()["StatefulSet", "step-worker"]["spec"]
    assert workers["serviceName"] == "step-worker"
    assert [word for word in routed if word.startswith("http:")] == [
        f"http://step-worker-{i}.{workers['serviceName']}:30000" for i in range(workers["replicas"])
    ]
    for name in ("step-worker", "step-router"):
        kind = "StatefulSet" if name == "step-worker" else "Deployment"
        labels = pod(kind, name)["metadata"]["labels"]
        assert resources()[kind, name]["spec"]["selector"]["matchLabels"] == labels
        assert resources()["Service", name]["spec"]["selector"] == labels
    gpus = [compose()[f"worker-{i}"]["deploy"]["resources"] for i in range(2)]
    assert [one["reservations"]["devices"][0]["device_ids"] for one in gpus] == [["0"], ["1"]]


def test_probes_wait_longer_than_sglang_takes() -> None:
    """Its two health paths answer after a second at least, and after 20 at most."""
    worker = container("StatefulSet", "step-worker")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert worker[name]["timeoutSeconds"] > 20
        assert worker[name]["httpGet"]["path"] in ("/health", "/health_generate")
    assert worker["readinessProbe"]["httpGet"]["path"] == "/health_generate"


def test_nothing_runs_as_root() -> None:
    users = re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)
    assert len(users) == len(STAGES) - 1 and len(set(users)) == 1  # the build stage is thrown away
    for kind, name in (("StatefulSet", "step-worker"), ("Deployment", "step-router")):
        context = pod(kind, name)["spec"]["securityContext"]
        assert context["runAsNonRoot"] and str(context["runAsUser"]) == users[0]
    assert f"useradd --uid {users[0]}" in DOCKERFILE


def test_the_image_gets_all_that_it_is_built_from() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert sent[0] == "*"
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in sent
        assert not any(fnmatch.fnmatch(source, one) for one in sent[1:] if one[0] != "!")
    folders = {
        value.split("/")[0] for value in PROJECT["tool"]["setuptools"]["package-dir"].values()
    }
    named = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert folders | named | {"pyproject.toml", "setup.py", "MANIFEST.in"} == set(copied)
    targets = {service["build"]["target"] for service in compose().values() if "build" in service}
    assert targets == set(STAGES) - {"build"}
    for service in compose().values():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_no_secret_is_written_down() -> None:
    for file in DEPLOY.rglob("*"):
        if file.is_file():
            assert not re.search(r"hf_[A-Za-z0-9]{8}|(?i:password|api[-_]?key)\s*[:=]\s*['\"\w]",
                                 file.read_text()), file  # fmt: skip
