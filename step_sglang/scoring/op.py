"""The fused op: loads the native libraries and gives `step_score_` a typed face.

Decides nothing and keeps no state. `step_sglang.scoring.reference` says the same in plain torch.
"""

import ctypes
import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from step_sglang import protocol

HIDDEN_UNITS = 512  # width of the scorer's hidden layer
MAX_ROWS = 4096  # requests in one call
SCORE_FROM, THINKING, SCORE_SUM, NUM_STEPS = range(4)  # rows of `slots`

_UNITS_PER_BLOCK = 4  # as in csrc/cuda.h
_WORKSPACE_HEADER = 1
_FOLDER = Path(__file__).parent
_loaded: dict[str, Path] = {}


def load_cuda(path: Path) -> None:
    """Load the library that adds the CUDA implementation.

    Raises:
        OSError: it does not load.
    """
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    _loaded["cuda"] = path


def library(device_type: str) -> tuple[Path, str]:
    """The file that runs on `cpu` or `cuda`, and its sha256.

    Raises:
        KeyError: none is loaded for it.
    """
    path = _loaded[device_type]
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def _load_libraries() -> ctypes.CDLL:
    cpu = _FOLDER / "libstep_cpu.so"
    if not cpu.is_file():
        raise ImportError(
            f"step_sglang's native op is not built: {cpu} is missing. In a source checkout run"
            " `pip install --no-build-isolation -e .` (STEP_CUDA=0 for a CPU-only build)."
        )
    torch.ops.load_library(str(cpu))  # type: ignore[no-untyped-call]
    _loaded["cpu"] = cpu
    built = os.environ.get(protocol.CUDA_LIBRARY_ENV)
    cuda = Path(built) if built else _FOLDER / "libstep_cuda.so"
    if cuda.is_file() and torch.version.cuda is not None:
        # One that was linked against another CUDA runtime is as good as none.
        with suppress(OSError):
            load_cuda(cuda)
    return ctypes.CDLL(str(cpu))


_cpu_library = _load_libraries()
_step_score = torch.ops.step_sglang.step_score_.default  # looked up once, not at every step


@torch.library.register_fake("step_sglang::step_score_")  # type: ignore[untyped-decorator]
def _step_score_fake(*_args: object) -> None:
    """Writes into its arguments and returns nothing, so tracing has nothing to make."""


def workspace_size(max_batch: int) -> int:
    """Elements of the int32 workspace that serves calls of up to `max_batch` rows."""
    return _WORKSPACE_HEADER + max_batch * (HIDDEN_UNITS // _UNITS_PER_BLOCK)


def pack_head(b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """[2 U + 1] float32: a scorer's b1 [U], w2 ([U] or [1, U]) and b2 [1], as the op takes them."""
    return torch.cat([t.reshape(-1) for t in (b1, w2, b2)]).float()


def has_cuda() -> bool:
    """Whether the CUDA implementation is registered (it may be even where there is no GPU)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("step_sglang::step_score_", "CUDA")


def cpu_isa() -> str:
    """Instruction set of the CPU path: avx512_bf16, avx512, avx2 or plain.

    STEP_CPU_ISA asks for one; what the machine lacks is never chosen.
    """
    name = _cpu_library.step_cpu_isa
    name.restype = ctypes.c_char_p
    value: bytes = name()
    return value.decode()


def step_score_(
    hidden: Tensor,
    row_index: Tensor | None,
    slot_ids: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    boundary: Tensor,
    think_end_id: int,
    slots: Tensor,
    out: Tensor,
    workspace: Tensor,
    w1: Tensor,
    head: Tensor,
) -> None:
    """Score every step that ends in this forward pass (the step scorer of STEP, arXiv 2601.09093).

    Row i of the batch is token `row_index[i]`, the last one its request fed to the model. Where
    that token ends a step, `sigmoid(w2 . relu(w1 @ h + b1) + b2)` of its hidden state h is added to
    its slot. On CUDA the work is one kernel: no host synchronisation, no allocation, safe to
    capture in a graph, and the same bits on every rank for the same inputs. A row's score does not
    depend on which other rows are in the batch.

    Args:
        hidden: [T, D] float32, bfloat16 or float16; D a multiple of 8 from 8 to 16384; any row
            stride.
        row_index: [B] int64, row of hidden, input_ids and positions; outside 0..T-1 = padding.
            None: row i is token i.
        slot_ids: [B] int64, distinct; outside 0..S-1 (-1) = padding row.
        input_ids: [T] int64.
        positions: [T] int64, position of each token in its sequence.
        boundary: [ceil(V / 32)] int32, bit (id & 31) of word id >> 5 = the token ends a step.
            Ids outside the bitmap are never boundaries.
        think_end_id: token at which scoring of a slot ends; negative = none, and `THINKING` is then
            neither read nor written.
        slots: [4, S] int32, all but the first row written: of each slot
            `SCORE_FROM`: first position that may be scored; 2**31 - 1 = never;
            `THINKING`: not 0 while steps are scored, set to 0 at the think-end token;
            `SCORE_SUM`: sum of its step scores, the bits of a float32;
            `NUM_STEPS`: number of them.
        out: [>= B, 2] float32, the first B rows written: step score (NaN: no step, infinity: one
            without a score), then the score sum of the row's slot after this call (0 for padding).
        workspace: [>= workspace_size(B)] int32, zeroed once by its owner and left zeroed where it
            must be; one stream at a time. Ignored on the CPU.
        w1: [512, D] float32 or bfloat16.
        head: [1025] float32: b1 (512), w2 (512), b2, as `pack_head` makes it.

    A step whose logit is not finite (NaN or infinity in the hidden state, or an overflow) is not
    scored: its state stays as it was, and `out` says infinity.

    Raises:
        RuntimeError: an argument has the wrong dtype, shape, layout or device; the message names
            it, what was found and what would be right.
    """
    _step_score(
        hidden,
        row_index,
        slot_ids,
        input_ids,
        positions,
        boundary,
        think_end_id,
        slots,
        out,
        workspace,
        w1,
        head,
    )
