"""Judging an SGLang that is not installed, by its files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import sglang

from step_sglang import check
from step_sglang.patches import contract, engine_check
from step_sglang.patches.reader import Installed, MissingError
from step_sglang.patches.unpacked import Unpacked

SITE = Path(sglang.__path__[0]).parent

FILES = {
    "__init__.py": "",
    "version.py": "",
    "base.py": """
from dataclasses import dataclass
from typing import ClassVar


class Base:
    kept: int = 0

    def __init__(self, first, *rest, named=1, **more):
        self.set_here: int = first
        self.one, self.two = rest

    def inherited(self, a, /, b):
        pass


@dataclass
class Record:
    first: int
    second: str = ""
    shared: ClassVar[int] = 1
""",
    "inner/__init__.py": "from .far import *\nfrom sglang.base import Base as Renamed\n",
    "inner/far.py": """
import time
from ..base import Base, Record


class Derived(Base):
    @staticmethod
    def own(x):
        return x


class Wrapped:
    def run(self):
        pass


Wrapped = decorate(Wrapped)
made = Derived(1)
if True:
    def conditional(x):
        pass
else:
    other = 1
""",
}


@pytest.fixture(params=["wheel", "folder"])
def fake(request: pytest.FixtureRequest, tmp_path: Path) -> Unpacked:
    if request.param == "wheel":
        path = tmp_path / "sglang-9.9.9-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in FILES.items():
                wheel.writestr(f"sglang/{name}", text)
        return Unpacked(path)
    for name, text in FILES.items():
        file = tmp_path / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "sglang-9.9.9.dist-info").mkdir()
    return Unpacked(tmp_path)


def test_names_are_followed_to_their_definitions(fake: Unpacked) -> None:
    assert fake.version() == "9.9.9"
    expected = {
        "sglang.base.Base": ("first", "rest", "named", "more"),
        "sglang.base.Record": ("first", "second"),
        "sglang.inner.far.Derived.own": ("x",),
        "sglang.inner.far.Derived.inherited": ("self", "a", "b"),
        "sglang.inner.Derived.inherited": ("self", "a", "b"),  # by `import *`
        "sglang.inner.Renamed.inherited": ("self", "a", "b"),
        "sglang.inner.far.made.own": ("x",),  # an instance
        "sglang.inner.far.Wrapped.run": ("self",),
        "sglang.inner.far.conditional": ("x",),
    }
    assert {path: fake.parameters(path) for path in expected} == expected
    for path in ("sglang.inner.far.time.perf_counter", "sglang.inner.far.other", "sglang.inner"):
        fake.has(path)
    assert {"kept", "set_here", "one", "inherited", "own"} <= fake.declared(
        "sglang.inner.far.Derived"
    )


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("sglang.base.None_", "module 'sglang.base' has no 'None_'"),
        ("sglang.base.Base.none", "class 'Base' has no 'none'"),
        ("sglang.nowhere.Base", "module 'sglang' has no 'nowhere'"),
        ("elsewhere.Base", "no module elsewhere.Base"),
        ("sglang.base.Base.kept", "is not callable"),
    ],
)
def test_what_is_missing_is_named(fake: Unpacked, path: str, says: str) -> None:
    with pytest.raises(MissingError, match=says):
        fake.parameters(path)


def test_the_files_of_the_installed_one_say_the_same_as_itself() -> None:
    files, itself = Unpacked(SITE), Installed()
    assert files.version() == itself.version()
    assert contract.inspect_targets(reader=files) == contract.inspect_targets(reader=itself)
    assert engine_check.differences(files) == engine_check.differences(itself) == []
    for body in engine_check.BODIES:
        assert files.digest(body.path) == itself.digest(body.path)


def test_a_wheel_that_differs_is_a_table(
    fake: Unpacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = next(tmp_path.glob("*.whl"), tmp_path)
    assert check.main(["--wheel", str(wheel)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("SGLang 9.9.9, by its files:")
    row = next(line for line in said.splitlines() if "ServerArgs.add_cli_args" in line)
    assert row.split()[0] == "absent" and "(parser)" in row and "missing" in row
    assert "0.5.22 or 0.5.23" in said and "STEP refuses to start on it" in said


def test_the_installed_one_passes_as_a_wheel_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--wheel", str(SITE)]) == 0
    assert "0 do not\nas tested" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.whl", None, "none.whl does not exist"),
        ("text.whl", b"text", "text.whl is not a wheel"),
        ("empty", b"", "is not a wheel"),
    ],
)
def test_bad_files_are_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    says: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert check.main(["--wheel", str(tmp_path / name)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and says in said.err


def test_a_release_that_does_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nor is anything looked up
    assert check.main(["--version", "0.0.0"]) == 1
    assert "step-sglang: pip cannot download sglang==0.0.0: ERROR: No matching" in (
        capsys.readouterr().err
    )
