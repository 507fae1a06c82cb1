"""The CUDA library that a server builds at its first start: the real compiler, no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from step_sglang import protocol
from step_sglang.errors import ConfigError
from step_sglang.patches import preflight
from step_sglang.scoring import build, first_build, op
from step_sglang.scoring.build import BuildError
from tests.toolkits import make_toolkit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STEP_BUILD", raising=False)
    monkeypatch.setenv("STEP_CUDA_ARCHS", "90")
    return tmp_path / "cache"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit whose compiler takes a second, counts its runs and writes an empty object."""
    home = make_toolkit(tmp_path / "cuda with $pace")
    nvcc = home / "bin/nvcc"
    nvcc.write_text(
        nvcc.read_text().replace(
            "*) exit 1",
            f"*) sleep 1; echo run >> '{tmp_path}/runs'\n"
            'while [ "$1" != -o ]; do shift; done; echo | gcc -x c -c -fPIC - -o "$2"',
        )
    )
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def test_it_is_built_once_and_found_again(cache: Path, stand_in: Path, tmp_path: Path) -> None:
    said: list[str] = []
    library = first_build.cuda_library(said.append)
    assert library.is_file() and cache in library.parents
    assert len(said) == 2
    assert "for sm_90 with nvcc 13.0, once" in said[0] and str(library) in said[1]
    assert first_build.cuda_library(said.append) == library
    assert len(said) == 2 and (tmp_path / "runs").read_text() == "run\n"
    assert [path.name for path in library.parent.iterdir() if path.is_dir()] == []


def test_processes_that_start_together_build_once(
    cache: Path, stand_in: Path, tmp_path: Path
) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(first_build.cuda_library(lambda line: None)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert (tmp_path / "runs").read_text() == "run\n"


def test_what_a_kill_left_of_a_build_is_in_nobodys_way(cache: Path, stand_in: Path) -> None:
    """In a container every process that starts has the same id."""
    library = first_build.cuda_library(lambda line: None)
    library.unlink()
    for name in (f"work-{os.getpid()}", "work-1"):
        (library.parent / name).mkdir()
        (library.parent / name / "build.ninja").write_text("half")
    assert first_build.cuda_library(lambda line: None) == library and library.is_file()
    assert [path.name for path in library.parent.iterdir() if path.is_dir()] == []


def test_a_full_disk_is_one_sentence(
    cache: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(first_build.tempfile, "mkdtemp", full)
    with pytest.raises(BuildError, match=r"cannot be built in .*No space left on device"):
        first_build.cuda_library(lambda line: None)


def test_other_architectures_are_another_library(
    cache: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = first_build.cuda_library(lambda line: None)
    monkeypatch.setenv("STEP_CUDA_ARCHS", "80;90")
    assert first_build.cuda_library(lambda line: None) != first


def test_it_may_be_forbidden(cache: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP_BUILD", "0")
    with pytest.raises(BuildError) as caught:
        first_build.cuda_library(lambda line: None)
    assert f"CUDA_HOME={stand_in} STEP_CUDA=1 {sys.executable} -m pip install" in str(caught.value)
    assert not cache.exists()


def test_a_compiler_that_fails_is_quoted(cache: Path, stand_in: Path) -> None:
    nvcc = stand_in / "bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace("*) sleep", "*) echo no such luck >&2; exit 3; sleep"))
    with pytest.raises(BuildError, match=r"(?s)does not build.*no such luck.*By hand"):
        first_build.cuda_library(lambda line: None)
    assert not list(cache.rglob("*.so")) and not list(cache.rglob("work*"))


def test_a_cache_that_cannot_be_written(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="Set STEP_CACHE to a folder that can be written"):
        first_build.cuda_library(lambda line: None)


def test_without_a_toolkit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_toolkit", lambda: None)
    with pytest.raises(BuildError, match="no CUDA toolkit to build"):
        first_build.cuda_library(lambda line: None)


def test_rocm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="ROCm is not supported"):
        preflight._check_op("cuda")


def test_a_server_builds_it_and_tells_its_schedulers(
    cache: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    monkeypatch.setattr(op, "has_cuda", lambda: False)
    monkeypatch.setattr(op, "load_cuda", loaded.append)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv(protocol.CUDA_LIBRARY_ENV, "")
    monkeypatch.setenv("STEP_BUILD", "0")
    with pytest.raises(ConfigError, match="STEP_BUILD=0 forbids to"):
        preflight._check_op("cuda")
    monkeypatch.delenv("STEP_BUILD")
    preflight._check_op("cuda")
    (library,) = loaded
    assert library.is_file() and os.environ[protocol.CUDA_LIBRARY_ENV] == str(library)


START = """
import logging, os
logging.basicConfig(format="%(message)s")
from step_sglang import protocol
from step_sglang.patches import preflight
from step_sglang.scoring import op

assert not op.has_cuda()
try:
    preflight._check_op("cuda")
except ValueError as error:
    raise SystemExit(str(error))
assert op.has_cuda()
print(os.environ[protocol.CUDA_LIBRARY_ENV])
"""
BROUGHT = next((home for home in build._homes() if home.parts[-2:] == ("nvidia", "cu13")), None)


def start(**env: str) -> subprocess.Popen[str]:
    """A server's check before it launches anything, in an installation without CUDA library."""
    env = {**os.environ, protocol.CUDA_LIBRARY_ENV: "/nowhere", "CUDA_HOME": str(BROUGHT), **env}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", START],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    BROUGHT is None or torch.version.cuda is None, reason="needs the toolkit that SGLang brings"
)
def test_servers_build_the_real_library_once(cache: Path) -> None:
    """With the nvcc of the environment; two servers that start together, one that comes later."""
    refused = start(STEP_BUILD="0")
    assert "STEP_BUILD=0 forbids to" in refused.communicate()[1] and refused.returncode == 1
    both = [start() for _ in range(2)]
    said = [server.communicate() for server in both]
    assert [server.returncode for server in both] == [0, 0], said
    assert said[0][0] == said[1][0] and str(cache) in said[0][0]
    words = said[0][1] + said[1][1]
    assert words.count("STEP builds its CUDA op for sm_90 with nvcc 13") == 1
    assert words.count("STEP built its CUDA op in ") == 1
    later = start()
    found, words = later.communicate()
    assert found == said[0][0] and "STEP buil" not in words
    loaded = (
        "from step_sglang.scoring import op; "
        "assert op.has_cuda() and str(op.library('cuda')[0]) == op.os.environ["
        f"{protocol.CUDA_LIBRARY_ENV!r}]"
    )
    env = {**os.environ, protocol.CUDA_LIBRARY_ENV: found.strip()}
    subprocess.run([sys.executable, "-c", loaded], check=True, env=env)
