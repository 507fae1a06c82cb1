"""Scorer files that must be refused. Also a program: loads each under limits of memory and time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from step_sglang.errors import ScorerError
from step_sglang.scoring.scorer import load_scorer

SECONDS = 60  # for one file, on a loaded machine
MEMORY = 1 << 30  # bytes of address space beside what is mapped when the first file is read
MARK = "STEP_BAD_SCORER_MARK"  # in the environment: the file that code in a scorer would make
OURS = {"format": "step-sglang-scorer", "version": "1"}
SHAPES = {"w1": [512, 8], "b1": [512], "w2": [512], "b2": [1]}


def header() -> dict[str, Any]:
    entries: dict[str, Any] = {"__metadata__": dict(OURS)}
    at = 0
    for name, shape in SHAPES.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return entries


def packed(text: str | bytes | dict[str, Any], body: int = 20484) -> bytes:
    """A safetensors file of this header."""
    raw = json.dumps(text) if isinstance(text, dict) else text
    raw = raw.encode() if isinstance(raw, str) else raw
    return len(raw).to_bytes(8, "little") + raw + bytes(body)


def changed(name: str, **values: Any) -> bytes:
    entries = header()
    entries[name].update(values)
    return packed(entries)


def with_metadata(**values: Any) -> bytes:
    entries = header()
    entries["__metadata__"].update(values)
    return packed(entries)


def tensors(**values: torch.Tensor) -> bytes:
    made = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return save({**made, **values}, OURS)


def torch_file(**values: Any) -> bytes:
    """The reference's format, with something else in places: w1 is ``net_0_weight``, and so on."""
    state: dict[str, Any] = {
        "net.0.weight": torch.zeros(512, 8),
        "net.0.bias": torch.zeros(512),
        "net.2.weight": torch.zeros(1, 512),
        "net.2.bias": torch.zeros(1),
    }
    state.update({name.replace("_", "."): value for name, value in values.items()})
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch ${MARK}",))


def code_in_archive() -> bytes:
    file = io.BytesIO()
    torch.save({"net.0.weight": Evil()}, file)
    return file.getvalue()


def archive(method: int, sizes: list[int], data: bytes = b"") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as opened:
        opened.writestr("s/data.pkl", data or pickle.dumps({}, 2))
        opened.writestr("s/version", "3")
        for number, size in enumerate(sizes):
            with opened.open(f"s/data/{number}", "w", force_zip64=True) as entry:
                for _ in range(size >> 20):
                    entry.write(bytes(1 << 20))
    return file.getvalue()


def long_directory() -> bytes:
    file = io.BytesIO(torch_file())
    with zipfile.ZipFile(file, "a") as opened:
        for number in range(20):
            opened.writestr(f"s/{number}{'x' * 60_000}", b"")
    return file.getvalue()


def lying_archive() -> bytes:
    """300 MiB of zeros that the directory calls 1 KiB."""
    content = bytearray(archive(zipfile.ZIP_DEFLATED, [300 << 20]))
    entry = content.rindex(b"PK\x01\x02")
    assert b"s/data/0" in content[entry : entry + 64]
    content[entry + 24 : entry + 28] = (1024).to_bytes(4, "little")
    return bytes(content)


def legacy(storage: int) -> bytes:
    """Torch's format from before 1.6, with a storage of so many bytes declared."""
    file = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": storage}, []):
        pickle.dump(value, file, 2)
    return file.getvalue()


# name: (the file's content, what the error says)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.safetensors": (lambda: b"", "0 bytes"),
    "noise.safetensors": (lambda: bytes(range(256)) * 9, "not a readable safetensors"),
    "short.safetensors": (lambda: b"\x08", "not a readable safetensors"),
    "header-only.safetensors": (lambda: packed(header(), 0), "not a readable safetensors"),
    "truncated.safetensors": (lambda: packed(header())[:-1], "not a readable safetensors"),
    "trailing.safetensors": (lambda: packed(header()) + b"x", "not a readable safetensors"),
    "huge-header.safetensors": (
        lambda: (1 << 62).to_bytes(8, "little") + b"{}",
        "not a readable safetensors",
    ),
    "negative-header.safetensors": (
        lambda: b"\xff" * 8 + b"{}",
        "not a readable safetensors",
    ),
    "header-past-end.safetensors": (
        lambda: (10**6).to_bytes(8, "little") + packed(header())[8:],
        "not a readable safetensors",
    ),
    "not-json.safetensors": (lambda: packed("{'w1': 1}"), "not a readable safetensors"),
    "deep-json.safetensors": (lambda: packed("[" * 200_000), "not a readable safetensors"),
    "duplicate-keys.safetensors": (
        lambda: packed(json.dumps(header())[:-1] + ', "w1": {"dtype": "F32", "shape": [1], '
                       '"data_offsets": [0, 4]}}'),
        "scorer",
    ),
    "metadata-not-utf8.safetensors": (
        lambda: packed(json.dumps(header()).encode().replace(b"step-sglang", b"st\xff\xfe-sglang")),
        "not a readable safetensors",
    ),
    "metadata-not-text.safetensors": (
        lambda: with_metadata(format=3),
        "not a readable safetensors",
    ),
    "no-metadata.safetensors": (
        lambda: save({name: torch.zeros(shape) for name, shape in SHAPES.items()}),
        "says format None",
    ),
    "other-version.safetensors": (lambda: with_metadata(version="2\x1b[2J\n"), "version"),
    "delimiters-deep.safetensors": (
        lambda: with_metadata(delimiters="[" * 100_000),
        "unreadable metadata",
    ),
    "delimiters-empty.safetensors": (
        lambda: with_metadata(delimiters='[""]'),
        "non-empty strings",
    ),
    "training-large-number.safetensors": (
        lambda: with_metadata(training='{"a": ' + "9" * 10_000 + "}"),
        "unreadable metadata",
    ),
    "negative-offsets.safetensors": (
        lambda: changed("w1", data_offsets=[-4, 16380]),
        "not a readable safetensors",
    ),
    "overflowing-offsets.safetensors": (
        lambda: changed("b2", data_offsets=[20480, 2**64 + 4]),
        "not a readable safetensors",
    ),
    "overlapping-offsets.safetensors": (
        lambda: changed("b1", data_offsets=[0, 2048]),
        "not a readable safetensors",
    ),
    "overflowing-shape.safetensors": (
        lambda: changed("w1", shape=[2**63, 2**63]),
        "not a readable safetensors",
    ),
    "unknown-dtype.safetensors": (lambda: changed("w1", dtype="F128"), "not a readable"),
    "integers.safetensors": (
        lambda: tensors(b1=torch.zeros(512, dtype=torch.int64)),
        "must be a float type",
    ),
    "not-finite.safetensors": (lambda: tensors(b2=torch.tensor([torch.nan])), "holds NaN"),
    "wrong-width.safetensors": (lambda: tensors(w1=torch.zeros(511, 8)), "w1 has shape"),
    "wrong-names.safetensors": (lambda: save({"net.0.weight": torch.zeros(1)}, OURS), "holds"),
    "many-names.safetensors": (
        lambda: save({f"\x1b{i}" * 50: torch.zeros(1) for i in range(1000)}, OURS),
        "holds",
    ),
    "long-header.safetensors": (
        lambda: packed(json.dumps(header()) + " " * (1 << 20)),
        "not a readable safetensors file: its header has 10",
    ),
    "pickle.safetensors": (lambda: pickle.dumps(Evil()), "not a readable safetensors"),
    "safetensors.pt": (tensors, "no zip archive"),
    "code.pt": (lambda: pickle.dumps(Evil()), "no zip archive"),
    "code-in-archive.pt": (code_in_archive, "more than tensors"),
    "code.pth": (code_in_archive, "more than tensors"),
    "code.bin": (code_in_archive, "more than tensors"),
    "legacy-huge.pt": (lambda: legacy(1 << 45), "no zip archive"),
    "pickle-then-archive.pt": (
        lambda: pickle.dumps(Evil()) + torch_file(),
        "no zip archive",
    ),
    "truncated.pt": (lambda: torch_file()[:-30], "not a readable torch"),
    "empty-archive.pt": (lambda: archive(zipfile.ZIP_STORED, []), "lacks the reference's"),
    "long-directory.pt": (long_directory, "not a readable torch weights file: its directory has"),
    "bomb.pt": (lambda: archive(zipfile.ZIP_DEFLATED, [300 << 20]), "unpacks to"),
    "lying-bomb.pt": (lying_archive, "scorer"),
    "repeated-view.pt": (
        lambda: torch_file(net_0_weight=torch.zeros(1).expand(512, 1 << 40)),
        "that is no scorer",
    ),
    "sparse.pt": (
        lambda: torch_file(net_0_weight=torch.zeros(512, 8).to_sparse()),
        "no ordinary tensor",
    ),
    "compressed-rows.pt": (
        lambda: torch_file(net_0_weight=torch.zeros(512, 8).to_sparse_csr()),
        "no ordinary tensor",
    ),
    "without-data.pt": (
        lambda: torch_file(net_0_bias=torch.zeros(512, device="meta")),
        "no ordinary tensor",
    ),
    "quantized.pt": (
        lambda: torch_file(
            net_0_bias=torch.quantize_per_tensor(torch.zeros(512), 1, 0, torch.qint8)
        ),
        "scorer",
    ),
    "complex.pt": (lambda: torch_file(net_2_bias=torch.zeros(1) * 1j), "must be a float type"),
    "numbers.pt": (lambda: torch_file(net_0_bias=[0.0] * 512), "lacks the reference's"),
    "deep.pt": (
        lambda: archive(zipfile.ZIP_STORED, [], b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b"."),
        "lacks the reference's",
    ),
}  # fmt: skip


def write_all(folder: Path) -> dict[str, str]:
    """Every bad file; for each path what the error says."""
    expected = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (content, message) in FILES.items():
            (folder / name).write_bytes(content())
            expected[str(folder / name)] = message
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "device.safetensors").symlink_to("/dev/zero")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "dangling.safetensors").symlink_to(folder / "nowhere")
    for name in ("folder", "pipe", "device"):
        expected[str(folder / f"{name}.safetensors")] = "not a regular file"
    expected[str(folder / "loop.safetensors")] = "cannot be opened"
    expected[str(folder / "dangling.safetensors")] = "does not exist"
    expected[str(folder / "nowhere.safetensors")] = "does not exist"
    expected[str(folder / ("x" * 300))] = "cannot be opened"
    expected[str(folder / "zero\0byte")] = "cannot be opened"
    with contextlib.suppress(OSError):  # not every file system has files of this size
        with (folder / "tebibyte.safetensors").open("wb") as file:
            file.truncate(1 << 40)
        expected[str(folder / "tebibyte.safetensors")] = "a scorer has 1 to"
    return expected


def peak() -> int:
    """KiB of memory that this process has had at most; ``ru_maxrss`` begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Print one JSON line per path: the error, its seconds, and the memory that it took."""
    paths = json.loads(sys.stdin.read())
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    for path in paths:
        signal.alarm(SECONDS)
        began = time.monotonic()
        try:
            load_scorer(path)
            said = "loaded"
        except ScorerError as error:
            said = f"ScorerError: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([path, said, time.monotonic() - began, peak()]), flush=True)


if __name__ == "__main__":
    main()
