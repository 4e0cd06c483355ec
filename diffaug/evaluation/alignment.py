"""How alike two volumes are once one has been shifted over the other."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


def standard_rows(features: Tensor) -> Tensor:
    """Rows `(..., D)` of zero mean and unit length, float32, whose products are Pearson's correlations."""
    centred = features.float() - features.float().mean(-1, keepdim=True)
    return F.normalize(centred, dim=-1)


def aligned_correlations(first: Tensor, second: Tensor, reach: int) -> Tensor:
    """Pearson's correlation of each volume with each other one, at the shift at which it is largest.

    Of two volumes that are shifted against each other, what both show is compared.

    Args:
        first: volumes `(N, C, I, J, K)`.
        second: volumes `(M, C, I, J, K)`.
        reach: voxels of a shift along each axis at most; never more than a quarter of a side.

    Returns:
        Correlations `(N, M)`, float32, at most 1.
    """
    sides = first.shape[2:]
    reaches = [min(reach, side // 4) for side in sides]
    best = first.new_full((len(first), len(second)), -1.0, dtype=torch.float32)
    for shift in product(*(range(-r, r + 1) for r in reaches)):
        mine = tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shift, sides, strict=True))
        yours = tuple(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shift, sides, strict=True))
        a, b = first[:, :, *mine].flatten(1), second[:, :, *yours].flatten(1)
        torch.maximum(best, standard_rows(a) @ standard_rows(b).T, out=best)
    # Rounding must not make a copy more than equal.
    return best.clamp(max=1)
