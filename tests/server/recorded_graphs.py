"""Decode graphs on the CPU: SGLang's real decode-graph runner over a backend that records ops.

What a CUDA graph does and eager execution hides is kept: Python runs only while a shape is warmed
up and recorded; a replay runs the recorded ops on the recorded tensors and nothing else; and what
reads the device's values into Python cannot be recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES = (4, 8, 16)
FLAGS = (  # of a server that decodes in graphs of these sizes
    *("--cuda-graph-bs-decode", *map(str, SIZES), "--cuda-graph-backend-decode", "full"),
    *("--disable-prefill-cuda-graph", "--max-running-requests", "20", "--max-total-tokens", "3000"),
)
LOG = "STEP_TEST_REPLAYS"  # a file that gets one line per replay
NOT_IN_A_GRAPH = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal"}


@dataclass
class Tape(TorchDispatchMode):
    """The ops of one pass, with the tensors they ran on."""

    ops: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name in NOT_IN_A_GRAPH:
            raise RuntimeError(f"{name} reads the device, which cannot be captured")
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, before in self.ops:
            now = func(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if not isinstance(old, torch.Tensor) or old is new:
                    continue
                # In-place ops and views have written, or are, the recorded memory.
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class RecordedGraphBackend:
    """What `FullCudaGraphBackend` is on CUDA."""

    def __init__(self, runner: Any, *, enable_memory_saver: bool = False) -> None:
        self._runner = runner
        self._tapes: dict[Any, Tape] = {}
        self._outputs: dict[Any, Any] = {}

    @contextlib.contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(
        self,
        shape_key: Any,
        forward_fn: Callable[[], Any],
        capture_inputs: Any = None,
        post_warmup_hook: Callable[[], None] | None = None,
    ) -> None:
        for _ in range(2):
            forward_fn()
            if post_warmup_hook is not None:
                post_warmup_hook()
        with Tape() as tape:
            self._outputs[shape_key] = forward_fn()
        self._tapes[shape_key] = tape

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._tapes

    @contextlib.contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        self._note(static_forward_batch)
        self._tapes[shape_key].replay()
        return self._outputs[shape_key]

    def _note(self, batch: Any) -> None:
        """What the padded rows hold, which the graph computes like all others."""
        path = os.environ.get(LOG)
        if path is None:
            return
        rows, padded = batch.batch_size, self._runner.bs
        buffers = self._runner.buffers
        line = {
            "rows": rows,
            "padded": padded,
            "slots": buffers.req_pool_indices[:rows].tolist(),
            "padding_ids": buffers.input_ids[rows:padded].tolist(),
            "padding_slots": buffers.req_pool_indices[rows:padded].tolist(),
        }
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def cleanup(self) -> None:
        self._tapes.clear()
        self._outputs.clear()


def upgrade_platform(module: ModuleType) -> None:
    """Let the CPU platform capture decode graphs; for ``step_sglang.patches.platform``."""
    from sglang.srt.platforms.interface import PlatformCapabilities

    def get_graph_runner_cls(self: Any) -> type:
        from sglang.srt.model_executor.runner import decode_cuda_graph_runner

        @contextlib.contextmanager
        def on_no_stream(stream: Any = None) -> Iterator[Any]:
            yield SimpleNamespace(stream=None)

        # What a device module has and torch's for the CPU lacks: no stream is ever captured here.
        torch.cpu.is_current_stream_capturing = lambda: False
        decode_cuda_graph_runner.graph_capture = on_no_stream
        decode_cuda_graph_runner.get_or_create_global_graph_capture_stream = lambda: None
        return decode_cuda_graph_runner.DecodeCudaGraphRunner

    platform = module.StepCpuPlatform
    platform.capabilities = PlatformCapabilities(graph_capture=True)
    platform.get_graph_runner_cls = get_graph_runner_cls
    platform.get_full_graph_backend_cls = lambda self: RecordedGraphBackend


def capture_without_compiling(module: ModuleType) -> None:
    """SGLang captures on a CPU only where it compiles; for its ``cuda_graph_setup``."""
    real = module.get_flags

    class Capture:
        enable_torch_compile = True

        def __getattr__(self, name: str) -> Any:
            return getattr(real().capture, name)

    class Flags:
        capture = Capture()

        def __getattr__(self, name: str) -> Any:
            return getattr(real(), name)

    module.get_flags = Flags


def make_attention_static(module: ModuleType) -> None:
    """Attention of one shape per batch size; for ``step_sglang.patches.cpu_attention``.

    The real one divides the requests by their lengths, which no graph can hold.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    base = module.BatchedAttentionBackend

    class StaticAttention(base):  # type: ignore[misc, valid-type]
        def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            """The graph reads the pools themselves."""

        def get_cuda_graph_seq_len_fill_value(self) -> int:
            return 1

        def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
            """Nothing is prepared: the graph reads the pools and the static buffers."""

        def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):  # type: ignore[no-untyped-def]
            pool = self.token_to_kv_pool
            if save_kv_cache:
                location = KVWriteLoc(forward_batch.out_cache_loc, None)
                pool.set_kv_buffer(layer, location, k, v)
            heads, kv_heads, width = layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim
            tokens = self.req_to_token_pool.req_to_token[forward_batch.req_pool_indices].long()
            keys = pool.get_key_buffer(layer.layer_id)[tokens]  # [B, L, kv_heads, width]
            values = pool.get_value_buffer(layer.layer_id)[tokens]
            query = q.reshape(-1, kv_heads, heads // kv_heads, width)
            scores = torch.einsum("bkgd,blkd->bkgl", query, keys) * layer.scaling
            beyond = torch.arange(tokens.shape[1]) >= forward_batch.seq_lens[:, None]
            scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
            out = torch.einsum("bkgl,blkd->bkgd", scores.softmax(-1), values)
            return out.reshape(-1, heads * width)

    module.BatchedAttentionBackend = StaticAttention
    register_attention_backend("torch_native")(StaticAttention)  # a warm server has the other


def after_capture(module: ModuleType) -> None:
    """A fault: STEP begins when the graphs are there; for ``step_sglang.patches.scheduler``."""
    real = module.init_all_cuda_graphs

    def late(original: Callable[[Any], None], scheduler: Any) -> None:
        original(scheduler)
        real(lambda scheduler: None, scheduler)

    module.init_all_cuda_graphs = late


def only_with_traces(module: ModuleType) -> None:
    """A fault: Python decides at capture what a replay must do; for ``patches.forward``."""
    module._may_be_replayed = lambda hidden_states: False


def another_table(module: ModuleType) -> None:
    """A fault: the state is allocated anew after capture; for ``step_sglang.patches.scheduler``."""
    real = module._require_op_in_graphs

    def replace(runner: Any) -> None:
        real(runner)
        from step_sglang.patches import forward

        forward._active.slots.table = forward._active.slots.table.clone()

    module._require_op_in_graphs = replace


GRAPHS = (
    ("step_sglang.patches.platform", "tests.server.recorded_graphs:upgrade_platform"),
    (
        "sglang.srt.model_executor.model_runner_components.cuda_graph_setup",
        "tests.server.recorded_graphs:capture_without_compiling",
    ),
    ("step_sglang.patches.cpu_attention", "tests.server.recorded_graphs:make_attention_static"),
)
