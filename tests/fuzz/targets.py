"""What the fuzzers run: bytes in, nothing out, an exception is a finding.

A corpus is one text file of base64 lines, so that hundreds of tiny inputs are two files.
"""

from __future__ import annotations

import atexit
import base64
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from step_sglang import protocol
from step_sglang.config import StepConfig
from step_sglang.errors import RequestError, ScorerError
from step_sglang.pruning.request import (
    StepRequest,
    as_sample,
    check_group_id,
    check_group_size,
    declined,
    parse_request,
    with_group,
)
from step_sglang.scoring.scorer import load_scorer
from step_sglang.voting.request import parse, trace_params

HERE = Path(__file__).parent
MAX_BYTES = 4096  # of one input; what is larger in a scorer is only more numbers


class Bytes:
    """Reads values off the front of a string of bytes; zeros once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        self._at += count
        return part.ljust(count, b"\0")

    def byte(self) -> int:
        return self.take(1)[0]

    def rest(self) -> bytes:
        part = self._data[self._at :]
        self._at = len(self._data)
        return part

    def pick(self, values: list[Any]) -> Any:
        return values[self.byte() % len(values)]

    def text(self) -> str:
        raw = self.take(self.byte() % 24)
        return (
            raw.decode("utf-16-le", "surrogatepass") if len(raw) % 4 == 0 else raw.decode("latin-1")
        )


# --- custom_params -------------------------------------------------------------------------------

NAMES = [
    *protocol.REQUEST_MEMBERS, *protocol.VOTE_MEMBERS, protocol.REQUEST_KEY, "n", "temperature",
    "max_new_tokens", "beam_width", "custom_params", "",
]  # fmt: skip
SPECIAL = [
    None, True, False, 0, 1, 2, -1, 0.5, 1e308, -0.0, float("nan"), float("inf"), 2**31, -(2**63),
    10**5000, -(10**5000), "", "q", "q" * 300, "\ud800", "\n\x1b[31m", "weighted", "best", "exact",
    "posterior", "off", "boxed", "number", [], {}, [[[]]], b"raw",
]  # fmt: skip


def value(data: Bytes, depth: int = 0) -> Any:
    """Any Python value that JSON, msgpack or a program could hand over."""
    kind = data.byte() % 8
    if kind <= 2 or depth > 5:
        return data.pick(SPECIAL)
    if kind == 3:
        return int.from_bytes(data.take(data.byte() % 10), "little", signed=True)
    if kind == 4:
        return data.text()
    if kind == 5:
        return [value(data, depth + 1) for _ in range(data.byte() % 4)]
    return {data.pick(NAMES): value(data, depth + 1) for _ in range(data.byte() % 6)}


@cache
def configs() -> list[StepConfig]:
    return [StepConfig(scorer="s"), StepConfig(scorer="s", traces=8), StepConfig(capture=True)]


def request(data: bytes) -> str:
    """Every reader of ``custom_params``: a result of its type, or RequestError.

    Returns:
        What came out, to tell inputs apart.
    """
    source = Bytes(data)
    if source.byte() & 1:
        try:
            params = json.loads(source.rest())
        except (ValueError, RecursionError):
            return "not JSON"
        if not isinstance(params, dict):
            params = {"custom_params": params}
    else:
        params = {"custom_params": {protocol.REQUEST_KEY: value(source)}, "n": value(source)}
        for _ in range(source.byte() % 3):
            params[source.pick(NAMES)] = value(source)
    custom = params.get("custom_params")
    declined(custom)
    outcome = []
    for config in configs():
        try:
            parsed = parse(params, config)
            wish = parsed.vote
        except RequestError as error:
            outcome.append(_printable(error))
            continue
        if wish is not None:
            assert isinstance(trace_params(params, wish, config)["custom_params"], dict)
            outcome.append("voted")
    try:
        step_request = parse_request(custom)
        assert step_request is None or isinstance(step_request, StepRequest)
        if step_request is not None:
            check_group_size(step_request, 4)
        sample = as_sample(step_request, lambda: "g")
        assert sample.group is not None
        again = parse_request(with_group(custom, sample.group))
        assert again == sample
        json.dumps(check_group_id(sample.group, "group")).encode()
        outcome.append("not STEP's" if step_request is None else "a trace")
    except RequestError as error:
        outcome.append(_printable(error))
    return "; ".join(outcome)


def _printable(error: Exception) -> str:
    """One line that a terminal, a log and a JSON response can carry, whatever the input held."""
    message = str(error)
    message.encode("utf-8")
    assert len(message) < 1000 and message.isprintable(), ascii(message)[:2000]
    return re.sub(r"\d+|'[^']*'|\[.*?\]", "", message)


# --- scorer files --------------------------------------------------------------------------------

TENSORS = ["w1", "b1", "w2", "b2", "w3", ""]
DTYPES = ["F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "?", ""]
SIZES = [0, 1, 2, 8, 512, 511, 513, 1 << 31, 1 << 62, (1 << 63) - 1, -1]
METADATA = ["format", "version", "delimiters", "training", "model", "think_end"]


def safetensors_file(data: Bytes) -> bytes:
    """A file whose header is JSON of the right kind, and wrong in places."""
    header: dict[str, Any] = {}
    at = 0
    for name, rows in (("w1", [512, 8]), ("b1", [512]), ("w2", [512]), ("b2", [1])):
        size = 4
        for count in rows:
            size *= count
        header[name] = {"dtype": "F32", "shape": rows, "data_offsets": [at, at + size]}
        at += size
    header["__metadata__"] = {"format": "step-sglang-scorer", "version": "1"}
    for _ in range(data.byte() % 5):
        tensor = header.setdefault(data.pick(TENSORS), {})
        change = data.byte() % 6
        if not isinstance(tensor, dict) or change == 0:
            header[data.pick(TENSORS)] = value(data)
        elif change == 1:
            tensor["dtype"] = data.pick(DTYPES)
        elif change == 2:
            tensor["shape"] = [data.pick(SIZES) for _ in range(data.byte() % 4)]
        elif change == 3:
            tensor["data_offsets"] = [data.pick([*SIZES, at]) for _ in range(data.byte() % 4)]
        elif change == 4:
            tensor[data.text()] = value(data)
        else:
            metadata = header["__metadata__"]
            if isinstance(metadata, dict):
                metadata[data.pick(METADATA)] = data.text()
    try:
        text = json.dumps(header, default=repr).encode()
    except (ValueError, TypeError):  # a number that Python does not print
        text = b"{}"
    length = len(text) if data.byte() % 8 else data.pick(SIZES) % (1 << 64)
    body = data.rest()
    return length.to_bytes(8, "little") + text + body.ljust(max(at, len(body)), b"\0")


def torch_file(data: Bytes) -> bytes:
    """A zip archive as torch writes them around a pickle and storages of the input's choosing."""
    file = io.BytesIO()
    method = data.pick([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in ("0", "1", "2", "3")[: data.byte() % 5]:
            archive.writestr(f"s/data/{name}", bytes(data.pick([0, 4, 2048, 16384])))
        archive.writestr("s/version", data.pick(["3", "", "4\n", "x"]))
        archive.writestr("s/byteorder", data.pick(["little", "big", "?"]))
        archive.writestr("s/data.pkl", data.rest())
    return file.getvalue()


@cache
def _folder() -> Path:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    base = os.environ.get("TMPDIR") or memory
    folder = tempfile.mkdtemp(prefix="step-fuzz-", dir=base)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def scorer(data: bytes) -> str:
    """``load_scorer``: a scorer, or a ScorerError that names the file.

    Returns:
        What came out, to tell inputs apart.
    """
    source = Bytes(data)
    kind = source.byte() % 4
    content = (
        source.rest() if kind < 2 else safetensors_file(source) if kind == 2 else torch_file(source)
    )
    file = _folder() / f"{os.getpid()}{'.pt' if kind in (1, 3) else '.safetensors'}"
    file.write_bytes(content)
    try:
        loaded = load_scorer(file)
        assert loaded.w1.shape == (512, loaded.hidden_size) and loaded.w2.shape == (512,)
        assert all(bool(t.isfinite().all()) for t in (loaded.w1, loaded.b1, loaded.w2, loaded.b2))
        return f"a scorer of {loaded.w1.dtype}"
    except ScorerError as error:
        assert str(file) in str(error)
        return _printable(error)
    finally:
        file.unlink()


TARGETS = {"scorer": scorer, "request": request}


def corpus_file(name: str) -> Path:
    """Where a target's corpus is kept."""
    return HERE / f"corpus_{name}.txt"


def corpus(name: str) -> list[bytes]:
    """A target's inputs."""
    return [base64.b64decode(line) for line in corpus_file(name).read_text().split()]


def keep(name: str, inputs: list[bytes]) -> None:
    """Replace a target's corpus."""
    lines = sorted({base64.b64encode(content).decode() for content in inputs})
    corpus_file(name).write_text("".join(f"{line}\n" for line in lines))
