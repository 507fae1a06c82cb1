"""How long a pass takes on a GPU, by a roofline of data sheets and model configurations.

Nothing here was measured. A decode step
reads the weights and the keys and values that its rows attend to, at a share of the memory's speed,
or computes at a share of the peak, whichever takes longer; and every row has a price of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from step_sglang.errors import nearest
from step_sglang.simulation.errors import SimulationError

# Shares of the data sheets' figures that kernels reach, and what rows and passes cost beside them:
# assumptions, the usual ones of rooflines.
MEMORY_SHARE = 0.8
COMPUTE_SHARE = 0.6
ROW_SECONDS = 20e-6  # sampling, and whatever else grows with the rows of a step
PASS_SECONDS = 0.4e-3  # from one pass to the next: launching a graph, norms, sampling
POOL_SHARE = 0.88  # of the memory, for weights and KV together; SGLang's choice on 80 GB is alike
_BYTES = 2  # of a weight, a key or a value in bf16


_Preset = TypeVar("_Preset")


@dataclass(frozen=True)
class Gpu:
    """One GPU. Dense bf16, without sparsity."""

    name: str
    memory: float  # bytes
    bandwidth: float  # bytes a second
    flops: float  # a second
    source: str


@dataclass(frozen=True)
class Network:
    """A decoder's shape, as its config.json has it. ``experts`` 0: a dense feed-forward part."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    feed_forward: int  # width; of one expert where there are experts
    vocabulary: int
    tied: bool  # the head is the embedding
    source: str
    experts: int = 0
    experts_used: int = 0  # by a token

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * _BYTES

    @property
    def expert(self) -> int:
        """Weights of one feed-forward part."""
        return 3 * self.hidden * self.feed_forward

    @property
    def shared(self) -> int:
        """Weights that every step reads: attention, the head, and no experts. Norms are left out.

        Of an embedding that is not the head as well, a step reads a row per token: nothing.
        """
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        dense = 0 if self.experts else self.expert
        router = self.hidden * self.experts
        return self.layers * (attention + dense + router) + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        return self.shared + embedding + self.layers * self.experts * self.expert

    @property
    def used(self) -> int:
        """Weights that a token is multiplied with."""
        return self.shared + self.layers * self.experts_used * self.expert


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 2.039e12, 312e12, "NVIDIA A100 data sheet, 80GB SXM"),
        Gpu("h100", 80e9, 3.35e12, 989e12, "NVIDIA H100 data sheet, SXM; 1,979 with sparsity"),
        Gpu("h200", 141e9, 4.8e12, 989e12, "NVIDIA H200 data sheet, SXM; 1,979 with sparsity"),
        Gpu("b200", 180e9, 8e12, 2.25e15, "NVIDIA DGX B200 data sheet, an eighth of eight GPUs"),
    )
}
NETWORKS = {
    network.name: network
    for network in (
        Network(
            "qwen3-4b", 36, 2560, 32, 8, 128, 9728, 151936, True, "config.json of Qwen/Qwen3-4B"
        ),
        Network(
            "qwen3-8b", 36, 4096, 32, 8, 128, 12288, 151936, False, "config.json of Qwen/Qwen3-8B"
        ),
        Network(
            "phi-4", 40, 5120, 40, 10, 128, 17920, 100352, False,
            "config.json of microsoft/Phi-4-reasoning",
        ),
        Network(
            "qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 151936, False,
            "config.json of Qwen/Qwen3-30B-A3B", experts=128, experts_used=8,
        ),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """A GPU by name, in any case; raises SimulationError."""
    return _named("GPU", name, GPUS)


def network_named(name: str) -> Network:
    """A model by name, in any case; raises SimulationError."""
    return _named("model", name, NETWORKS)


def _named(kind: str, name: str, known: Mapping[str, _Preset]) -> _Preset:
    found = known.get(name.lower())
    if found is None:
        near = nearest(name, known)
        raise SimulationError(
            f"there is no {kind} preset {name[:40]!r}{near}; there are {', '.join(known)}"
        )
    return found


@dataclass(frozen=True)
class StepTime:
    """Seconds of a pass, from its rows and tokens."""

    base: float  # per pass, beside reading the weights
    weights: float  # reading what every pass reads
    row: float  # per row
    attended: float  # per token that a row attends to
    compute: float = 0.0  # per token that is computed
    pair: float = 0.0  # per token and token before it, in a prefill
    experts: int = 0
    experts_used: int = 0
    expert_weights: float = 0.0  # reading the weights of all experts

    def decode(self, rows: int, attended: float) -> float:
        """A decode step of ``rows`` traces, which attend to so many tokens together."""
        matrices = max(self._reading(rows), rows * self.compute)
        return self.base + matrices + rows * self.row + attended * self.attended

    def prefill(self, rows: int, new: int, pairs: float) -> float:
        """A pass that computes ``new`` tokens of ``rows`` requests, each with those before it."""
        matrices = max(self._reading(new), new * self.compute)
        return self.base + matrices + rows * self.row + pairs * self.pair

    def _reading(self, tokens: int) -> float:
        if not self.experts:
            return self.weights
        # Of independent choices: the share of the experts that at least one token takes.
        untouched = (1 - self.experts_used / self.experts) ** tokens
        return self.weights + self.expert_weights * (1 - untouched)

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def step_time(
    gpu: Gpu,
    network: Network,
    memory_share: float = MEMORY_SHARE,
    compute_share: float = COMPUTE_SHARE,
    row: float = ROW_SECONDS,
    between: float = PASS_SECONDS,
) -> StepTime:
    """The roofline of a model on one GPU."""
    bandwidth, flops = gpu.bandwidth * memory_share, gpu.flops * compute_share
    expert_bytes = network.layers * network.experts * network.expert * _BYTES
    return StepTime(
        base=between,
        weights=network.shared * _BYTES / bandwidth,
        row=row,
        attended=network.kv_bytes / bandwidth,
        compute=2 * network.used / flops,
        # Scores and their sum with the values: two products of a head's size, in every head.
        pair=4 * network.layers * network.heads * network.head_size / flops,
        experts=network.experts,
        experts_used=network.experts_used,
        expert_weights=expert_bytes / bandwidth,
    )


def kv_pool(gpu: Gpu, network: Network, share: float = POOL_SHARE) -> int:
    """KV tokens that fit beside the weights.

    Raises:
        SimulationError: not even the weights fit.
    """
    left = gpu.memory * share - network.parameters * _BYTES
    tokens = int(left // network.kv_bytes)
    if tokens < 1:
        raise SimulationError(
            f"{network.name} does not fit on one {gpu.name}: its weights take "
            f"{network.parameters * _BYTES / 1e9:.0f} GB of {gpu.memory / 1e9:.0f}"
        )
    return tokens
