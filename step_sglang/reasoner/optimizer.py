"""Muon: momentum whose update is orthogonalised, for the weight matrices. In fp32, for CPUs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


class Muon:
    """Groups parameters by shape so that each group is one batched product."""

    def __init__(self, parameters: Iterable[Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, ...], list[Parameter]] = defaultdict(list)
        for parameter in parameters:
            self.groups[tuple(parameter.shape)].append(parameter)
        self.velocity = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for (rows, columns), group in self.groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity = self.velocity[rows, columns]
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(velocity, self.momentum))
            scale = lr * max(1.0, rows / columns) ** 0.5
            for parameter, delta in zip(group, update, strict=True):
                parameter.sub_(delta, alpha=scale)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Approximately U V^T of each matrix's SVD, by a quintic Newton-Schulz iteration."""
    x: Tensor = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x
