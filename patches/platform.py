"""A plain-CPU SGLang platform named ``step_cpu``, for machines without an accelerator or AMX.

Slow on purpose: it exists to develop and test on, with the real engine, where SGLang's own CPU
platform cannot start.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from step_sglang import protocol

NAME = "step_cpu"
SPECULATION = ("NGRAM", "STANDALONE", "EAGLE", "EAGLE3")  # whose kernels exist in torch


def activate() -> str | None:
    """Entry point: the platform's class path when SGLANG_PLATFORM asks for it, else None.

    It must stay silent otherwise, or it would displace the platform of a real accelerator.
    """
    if os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    # Three processes import thousands of modules each: a sixth of a start is the collector, which
    # finds nothing meanwhile.
    gc.set_threshold(50_000, 20, 20)
    return f"{__name__}:{StepCpuPlatform.__name__}"


class StepCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """CPU through torch's own kernels: no graphs, no Triton, no pinned memory."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        """Attention backend that needs nothing but torch."""
        return "torch_native"

    def init_backend(self) -> None:
        """Attend to a batch at once, under the name by which SGLang knows torch's own attention.

        A name of its own would not do: SGLang tells by ``torch_native`` that Triton cannot be used.
        """
        if protocol.VIRTUAL_GPU_ENV in os.environ:
            return  # nothing attends there, and SGLang's own backend prepares nothing for it
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from step_sglang.patches.cpu_attention import BatchedAttentionBackend

        register_attention_backend("torch_native")(BatchedAttentionBackend)

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Not for speed, but to be tested with."""
        return algorithm in SPECULATION

    def get_speculative_worker_cls(self, algorithm: str) -> type | None:
        """SGLang's own worker, once it can find the kernels."""
        from step_sglang.patches import cpu_speculation  # SGLang is not ready for it before

        cpu_speculation.install()
        return None

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        """Pool slots of a draft."""
        from step_sglang.patches import cpu_speculation

        return cpu_speculation.extend_cache_locs

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """There is no device to pin memory for."""
        return False
