"""The store: nothing lost or doubled by a kill, and one clear message for every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from step_sglang.training.errors import StoreError
from step_sglang.training.index import INDEX, META, SHARDS, TENSOR, shard_path
from step_sglang.training.reader import Reader
from step_sglang.training.store import Writer
from step_sglang.training.stored import StoredQuestion
from tests.training_samples import D, meta, planted_store, question

N = 3


def results(count: int = 3) -> list[StoredQuestion]:
    rng = np.random.default_rng(1)
    return [question(f"q{i}", rng, n=N, steps=(0, 4)) for i in range(count)]


def write_all(folder: Path, found: list[StoredQuestion]) -> tuple[str, ...]:
    with Writer(folder, meta(n=N)) as writer:
        for result in found:
            if result.traces[0].question_id not in writer.done:
                writer.add(result)
        return writer.repairs


def content(folder: Path) -> list[Any]:
    reader = Reader(folder, with_text=True)
    found = []
    for shard in reader.stream():
        for trace in shard.traces:
            end = trace.first_row + trace.num_steps
            rows = shard.hidden[trace.first_row : end].tolist()
            found.append(({**trace.as_json(), "shard": 0}, rows))
    return sorted(found, key=lambda item: (item[0]["question_id"], item[0]["sample"]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    (result,) = results(1)
    nan = replace(
        result.traces[0],
        steps=replace(
            result.traces[0].steps,
            lowest_confidence=np.full(result.traces[0].num_steps, np.nan, np.float32),
        ),
        lowest_confidence=None,
        extracted=None,
    )
    result = replace(result, traces=(nan, *result.traces[1:]))
    with Writer(tmp_path, meta(n=N, dtype=dtype)) as writer:
        writer.add(result)
        assert writer.repairs == () and writer.done == {"q0"}
    reader = Reader(tmp_path, with_text=True)
    assert reader.meta == meta(n=N, dtype=dtype) and reader.problems == []
    (shard,) = reader.stream()
    assert shard.hidden.dtype == getattr(torch, dtype)
    assert torch.equal(shard.hidden, result.hidden.to(shard.hidden.dtype))
    for wrote, read in zip(result.traces, shard.traces, strict=True):
        assert {**read.as_json(), "first_row": 0} == {**wrote.as_json(), "first_row": 0}
    assert [r.first_row for r in shard.traces] == list(
        np.cumsum([0] + [r.num_steps for r in result.traces[:-1]])
    )
    assert Reader(tmp_path).traces(0)[0].text is None


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test sees it."""


def kill_at(patch: pytest.MonkeyPatch, moment: int, error: Callable[[], BaseException]) -> None:
    """Fail at the moment-th file operation; a write gets half of its bytes out first."""
    count = 0

    def wrap(owner: Any, name: str, half: bool = False) -> None:
        real = getattr(owner, name)

        def call(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == moment:
                if half:
                    real(args[0], args[1][: len(args[1]) // 2])
                raise error()
            return real(*args)

        patch.setattr(owner, name, call)

    wrap(os, "write", half=True)
    wrap(os, "fsync")
    wrap(Path, "replace")


def test_a_kill_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    found = results()
    write_all(tmp_path / "whole", found)
    expected = content(tmp_path / "whole")
    for moment in range(100):
        folder = tmp_path / f"killed{moment}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment, Killed)
            try:
                write_all(folder, found)
            except Killed:
                pass
            else:
                break
        write_all(folder, found)
        assert content(folder) == expected, moment
        assert len(list((folder / SHARDS).iterdir())) == len(found)
    assert moment > 20, "the store must make several operations per question"


def test_a_torn_line_and_an_orphan_are_reported(tmp_path: Path) -> None:
    found = results()
    write_all(tmp_path, found)
    expected = content(tmp_path)
    index = tmp_path / INDEX
    index.write_bytes(index.read_bytes()[:-20])
    (tmp_path / SHARDS / "000009.safetensors.partial").write_bytes(b"x")
    assert len(Reader(tmp_path).shards) == 2, "a reader needs no repair"
    repairs = " ".join(write_all(tmp_path, found))
    for part in ("line 9 is unreadable", "q2 has not its 3 traces", "000002.saf", "000009.saf"):
        assert part in repairs
    assert content(tmp_path) == expected
    assert write_all(tmp_path, found) == ()


def test_a_killed_repair_is_repaired(tmp_path: Path) -> None:
    found = results()
    for moment in range(20):
        folder = tmp_path / str(moment)
        write_all(folder, found)
        index = folder / INDEX
        index.write_bytes(index.read_bytes()[:-20])
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment, Killed)
            try:
                write_all(folder, found)
            except Killed:
                pass
            else:
                break
        write_all(folder, found)
        assert len(content(folder)) == 3 * N
    assert moment > 3


@pytest.mark.parametrize("moment", range(0, 8))
def test_a_full_disk_keeps_what_was_collected(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results()
    write_all(tmp_path, found[:1])
    kept = content(tmp_path)
    with Writer(tmp_path, meta(n=N)) as writer:
        kill_at(monkeypatch, moment, lambda: OSError(errno.ENOSPC, "No space left on device"))
        try:
            writer.add(found[1])
        except StoreError as error:
            assert "the disk is full: the 1 questions" in str(error)
        else:
            assert moment >= 6, "every operation of a question must be watched"
            return
        monkeypatch.undo()
        assert content(tmp_path) == kept
        writer.add(found[1])  # space was freed
        writer.add(found[2])
    assert len(content(tmp_path)) == 3 * N


SEVERAL = """
import sys
from pathlib import Path
from step_sglang import files

for i in range(300):
    files.write(Path(sys.argv[1]), sys.argv[2].encode() * 20_000)
"""


def test_several_processes_write_the_same_file(tmp_path: Path) -> None:
    """As servers do that start together and keep the same scorer."""
    target = tmp_path / "s.pt"
    command = [sys.executable, "-c", SEVERAL, str(target)]
    writers = [subprocess.Popen([*command, one], stderr=subprocess.PIPE) for one in "abc"]
    assert [(w.communicate()[1], w.returncode) for w in writers] == [(b"", 0)] * 3
    assert target.read_bytes() in {one * 20_000 for one in (b"a", b"b", b"c")}
    assert os.listdir(tmp_path) == ["s.pt"] and target.stat().st_mode & 0o777 == 0o644


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Writer(tmp_path, meta(n=N)), pytest.raises(StoreError, match="another process"):
        Writer(tmp_path, meta(n=N))
    Writer(tmp_path, meta(n=N)).__exit__(None, None, None)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, results())
    with pytest.raises(StoreError, match=r"other settings \(model 'planted', now 'else'\)"):
        Writer(tmp_path, meta(n=N, model="else"))


def test_results_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (result,) = results(1)
    with Writer(tmp_path, meta(n=N)) as writer:
        with pytest.raises(StoreError, match="samples 0 to 2"):
            writer.add(replace(result, traces=result.traces[:2]))
        with pytest.raises(StoreError, match="running planted"):
            writer.add(replace(result, hidden=torch.zeros(len(result.hidden), D + 1)))
        with pytest.raises(StoreError, match=r"NaN or infinity, as the model computed them$"):
            writer.add(replace(result, hidden=result.hidden * torch.nan))
        with pytest.raises(StoreError, match=r"too large for float16: .* --dtype bfloat16"):
            writer.add(replace(result, hidden=result.hidden + 70000))
        writer.add(result)
        with pytest.raises(StoreError, match="already"):
            writer.add(result)


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def damage_garbage(file: Path) -> None:
    file.write_bytes(b"\xff" * 200)


def damage_missing(file: Path) -> None:
    file.unlink()


def damage_width(file: Path) -> None:
    save_file({TENSOR: torch.zeros(5, D + 1, dtype=torch.float16)}, file)


def damage_rows(file: Path) -> None:
    save_file({TENSOR: torch.zeros(500, D, dtype=torch.float16)}, file)


def damage_nan(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2:] = b"\xff\xff"
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "corrupt or truncated"),
        (damage_garbage, "corrupt or truncated"),
        (damage_missing, "corrupt or truncated"),
        (damage_width, "hidden size 16"),
        (damage_rows, "500 rows"),
        (damage_nan, "NaN"),
    ],
)
def test_a_damaged_shard_is_named_and_can_be_skipped(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    planted_store(tmp_path, 3)
    whole = content(tmp_path)
    file = shard_path(tmp_path, 1)
    damage(file)
    with pytest.raises(StoreError, match=message) as caught:
        Reader(tmp_path)
    assert str(file) in str(caught.value) and "--skip-bad-shards" in str(caught.value)
    reader = Reader(tmp_path, skip_bad=True)
    assert reader.shards == (0, 2) and len(reader.problems) == 1
    if damage is not damage_nan:  # header damage is what `collect` repairs
        with Writer(tmp_path, meta()) as writer:
            assert len(writer.done) == 2 and "collected again" in " ".join(writer.repairs)
            rng = np.random.default_rng(0)
            again = [question(f"s0q{i}", rng) for i in range(3)][1]
            writer.add(again)
        assert content(tmp_path) == whole


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no collected traces"):
        Reader(tmp_path / "nothing")
    Writer(tmp_path, meta()).__exit__(None, None, None)
    with pytest.raises(StoreError, match="no complete"):
        Reader(tmp_path)
    (tmp_path / META).write_text(json.dumps({**meta().as_json(), "version": 9}))
    with pytest.raises(StoreError, match="version 9"):
        Reader(tmp_path)
