"""Lets SGLang's hierarchical cache run without a GPU; for modules under ``mem_cache.pool_host``.

SGLang registers its host pool with CUDA, and copies between it and the device by CUDA kernels. Here
the host pool is ordinary memory, and the copies are torch's. All else is SGLang's own.
"""

from __future__ import annotations

from types import ModuleType

import torch


def without_registration(module: ModuleType) -> None:
    """For ``pool_host.common``."""
    module._cuda_host_register = lambda buffer, granularity: None  # type: ignore[attr-defined]
    module._cuda_host_unregister = lambda buffer: None  # type: ignore[attr-defined]


def copies(module: ModuleType) -> None:
    """For ``pool_host.mha``: what the backend ``direct`` does with the layout ``layer_first``."""

    def transfer_kv_direct(
        src_layers: list[torch.Tensor],
        dst_layers: list[torch.Tensor],
        src_indices: torch.Tensor,
        dst_indices: torch.Tensor,
        page_size: int,
    ) -> None:
        for source, target in zip(src_layers, dst_layers, strict=True):
            target[dst_indices] = source[src_indices].view(-1, *target.shape[1:])

    module.transfer_kv_direct = transfer_kv_direct  # type: ignore[attr-defined]
