"""Lets SGLang's LoRA start where no device is: pinned memory is then ordinary memory.

Python imports this module in every process whose PYTHONPATH names this folder. SGLang's torch
backend for LoRA asks for pinned memory without asking whether there is a device to pin it for, and
torch refuses that without a CUDA driver. Pinning changes the speed of copies only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def _without_pinning(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(create)
    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return create(*args, **kwargs)

    return unpinned


if not torch.cuda.is_available():
    for _name in ("tensor", "empty", "zeros", "ones", "full"):
        setattr(torch, _name, _without_pinning(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, device=None: self
