"""Lets SGLang pad batches to a multiple of the ranks on a CPU; for ``distributed.parallel_state``.

With ``--moe-dense-tp-size`` a batch is scattered over the ranks between its layers. SGLang does so
by operations that it has for CUDA alone; here they are an all-reduce and an all-gather.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


def scatter_on_the_cpu(module: ModuleType) -> None:
    def reduce_scatter_tensor(self: Any, output: torch.Tensor, input: torch.Tensor) -> None:
        whole = input.clone()
        torch.distributed.all_reduce(whole, group=self.device_group)
        output.copy_(whole.chunk(self.world_size)[self.rank_in_group])

    def all_gather_into_tensor(self: Any, output: torch.Tensor, input: torch.Tensor) -> None:
        parts = [torch.empty_like(input) for _ in range(self.world_size)]
        torch.distributed.all_gather(parts, input.contiguous(), group=self.device_group)
        output.copy_(torch.cat(parts))

    module.GroupCoordinator.reduce_scatter_tensor = reduce_scatter_tensor
    module.GroupCoordinator.all_gather_into_tensor = all_gather_into_tensor


def copy_on_the_cpu(module: ModuleType) -> None:
    """For ``layers.dp_attention``: the copy that SGLang has for its own CPU platform."""
    module.memcpy_func = module.memcpy_cpu


def rows_of_slots(module: ModuleType) -> None:
    """A fault: as many rows as there are slots; for ``step_sglang.patches.scheduler``."""
    module._max_rows = lambda requests: 0
