"""Improved precision and recall of a set of features against another (Kynkäänniemi et al. 2019, arXiv 1904.06991).

Precision: the part of the candidate's samples that lie among the reference's, within the distance from one of them to its k-th
neighbour. Recall: the same the other way round, what the candidate still covers.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3


def precision_recall(candidate: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return precision and recall, each in [0, 1], of features `[n, d]` against `[m, d]`.

    Raises:
        ValueError: a set with no more rows than `neighbours`.
    """
    if min(len(candidate), len(reference)) <= neighbours:
        raise ValueError(f"{len(candidate)} and {len(reference)} samples have no {neighbours} neighbours each; take more samples")
    distances = torch.cdist(candidate.double(), reference.double())
    return _covered(distances, _radii(reference, neighbours)), _covered(distances.T, _radii(candidate, neighbours))


def _radii(x: Tensor, neighbours: int) -> Tensor:
    """Return each row's distance to its k-th nearest other row; the nearest of all is itself."""
    return torch.cdist(x.double(), x.double()).kthvalue(neighbours + 1, dim=1).values


def _covered(distances: Tensor, radii: Tensor) -> float:
    return (distances <= radii).any(1).double().mean().item()
