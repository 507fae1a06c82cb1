"""Times the op against eager torch and against a plain read of W1, in alternating runs.

    python bench/op.py [--dims 2560 4096 5120] [--device cpu|cuda] [--threads N] [--json FILE]

Prints the machine, the command and a table of medians. `read` is the time a plain streaming read
of W1's bytes takes with the same threads in the same rounds; `of read` is that time over the op's.

On CUDA the op is timed where it runs, inside a graph, beside a dense masked version in torch that a
graph can hold (see op_timing.py); one call from Python would time Python.

`cold` calls take turns with copies of W1 that together exceed the caches, as in a decode step,
where the model's own weights have passed through since the last call; `warm` calls reuse one W1.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from step_sglang.scoring import op

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.op_timing import marginal, nothing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 64
VOCAB = 151_936
BOUNDARY_TOKENS = 400
SLOTS = 256
COLD_BYTES = 160 << 20  # beyond any cache of the machines meant here

STREAM_READ = r"""
#include <immintrin.h>
// Adds up n bytes at p with 32-byte loads, eight at a time: nothing but the read.
long long stream_read(const char* p, long long n) {
    __m256i a[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_setzero_si256();
    for (long long k = 0; k + 256 <= n; k += 256)
        for (int i = 0; i < 8; ++i)
            a[i] = _mm256_add_epi64(a[i], _mm256_loadu_si256((const __m256i*)(p + k + 32 * i)));
    for (int i = 1; i < 8; ++i) a[0] = _mm256_add_epi64(a[0], a[i]);
    return _mm256_extract_epi64(a[0], 0) + _mm256_extract_epi64(a[0], 1) +
           _mm256_extract_epi64(a[0], 2) + _mm256_extract_epi64(a[0], 3);
}
// The same, split over OpenMP threads.
long long stream_read_threads(const char* p, long long n, int threads) {
    long long sum = 0;
    #pragma omp parallel for num_threads(threads) reduction(+ : sum)
    for (int t = 0; t < threads; ++t) {
        long long begin = n / threads / 256 * 256 * t;
        long long end = t == threads - 1 ? n : n / threads / 256 * 256 * (t + 1);
        sum += stream_read(p + begin, end - begin);
    }
    return sum;
}
"""


@dataclass(frozen=True)
class Result:
    """Medians in microseconds over `rounds` alternating rounds."""

    device: str
    cache: str
    dim: int
    hidden: str
    weights: str
    active: int
    rounds: int
    op_us: float
    eager_us: float
    read_us: float | None

    @property
    def speedup(self) -> float:
        """How many times faster than eager torch."""
        return self.eager_us / self.op_us

    @property
    def of_read(self) -> float | None:
        """Share of the speed of a plain read of W1."""
        return None if self.read_us is None else self.read_us / self.op_us


class Call:
    """One decode step of `rows` requests, `active` of which end a step."""

    def __init__(
        self,
        dim: int,
        active: int,
        hidden: torch.dtype,
        weights: torch.dtype,
        device: str,
        cache: str,
        rows: int = ROWS,
    ) -> None:
        g = torch.Generator().manual_seed(dim + active)
        boundary_ids = torch.randperm(VOCAB, generator=g)[:BOUNDARY_TOKENS].sort().values
        words = torch.zeros((VOCAB + 31) // 32, dtype=torch.int64)
        words.index_add_(0, boundary_ids >> 5, 1 << (boundary_ids & 31))
        ordinary = torch.ones(VOCAB, dtype=torch.bool)
        ordinary[boundary_ids] = False
        ids = ordinary.nonzero().flatten()[torch.randperm(100_000, generator=g)[:rows]]
        ids[torch.randperm(rows, generator=g)[:active]] = boundary_ids[:active]

        def move(t: Tensor) -> Tensor:
            return t.to(device)

        slots = max(SLOTS, rows)
        self.hidden = move(torch.randn(rows, dim, generator=g).to(hidden))
        self.slots = move(torch.randperm(slots, generator=g)[:rows])
        self.ids = move(ids)
        self.positions = move(torch.full((rows,), 1000))
        self.boundary_ids = move(boundary_ids)
        self.boundary = move(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32))
        self.table = move(torch.tensor([10, 1, 0, 0], dtype=torch.int32)[:, None].repeat(1, slots))
        self.score_sum = move(torch.zeros(slots))
        self.num_steps = move(torch.zeros(slots, dtype=torch.int32))
        self.out = move(torch.empty(rows, 2))
        self.workspace = move(torch.zeros(op.workspace_size(rows), dtype=torch.int32))
        w1 = move((torch.randn(op.HIDDEN_UNITS, dim, generator=g) / dim**0.5).to(weights))
        copies = 1 if cache == "warm" else COLD_BYTES // (w1.numel() * w1.itemsize)
        self._w1_copies = itertools.cycle([w1, *(w1.clone() for _ in range(copies - 1))])
        self.b1 = move(torch.zeros(op.HIDDEN_UNITS))
        self.w2 = move(torch.randn(1, op.HIDDEN_UNITS, generator=g) / op.HIDDEN_UNITS**0.5)
        self.b2 = move(torch.zeros(1))
        self.head = op.pack_head(self.b1, self.w2, self.b2)

    def next_w1(self) -> Tensor:
        """The copy of W1 whose turn it is."""
        return next(self._w1_copies)

    def fused(self) -> None:
        """The op."""
        op.step_score_(
            self.hidden,
            None,
            self.slots,
            self.ids,
            self.positions,
            self.boundary,
            151_668,
            self.table,
            self.out,
            self.workspace,
            self.next_w1(),
            self.head,
        )

    def eager(self) -> None:
        """The scoring as one writes it in torch, in the weights' dtype."""
        w1 = self.next_w1()
        rows = torch.isin(self.ids, self.boundary_ids).nonzero().flatten()
        h = torch.index_select(self.hidden, 0, rows).to(w1.dtype)
        a = torch.relu(torch.nn.functional.linear(h, w1, self.b1.to(w1.dtype)))
        logits = torch.nn.functional.linear(a.float(), self.w2, self.b2)
        scores = torch.sigmoid(logits).flatten()
        slots = self.slots[rows]
        self.score_sum.index_add_(0, slots, scores)
        self.num_steps.index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))

    def dense(self) -> None:
        """The scoring in torch with fixed shapes, as a graph needs it: every row, then a mask."""
        w1 = self.next_w1()
        bits = (self.boundary[self.ids >> 5] >> (self.ids & 31)) & 1
        ends = bits.bool() & (self.positions >= self.table[0][self.slots])
        ends &= self.table[1][self.slots] != 0
        a = torch.relu(torch.nn.functional.linear(self.hidden.to(w1.dtype), w1).float() + self.b1)
        scores = torch.sigmoid(torch.nn.functional.linear(a, self.w2, self.b2)).flatten()
        self.score_sum.index_add_(0, self.slots, torch.where(ends, scores, 0.0))
        self.num_steps.index_add_(0, self.slots, ends.to(torch.int32))


GRAPH_CASES = (*((64, active) for active in (0, 1, 4, 16, 64)), (4096, 0), (4096, 100))


def graph_table(
    dims: list[int], weights: list[str], hidden: str, device: str, rounds: int
) -> Iterator[str]:
    """Lines of a table: what one call adds to a graph, and what torch would add."""
    yield f"    D  hidden  weights  active of rows  {'op, us [quartiles]':>26}  {'torch':>26}"
    floor = marginal([nothing], device, rounds)[0]
    yield f"nothing at all: {floor} us, which is what the method does not resolve"
    for dim, weight, (rows, active) in itertools.product(dims, weights, GRAPH_CASES):
        call = Call(dim, active, DTYPES[hidden], DTYPES[weight], device, "warm", rows)
        fused, dense = marginal([call.fused, call.dense], device, rounds)
        case = f"{dim:5}  {hidden:6}  {weight:7}  {active:6} of {rows:4}"
        yield f"{case}  {fused!s:>26}  {dense!s:>26}"


def torch_openmp() -> str:
    """The OpenMP library that torch runs its threads with.

    A reader with another one would have threads of its own, and those that wait for work spin: each
    library's would take the cores from the other's.
    """
    maps = Path("/proc/self/maps").read_text().split()
    return next(word for word in maps if Path(word).name.startswith(("libgomp", "libiomp")))


def stream_reader() -> Callable[[Tensor], None]:
    """A function that reads every byte of a CPU tensor with torch's threads."""
    folder = Path(tempfile.mkdtemp())
    (folder / "read.c").write_text(STREAM_READ)
    compiler = [os.environ.get("CC", "gcc"), "-O3", "-mavx2", "-fPIC"]
    source, obj, library = (str(folder / f"read.{end}") for end in ("c", "o", "so"))
    subprocess.run([*compiler, "-fopenmp", "-c", source, "-o", obj], check=True)
    subprocess.run([*compiler, "-shared", obj, torch_openmp(), "-o", library], check=True)
    function = ctypes.CDLL(library).stream_read_threads
    function.argtypes = [ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int]
    function.restype = ctypes.c_longlong
    return lambda t: function(t.data_ptr(), t.numel() * t.itemsize, torch.get_num_threads())


def time_once(work: Callable[[], None], calls: int) -> float:
    """Microseconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begin) * 1e6 / calls


def measure(
    call: Call,
    hidden: str,
    weights: str,
    active: int,
    cache: str,
    rounds: int,
    device: str,
    read: Callable[[Tensor], None] | None,
) -> Result:
    works = {"op": call.fused, "eager": call.eager}
    if read is not None:
        works["read"] = lambda: read(call.next_w1())
    calls = 4
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        time_once(work, 3)
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(time_once(work, calls))
    median = {name: statistics.median(values) for name, values in times.items()}
    return Result(
        device=device,
        cache=cache,
        dim=call.hidden.shape[1],
        hidden=hidden,
        weights=weights,
        active=active,
        rounds=rounds,
        op_us=median["op"],
        eager_us=median["eager"],
        read_us=median.get("read") if active else None,
    )


def machine(device: str) -> str:
    """One line that says what ran this."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return (
        f"{model}, {torch.get_num_threads()} threads, op path {op.cpu_isa()},"
        f" torch {torch.__version__}"
    )


def table(results: list[Result]) -> str:
    lines = [
        "cache    D hidden weights active |    op us  eager us  speedup |  read us  of read",
        "-" * 82,
    ]
    for r in results:
        floor = f"{r.read_us:8.1f} {r.of_read:8.2f}" if r.read_us else f"{'':8} {'':8}"
        lines.append(
            f"{r.cache:5} {r.dim:5} {r.hidden:6} {r.weights:7} {r.active:6} |"
            f" {r.op_us:8.1f}  {r.eager_us:8.1f}  {r.speedup:6.1f}x | {floor}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the fused op.")
    parser.add_argument("--dims", type=int, nargs="+", default=[2560, 4096, 5120])
    parser.add_argument("--active", type=int, nargs="+", default=[0, 1, 4, 64])
    parser.add_argument("--weights", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--hidden", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--cache", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not (torch.cuda.is_available() and op.has_cuda()):
        sys.exit("bench/op.py: no CUDA device, or the op was built without CUDA")

    torch.set_num_threads(args.threads)
    read = stream_reader() if args.device == "cpu" and platform.machine() == "x86_64" else None
    command = "python " + shlex.join(sys.argv)
    print(f"{machine(args.device)}\n{command}\n")
    if args.device == "cuda":
        for line in graph_table(args.dims, args.weights, args.hidden, "cuda", args.rounds):
            print(line, flush=True)
        return
    results = []
    for cache, dim, weights, active in itertools.product(
        args.cache, args.dims, args.weights, args.active
    ):
        call = Call(dim, active, DTYPES[args.hidden], DTYPES[weights], args.device, cache)
        names = (args.hidden, weights)
        results.append(measure(call, *names, active, cache, args.rounds, args.device, read))
    print(table(results))
    if args.json:
        rows = [{**asdict(r), "speedup": r.speedup, "of_read": r.of_read} for r in results]
        report = {"machine": machine(args.device), "command": command, "results": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
