"""Reads and writes scorer files: Linear(d, 512), ReLU, Linear(512, 1) (paper section 3.2)."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from step_sglang import files
from step_sglang.errors import ScorerError, first_line, safe_repr
from step_sglang.scoring.calibration import TraceCalibration, calibration_from_json

HIDDEN_UNITS = 512
FORMAT = "step-sglang-scorer"
FORMAT_VERSION = "1"
_MAX_BYTES = 256 << 20  # d = 65536 in fp32 needs 128 MiB; anything larger is not a scorer
_MAX_HEADER = 1 << 20  # of a safetensors header or a zip directory; a scorer's has some hundreds
_NAMES = ("w1", "b1", "w2", "b2")
_REFERENCE_NAMES = {
    "w1": "net.0.weight",
    "b1": "net.0.bias",
    "w2": "net.2.weight",
    "b2": "net.2.bias",
}


@dataclass(frozen=True)
class ScorerInfo:
    """What a scorer file states about itself; any part may be unknown."""

    model: str | None = None
    delimiters: tuple[str, ...] = ()
    think_end: str | None = None
    training: dict[str, Any] = field(default_factory=dict)  # figures, JSON values only
    revision: str | None = None  # of the model: the commit
    calibration: TraceCalibration | None = None  # of the trace score; absent in older files


@dataclass(frozen=True)
class Scorer:
    """The MLP's weights on the CPU.

    Shapes: w1 [512, d] fp32 or bf16, b1 [512], w2 [512] and b2 [1] fp32.
    """

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
    info: ScorerInfo = ScorerInfo()

    @property
    def hidden_size(self) -> int:
        """d, the width of the hidden states it reads."""
        return self.w1.shape[1]


def load_scorer(path: str | os.PathLike[str]) -> Scorer:
    """Read a scorer: our safetensors file, or the reference's torch file (weights only).

    Raises:
        ScorerError: the file is missing, unreadable, not a scorer, wrongly shaped or not finite.
    """
    file = Path(path)
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise ScorerError(f"scorer {file} does not exist") from error
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a zero byte
        raise ScorerError(f"scorer {file} cannot be opened: {first_line(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ScorerError(f"scorer {file} is not a regular file")
    size = status.st_size
    if not 0 < size <= _MAX_BYTES:
        raise ScorerError(f"scorer {file} has {size} bytes; a scorer has 1 to {_MAX_BYTES}")
    if file.suffix in (".pt", ".pth", ".bin"):
        tensors, info = _read_reference(file), ScorerInfo()
    else:
        tensors, info = _read_safetensors(file)
    return _checked(file, tensors, info)


def blank_scorer(hidden_size: int) -> Scorer:
    """A scorer that gives every step 0.5, for a server that has none: the op finds boundaries."""
    return Scorer(
        w1=torch.zeros(HIDDEN_UNITS, hidden_size),
        b1=torch.zeros(HIDDEN_UNITS),
        w2=torch.zeros(HIDDEN_UNITS),
        b2=torch.zeros(1),
    )


def save_scorer(scorer: Scorer, path: str | os.PathLike[str]) -> None:
    """Write our format: tensors w1, b1, w2, b2 and string metadata, replacing ``path`` at once.

    Raises:
        OSError: the disk is full or fails; a file that was there stays.
    """
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "hidden_size": str(scorer.hidden_size),
        "delimiters": json.dumps(list(scorer.info.delimiters)),
        "training": json.dumps(scorer.info.training),
    }
    if scorer.info.model is not None:
        metadata["model"] = scorer.info.model
    if scorer.info.revision is not None:
        metadata["revision"] = scorer.info.revision
    if scorer.info.think_end is not None:
        metadata["think_end"] = scorer.info.think_end
    if scorer.info.calibration is not None:
        metadata["calibration"] = json.dumps(scorer.info.calibration.as_json(), sort_keys=True)
    tensors = {name: getattr(scorer, name).contiguous() for name in _NAMES}
    files.write(Path(path), save(tensors, metadata))


def _read_safetensors(file: Path) -> tuple[dict[str, torch.Tensor], ScorerInfo]:
    try:
        # What parsing takes is many times the header's size.
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > _MAX_HEADER:
            raise OSError(f"its header has {length} bytes, a scorer's at most {_MAX_HEADER}")
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = set(opened.keys())
            if names != set(_NAMES):
                found = ", ".join(map(safe_repr, sorted(names)[:8]))
                raise ScorerError(
                    f"scorer {file} holds tensors [{found}]; a scorer holds {list(_NAMES)}"
                )
            tensors = {name: opened.get_tensor(name) for name in _NAMES}
    except (OSError, safetensors.SafetensorError) as error:
        raise ScorerError(
            f"scorer {file} is not a readable safetensors file: {first_line(error)}"
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != FORMAT_VERSION:
        raise ScorerError(
            f"scorer {file} says format {safe_repr(metadata.get('format'))} version "
            f"{safe_repr(metadata.get('version'))}; "
            f"this reads {FORMAT!r} version {FORMAT_VERSION!r}"
        )
    return tensors, _info(file, metadata)


def _info(file: Path, metadata: dict[str, str]) -> ScorerInfo:
    try:
        delimiters = json.loads(metadata.get("delimiters", "[]"))
        training = json.loads(metadata.get("training", "{}"))
        stated = json.loads(metadata.get("calibration", "null"))
    except (ValueError, RecursionError) as error:
        raise ScorerError(f"scorer {file} has unreadable metadata: {first_line(error)}") from error
    if not isinstance(delimiters, list) or not all(isinstance(d, str) and d for d in delimiters):
        raise ScorerError(f"scorer {file}: delimiters must be a list of non-empty strings")
    if not isinstance(training, dict):
        raise ScorerError(f"scorer {file}: training figures must be an object")
    try:
        calibration = None if stated is None else calibration_from_json(stated)
    except ScorerError as error:
        raise ScorerError(f"scorer {file}: {error}") from error
    return ScorerInfo(
        metadata.get("model"), tuple(delimiters), metadata.get("think_end"), training,
        metadata.get("revision"), calibration,
    )  # fmt: skip


class _Archive(io.FileIO):
    """A zip archive, whose directory ``zipfile`` reads at once and keeps as objects."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_HEADER:
            raise ValueError(f"its directory has {size} bytes, a scorer's at most {_MAX_HEADER}")
        return super().read(size) or b""


def _read_reference(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Torch goes by the first bytes; what it wrote before 1.6, no archive, has no size to check.
        with file.open("rb") as opened:
            if opened.read(4) != b"PK\x03\x04":
                raise ValueError("it is no zip archive")
        with _Archive(file) as raw, zipfile.ZipFile(raw) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MAX_BYTES:  # a few kilobytes can unpack to terabytes
            raise ScorerError(
                f"scorer {file} unpacks to {unpacked} bytes; a scorer has at most {_MAX_BYTES}"
            )
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except ScorerError:
        raise
    except pickle.UnpicklingError as error:
        # torch's own message says how to run what it refused.
        raise ScorerError(
            f"scorer {file} is not a readable torch weights file: its pickle is damaged, or holds "
            "more than tensors"
        ) from error
    except Exception as error:  # a damaged file fails in any way: IndexError, TypeError, ...
        raise ScorerError(
            f"scorer {file} is not a readable torch weights file: {first_line(error)}"
        ) from error
    state = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), torch.Tensor) for name in _REFERENCE_NAMES.values()
    ):
        raise ScorerError(
            f"scorer {file} lacks the reference's tensors {sorted(_REFERENCE_NAMES.values())} "
            "(at top level or under 'model_state_dict')"
        )
    # Scores without a layer that the network had would be other scores.
    known = _REFERENCE_NAMES.values()
    more = [k for k, v in state.items() if isinstance(v, torch.Tensor) and k not in known]
    if more:
        found = ", ".join(safe_repr(name) for name in more[:8])
        raise ScorerError(
            f"scorer {file} holds tensors beside the reference's: {found}; a scorer is a network "
            f"of {sorted(known)} alone"
        )
    return {name: state[theirs] for name, theirs in _REFERENCE_NAMES.items()}


def _checked(file: Path, tensors: dict[str, torch.Tensor], info: ScorerInfo) -> Scorer:
    for name, tensor in tensors.items():
        # A torch file can hold a view that repeats one number, a tensor without data, ...
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ScorerError(f"scorer {file}: {name} is no ordinary tensor of numbers")
        if 4 * tensor.numel() > _MAX_BYTES:
            raise ScorerError(
                f"scorer {file}: {name} has {tensor.numel()} elements; that is no scorer"
            )
    w1 = tensors["w1"]
    if w1.dim() != 2 or w1.shape[0] != HIDDEN_UNITS or w1.shape[1] < 1:
        raise ScorerError(
            f"scorer {file}: w1 has shape {list(w1.shape)}; it must be [{HIDDEN_UNITS}, d]"
        )
    sizes = {"b1": HIDDEN_UNITS, "w2": HIDDEN_UNITS, "b2": 1}
    for name, size in sizes.items():
        if tensors[name].numel() != size:
            raise ScorerError(
                f"scorer {file}: {name} has {tensors[name].numel()} elements; it must have {size}"
            )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ScorerError(f"scorer {file}: {name} is {tensor.dtype}; it must be a float type")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ScorerError(f"scorer {file}: {name} holds NaN or infinity")
    # bf16 weights are served as they are (half the bytes to stream); anything else as fp32.
    kept = w1.dtype if w1.dtype == torch.bfloat16 else torch.float32
    return Scorer(
        w1=_own(w1, kept),
        b1=_own(tensors["b1"].reshape(-1)),
        w2=_own(tensors["w2"].reshape(-1)),
        b2=_own(tensors["b2"].reshape(-1)),
        info=info,
    )


def _own(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # A copy: the file may be mapped, and then cut short under a running server.
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
