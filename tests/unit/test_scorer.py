"""Scorer files: round trips, the reference's layouts, and everything that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from step_sglang.errors import ScorerError
from step_sglang.scoring.scorer import Scorer, ScorerInfo, load_scorer, save_scorer

D = 24


def tensors(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {
        "w1": torch.randn(512, D),
        "b1": torch.randn(512),
        "w2": torch.randn(512),
        "b2": torch.randn(1),
    }
    return {**made, **changed}


def write(path: Path, made: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(made, path, {"format": "step-sglang-scorer", "version": "1", **metadata})
    return path


def reference_state() -> dict[str, torch.Tensor]:
    made = tensors()
    return {
        "net.0.weight": made["w1"],
        "net.0.bias": made["b1"],
        "net.2.weight": made["w2"].reshape(1, 512),
        "net.2.bias": made["b2"],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    info = ScorerInfo("some/model", ("\n\n", "##"), "</think>", {"auc": 0.8, "steps": 12})
    made = tensors()
    scorer = Scorer(made["w1"].to(dtype), made["b1"], made["w2"], made["b2"], info)
    save_scorer(scorer, tmp_path / "s.safetensors")
    loaded = load_scorer(tmp_path / "s.safetensors")
    assert loaded.info == info and loaded.hidden_size == D and loaded.w1.dtype == dtype
    for name in ("w1", "b1", "w2", "b2"):
        assert torch.equal(getattr(loaded, name), getattr(scorer, name))
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("wrap", [False, True])
def test_the_reference_format(tmp_path: Path, wrap: bool) -> None:
    state: Any = reference_state()
    torch.save({"model_state_dict": state, "epoch": 3} if wrap else state, tmp_path / "s.pt")
    loaded = load_scorer(tmp_path / "s.pt")
    assert torch.equal(loaded.w1, tensors()["w1"]) and loaded.w2.shape == (512,)
    assert loaded.info == ScorerInfo()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_loaded_scorer_does_not_need_its_file(tmp_path: Path, suffix: str) -> None:
    """Overwritten in place, a file that is still mapped would end the process with SIGBUS."""
    file = tmp_path / f"s.{suffix}"
    if suffix == "pt":
        torch.save(reference_state(), file)
    else:
        write(file, tensors())
    loaded = load_scorer(file)
    with file.open("r+b") as opened:
        opened.truncate(10)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(file) not in maps.read_text()
    assert torch.equal(loaded.w1, tensors()["w1"]) and torch.equal(loaded.w2, tensors()["w2"])


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "s.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"net.0.weight": Evil()}, tmp_path / "t.pt")
    for name in ("s.pt", "t.pt"):
        with pytest.raises(ScorerError, match="not a readable torch weights file"):
            load_scorer(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w1": torch.randn(256, D)}, r"w1 has shape \[256, 24\]; it must be \[512, d\]"),
        ({"w1": torch.randn(512)}, r"w1 has shape \[512\]"),
        ({"b1": torch.randn(5)}, "b1 has 5 elements; it must have 512"),
        ({"w2": torch.randn(2, 512)}, "w2 has 1024 elements"),
        ({"b2": torch.randn(0)}, "b2 has 0 elements"),
        ({"w1": torch.full((512, D), torch.nan)}, "w1 holds NaN"),
        ({"b2": torch.tensor([torch.inf])}, "b2 holds NaN or infinity"),
        ({"w1": torch.ones(512, D, dtype=torch.int32)}, "must be a float type"),
        ({"w3": torch.ones(1)}, "a scorer holds"),
    ],
)
def test_wrong_tensors(tmp_path: Path, changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ScorerError, match=message):
        load_scorer(write(tmp_path / "s.safetensors", tensors(**changed)))


def test_wrong_files(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", tensors())
    whole = good.read_bytes()
    bad = {
        "truncated": whole[: len(whole) // 2],
        "header only": whole[:64],
        "huge header": (2**62).to_bytes(8, "little") + b"{}",
        "noise": bytes(range(256)) * 8,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ScorerError, match="not a readable safetensors file"):
            load_scorer(tmp_path / name)
    (tmp_path / "empty").touch()
    with pytest.raises(ScorerError, match="0 bytes"):
        load_scorer(tmp_path / "empty")
    with pytest.raises(ScorerError, match="does not exist"):
        load_scorer(tmp_path / "nowhere")
    with pytest.raises(ScorerError, match="not a regular file"):
        load_scorer(tmp_path)
    with (tmp_path / "sparse.safetensors").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ScorerError, match="a scorer has 1 to"):
        load_scorer(tmp_path / "sparse.safetensors")


def test_wrong_metadata(tmp_path: Path) -> None:
    made = tensors()
    save_file(made, tmp_path / "none")
    with pytest.raises(ScorerError, match="says format None"):
        load_scorer(tmp_path / "none")
    for key, value, message in (
        ("version", "2", "version '2'"),
        ("delimiters", "[", "unreadable metadata"),
        ("delimiters", json.dumps([""]), "non-empty strings"),
        ("training", "[]", "must be an object"),
    ):
        with pytest.raises(ScorerError, match=message):
            load_scorer(write(tmp_path / "bad", made, **{key: value}))


def test_the_reference_without_its_tensors(tmp_path: Path) -> None:
    state = reference_state()
    del state["net.2.bias"]
    for made in (state, {"model_state_dict": 3}, [1], {"net.0.weight": 1.0}):
        torch.save(made, tmp_path / "s.pt")
        with pytest.raises(ScorerError, match=r"lacks the reference's tensors"):
            load_scorer(tmp_path / "s.pt")


def test_the_reference_with_another_layer(tmp_path: Path) -> None:
    """A layer norm in between: without it the network scores something else."""
    state = {**reference_state(), "net.1.weight": torch.ones(512), "net.1.bias": torch.zeros(512)}
    for made in (state, {"model_state_dict": state}):
        torch.save(made, tmp_path / "s.pt")
        with pytest.raises(ScorerError, match=r"beside the reference's: 'net.1.weight', 'net.1.b"):
            load_scorer(tmp_path / "s.pt")
    torch.save({**reference_state(), "epoch": 3}, tmp_path / "s.pt")
    assert load_scorer(tmp_path / "s.pt").hidden_size == D


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path) -> None:
    file = tmp_path / "s.pt"
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data/0", "w") as entry,
    ):
        for _ in range(300):
            entry.write(bytes(1 << 20))
    assert file.stat().st_size < 1 << 20
    with pytest.raises(ScorerError, match="unpacks to 314572800 bytes"):
        load_scorer(file)


def test_links_and_pipes(tmp_path: Path) -> None:
    good = write(tmp_path / "good.safetensors", tensors())
    (tmp_path / "link").symlink_to(good)
    assert load_scorer(tmp_path / "link").hidden_size == D
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in (("loop", "cannot be opened"), ("dangling", "does not exist")):
        with pytest.raises(ScorerError, match=message):
            load_scorer(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScorerError, match="not a regular file"):
        load_scorer(tmp_path / "pipe")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_refused_or_whole(
    tmp_path: Path, suffix: str, data: st.DataObject
) -> None:
    """Flip, cut or repeat parts of a good file: a scorer or one clear error comes out."""
    file = tmp_path / f"s.{suffix}"
    if suffix == "pt":
        torch.save(reference_state(), file)
    else:
        write(file, tensors())
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of the file is numbers; what can go wrong is at its ends.
        at = data.draw(st.integers(0, min(600, len(content) - 1)))
        at = at if data.draw(st.booleans()) else len(content) - 1 - at
        content[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    file.write_bytes(content)
    try:
        assert load_scorer(file).w1.shape[0] == 512
    except ScorerError as error:
        assert str(file) in str(error)
