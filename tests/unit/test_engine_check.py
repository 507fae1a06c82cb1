"""What is compared of the installed SGLang besides signatures, and that each kind is found."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest

from step_sglang import protocol
from step_sglang.errors import ConfigError
from step_sglang.patches import engine_check, flags
from step_sglang.patches.engine_check import Body
from step_sglang.patches.reader import declared, digest


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "step_cpu")
    monkeypatch.delenv(protocol.UNTESTED_ENV, raising=False)


def test_the_installed_one_is_as_tested() -> None:
    assert engine_check.differences() == []
    flags._check_engine()


def test_another_version_needs_the_operators_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sglang.version

    monkeypatch.setattr(sglang.version, "__version__", "0.5.24")
    with pytest.raises(ConfigError) as caught:
        flags._check_engine()
    assert "expected: 0.5.22 or 0.5.23\n  found:    0.5.24" in str(caught.value)
    assert "start with STEP_UNTESTED_SGLANG=1" in str(caught.value)
    monkeypatch.setenv(protocol.UNTESTED_ENV, "1")
    flags._check_engine()
    assert "not tested with" in caplog.text and "0.5.24" in caplog.text


def test_a_field_that_is_gone_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        engine_check,
        "FIELDS",
        {
            "sglang.srt.managers.schedule_batch.Req": ("kv", "to_finish_later"),
            "sglang.srt.managers.schedule_batch.NoSuchClass": ("x",),
        },
    )
    monkeypatch.setenv(protocol.UNTESTED_ENV, "1")
    with pytest.raises(ConfigError) as caught:
        flags._check_engine()
    assert "Req\n  expected: kv, to_finish_later\n  found:    no to_finish_later" in str(
        caught.value
    )
    assert "NoSuchClass" in str(caught.value) and "missing (" in str(caught.value)
    assert protocol.UNTESTED_ENV not in str(caught.value)


def test_a_body_that_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine_check.BODIES
    monkeypatch.setattr(
        engine_check,
        "BODIES",
        (
            *before[1:],
            Body(before[0].path, ("0" * 16,), "it is"),
            Body("sglang.none", (), "is not"),
        ),
    )
    changed, missing = engine_check.differences()
    assert before[0].path in changed.what and "trusted because it is" in changed.what
    assert changed.found in before[0].digests and not changed.fatal
    assert "missing (" in missing.found


def test_a_body_is_compared_word_by_word() -> None:
    class Outer:
        def one(self) -> int:
            return 1

        def two(self) -> int:
            return 2

    def one(self: object) -> int:
        return 1

    def text(function: object) -> str:
        return digest(inspect.getsource(function))  # type: ignore[arg-type]

    assert text(Outer.one) != text(Outer.two)
    assert text(one) != text(Outer.one)  # annotated otherwise
    assert text(Outer.one) == text(Outer().one)


def test_names_that_methods_set_count_as_fields() -> None:
    assert {"kv", "to_finish", "prefix_len", "output_ids"} <= declared(
        __import__("sglang.srt.managers.schedule_batch", fromlist=["Req"]).Req
    )
    assert "nonsense" not in declared(SimpleNamespace)
