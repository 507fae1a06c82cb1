"""What the votes of related traces are worth together. Knows nothing of servers.

Traces that share the beginning of their text are no independent witnesses. Let trace i have the
weight s_i, and let r_ij be what i and j have in common, as a share of both (the shared steps over
the geometric mean of their lengths). Take each trace for an observation of the same quantity with
the precision s_i, and errors correlated by r_ij: this is how errors correlate that add up step by
step along a tree (Felsenstein 1985, phylogenetic contrasts). The precision of the best weighted
mean is then what the traces weigh together:

    W = max over x >= 0 of (sum_i x_i)^2 / sum_ij x_i x_j r_ij / sqrt(s_i s_j)

- Without relatives it is the sum of the s_i: the plain vote.
- m traces with equal weights s and correlations r weigh s m / (1 + (m - 1) r): the effective sample
  size by Kish's design effect (Survey Sampling, 1965, section 5.4). However many they are, they
  stay below s / r: one lucky prefix cannot outvote the rest.
- One trace more never makes it less (its x may be 0), and never adds more than its own weight (by
  Cauchy's inequality, as no r is negative). The early-finish rules count on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from step_sglang import protocol

_RIDGE = 1e-9  # two traces may be the same


@dataclass(frozen=True)
class Lineage:
    """A trace's way through its tree: of each trace that it is made of, the name and at how many
    steps it ends there; the last is itself."""

    path: tuple[tuple[str, int], ...]

    @property
    def steps(self) -> int:
        """Of the whole trace."""
        return self.path[-1][1]

    def shared(self, other: Lineage) -> int:
        """Steps from the beginning that are the same in both."""
        common = 0
        for (name, end), (other_name, other_end) in zip(self.path, other.path, strict=False):
            if name != other_name:
                break
            common = min(end, other_end)
            if end != other_end:
                break
        return common

    def correlation(self, other: Lineage) -> float:
        """Shared steps over the geometric mean of both lengths, in [0, 1]."""
        if self.steps < 1 or other.steps < 1:
            return 0.0
        ratio = self.shared(other) / (self.steps * other.steps) ** 0.5
        return float(min(1.0, ratio))


def lineage_of(meta_info: Mapping[str, Any]) -> Lineage | None:
    """Of a trace, by what its response says; None where it says nothing of STEP.

    A branch begins with one step fewer than it shares: the last is scored again, in its own first
    pass. Where that gave no score, and the branch ended soon, it has fewer steps than its ancestors
    are said to; nothing is shared beyond its own end.
    """
    step = meta_info.get(protocol.META_KEY)
    name = meta_info.get("id")
    if not step or name is None:
        return None
    branch = step.get(protocol.META_BRANCH)
    end = (str(name), int(step[protocol.META_NUM_STEPS]))
    if branch is None:
        return Lineage((end,))
    path = [(str(branch[protocol.BRANCH_NAME]), end[1])]
    for ancestor, steps in reversed(branch[protocol.BRANCH_LINEAGE]):
        path.append((str(ancestor), min(int(steps), path[-1][1])))
    return Lineage(tuple(reversed(path)))


def weight_together(voters: Sequence[tuple[float, Lineage | None]]) -> float:
    """What traces that give the same answer weigh together.

    Args:
        voters: weight in [0, 1] and lineage of each; without a lineage it is related to none.
    """
    families: dict[str, list[tuple[float, Lineage]]] = {}
    total = 0.0
    for weight, lineage in voters:
        if lineage is None:
            total += weight
        elif weight > 0:
            families.setdefault(lineage.path[0][0], []).append((weight, lineage))
    return total + sum(
        family[0][0] if len(family) == 1 else _precision(family) for family in families.values()
    )


def _precision(family: Sequence[tuple[float, Lineage]]) -> float:
    """W of traces with the same root."""
    # Late: half a second and more of imports, for votes with branches alone.
    import numpy as np
    from scipy.optimize import nnls

    roots = np.sqrt([weight for weight, _ in family])
    correlations = np.array([[a.correlation(b) for _, b in family] for _, a in family])
    np.fill_diagonal(correlations, 1.0)
    try:
        # With y_i = x_i / sqrt(s_i): the maximum is the sum of sqrt(s_i) y_i where y >= 0 minimises
        # y'Ry / 2 less that sum, which is a least-squares problem by R's factor.
        factor = np.linalg.cholesky(correlations + _RIDGE * np.eye(len(family)))
        y, _ = nnls(factor.T, np.linalg.solve(factor, roots))
        return float(roots @ y)
    except (np.linalg.LinAlgError, RuntimeError):
        # No tree has such lineages, or the search did not end. A vote does not fail for it: what
        # the plain weighted mean (x_i = s_i) is worth, or the heaviest alone, is never too much.
        weights = roots**2
        plain = weights.sum() ** 2 / (roots @ correlations @ roots)
        return float(max(plain, weights.max()))
