"""Harnesses and typed clients that others wrote: docs/clients.md as it stands, and its table.

They want versions of packages that SGLang does not, so each runs in an environment of its own:
`STEP_TEST_CLIENTS` names the interpreters, with ":" between. A client that is in none of them is
skipped, and so is what needs the harness's command beside its interpreter.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from step_sglang.reasoner import model_path, scorer_path
from tests.server.launch import Server, serve
from tests.server.pruned import nothing_is_left

pytestmark = [pytest.mark.server, pytest.mark.full]

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
PROGRAMS = Path(__file__).with_name("client_programs.py")
URL = "http://127.0.0.1:30000"
POOL = 700  # KV tokens
PATHS = [path for path in os.environ.get("STEP_TEST_CLIENTS", "").split(os.pathsep) if path]


@functools.cache
def interpreter(package: str) -> str:
    """Of an environment that has a package; skips without one."""
    for path in (*PATHS, sys.executable):
        found = subprocess.run([path, "-c", f"import {package}"], capture_output=True, check=False)
        if found.returncode == 0:
            return path
    pytest.skip(
        f"{package} is in no environment: install it into one of its own, and name that one's "
        "interpreter in STEP_TEST_CLIENTS"
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        model_path(),
        *("--enable-step", "--step-scorer", str(scorer_path()), "--max-total-tokens", str(POOL)),
        *("--step-traces", "4", "--max-running-requests", "64"),
        # It would fill its limit with the white space that JSON allows.
        "--constrained-json-disable-any-whitespace",
        log=tmp_path_factory.mktemp("log") / "clients.log",
    ) as running:
        yield running
        nothing_is_left(running, POOL)


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return found


def block(language: str, words: str) -> str:
    (found,) = [text for text in blocks(language) if words in text]
    return found


ALONE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else it asks the network for prices


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, **ALONE, "HOME": str(folder), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def here(text: str, server: Server) -> str:
    """A snippet for this server, with fewer traces."""
    assert URL in text
    return text.replace(URL, server.url).replace('"traces": 64', '"traces": 4')


@pytest.mark.parametrize("package", ["inspect_ai", "litellm", "langchain_openai"])
def test_recipes(server: Server, tmp_path: Path, package: str) -> None:
    python = interpreter(package)
    run(["bash", "-c", block("bash", "questions.jsonl")], tmp_path)
    program = here(block("python", f" {package}"), server)
    shown = run([python, "-c", program], tmp_path)
    if package == "inspect_ai":
        assert re.fullmatch(r"success [01]\.[05]*", shown.splitlines()[-1]), shown
    else:
        assert "stop" in shown and "boxed{" in shown, shown
    if package == "litellm":
        assert shown.startswith("1 stop"), shown


def test_lm_eval(server: Server, tmp_path: Path) -> None:
    command = Path(interpreter("lm_eval")).with_name("lm_eval")
    run(["bash", "-c", block("bash", "questions.jsonl")], tmp_path)
    (tmp_path / "reasoner.yaml").write_text(block("yaml", "task: reasoner"))
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    run(["bash", "-euc", here(block("bash", "lm_eval"), server)], tmp_path, PATH=path)
    (file,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(file.read_text())["results"]["reasoner"]["exact_match,boxed"]
    assert accuracy in (0.0, 0.5, 1.0)


N = 24


@pytest.mark.parametrize("package", ["openai", "litellm", "langchain_openai"])
def test_what_clients_make_of_pruned_choices(server: Server, tmp_path: Path, package: str) -> None:
    """The page's table."""
    programs = {
        "openai": ("openai_strict", "openai_parse"),
        "litellm": ("litellm_completion", "litellm_text", "litellm_stream", "litellm_parse"),
        "langchain_openai": ("langchain_generate", "langchain_structured"),
    }[package]
    # Strict, newer versions than SGLang's refuse what SGLang says of its weights in every answer.
    python = sys.executable if package == "openai" else interpreter(package)
    shown = run([python, str(PROGRAMS), f"{server.url}/v1", *programs], tmp_path)
    said: dict[str, dict[str, dict[str, Any]]] = json.loads(shown.splitlines()[-1])
    print(json.dumps(said, indent=1))
    for program, modes in said.items():
        # `omit` cures whatever chokes: fewer choices, and each of them whole.
        omitted = modes["omit"]
        assert "raises" not in omitted, (program, omitted)
        assert 0 < omitted.get("choices", 1) < N
        assert omitted.get("reasons", ["stop"]) == ["stop"]
        assert omitted.get("whole", omitted.get("choices")) == omitted.get("choices", 1)
        if program not in ("openai_parse", "langchain_structured"):
            # `length` returns every choice, also those that do not parse.
            length = modes["length"]
            assert length["choices"] == N and "raises" not in length, (program, length)
            assert length.get("reasons", ["length", "stop"]) == ["length", "stop"]
            assert length.get("whole", 1) < N
