"""Networks of one size on volumes of any: overlapping windows whose results are averaged.

Velocities that are averaged at every step of a trajectory leave no seams (Bar-Tal et al. 2023,
MultiDiffusion, arXiv 2302.08113): all windows work on one noise lattice, and what they disagree about is
settled before the next step builds on it.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

Shape3 = tuple[int, int, int]


def window_starts(length: int, window: int) -> list[int]:
    """Starts of windows that cover an axis, half a window apart or less, evenly spread."""
    if length <= window:
        return [0]
    count = -(-(length - window) // max(1, window // 2)) + 1
    return [round(n * (length - window) / (count - 1)) for n in range(count)]


def window_weight(shape: Sequence[int]) -> Tensor:
    """Weights `(I, J, K)` of a window's values: 1 in the middle, falling linearly towards its faces."""
    i, j, k = (1 - ((torch.arange(n) + 0.5) / n * 2 - 1).abs() for n in shape)
    return i[:, None, None] * j[None, :, None] * k[None, None, :]


def over_windows(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    volumes: Sequence[Tensor],
    window: Shape3,
    scale: tuple[Shape3, Shape3] = ((1, 1, 1), (1, 1, 1)),
    *,
    at_once: int = 1,
) -> tuple[Tensor, ...]:
    """Apply a function of windows to volumes, and average what it gives where windows overlap.

    Args:
        function: of parts `(B, C, *window * scale[0])`, one for each volume, to one or more of the size
            `window * scale[1]`.
        volumes: `(B, C, *lattice * scale[0])`, at least as large as a window.
        window: its size on the lattice, on which windows are placed.
        scale: voxels of the volumes and of the results for each point of the lattice.
        at_once: windows that are given to the function in one batch.

    Returns:
        `(B, C, *lattice * scale[1])` for each result, in their dtype.
    """
    before, after = scale
    lattice = [n // s for n, s in zip(volumes[0].shape[2:], before, strict=True)]
    corners = list(product(*(window_starts(n, w) for n, w in zip(lattice, window, strict=True))))
    if corners == [(0, 0, 0)] and tuple(lattice) == tuple(window):
        return _tuple(function(*volumes))
    size = [w * s for w, s in zip(window, after, strict=True)]
    weight = window_weight(size).to(volumes[0].device)
    batch = len(volumes[0])
    sums: list[Tensor] = []
    total = torch.zeros([n * s for n, s in zip(lattice, after, strict=True)], device=weight.device)
    for first in range(0, len(corners), at_once):
        some = corners[first : first + at_once]
        parts = [torch.cat([_at(v, corner, window, before) for corner in some]) for v in volumes]
        results = _tuple(function(*parts))
        if not sums:
            sums = [r.new_zeros((batch, r.shape[1], *total.shape), dtype=torch.float32) for r in results]
        for n, corner in enumerate(some):
            _at(total[None, None], corner, window, after).add_(weight)
            for found, result in zip(sums, results, strict=True):
                _at(found, corner, window, after).add_(result[n * batch : (n + 1) * batch] * weight)
    return tuple((found / total).to(result.dtype) for found, result in zip(sums, results, strict=True))


def _at(volume: Tensor, corner: Sequence[int], window: Shape3, scale: Shape3) -> Tensor:
    """The part of a volume that a window covers, as a view."""
    i, j, k = (slice(c * s, (c + w) * s) for c, w, s in zip(corner, window, scale, strict=True))
    return volume[:, :, i, j, k]


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
