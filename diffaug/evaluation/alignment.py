"""How alike two volumes are once one has been moved over the other."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

# What a volume is moved by at most to find its place on another one: shift, as a share of half a side; turn
# about each axis, radians; natural logarithm of the stretch along each axis.
SHIFT, TURN, STRETCH = 0.3, 0.35, 0.2
STEPS, LEARNING_RATE = 40, 0.1


def standard_rows(features: Tensor) -> Tensor:
    """Rows `(..., D)` of zero mean and unit length, float32, whose products are Pearson's correlations; a
    constant row becomes zero."""
    rows = features.float()
    centred = rows - rows.mean(-1, keepdim=True)
    # What float32 leaves of a constant row.
    constant = centred.abs().amax(-1, keepdim=True) <= 1e-6 * rows.abs().amax(-1, keepdim=True)
    return F.normalize(centred.masked_fill(constant, 0), dim=-1)


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of each row of `(N, D)` with each row of `(M, D)`: `(N, M)`, float32, -1 to 1."""
    # Rounding must not make a copy more than equal.
    return (standard_rows(first) @ standard_rows(second).T).clamp(-1, 1)


def correlations_over_views(views: Tensor, others: Tensor) -> Tensor:
    """Largest correlation of any of the views `(N, V, D)` of a case with each row of `(M, D)`: `(N, M)`."""
    return correlations(views.flatten(0, 1), others).view(*views.shape[:2], -1).amax(1)


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
    best = torch.full((len(first), len(second)), -1.0, device=first.device)
    for shift in product(*(range(-r, r + 1) for r in reaches)):
        mine = tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shift, sides, strict=True))
        yours = tuple(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shift, sides, strict=True))
        a, b = first[:, :, *mine].flatten(1), second[:, :, *yours].flatten(1)
        torch.maximum(best, correlations(a, b), out=best)
    return best


@torch.enable_grad()
def registered_correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of pairs of volumes, the second shifted, turned and stretched to fit the first.

    Gradient ascent (Adam) from no movement; where the second does not reach, nothing is compared.

    Args:
        first: volumes `(P, C, I, J, K)`, float32.
        second: volumes `(P, C, I, J, K)`.

    Returns:
        The largest correlation on the way, `(P,)`, float32: never less than that of the volumes as they are.
    """
    # Shift, turn and stretch of each pair, through tanh within their limits.
    limits = first.new_tensor([SHIFT] * 3 + [TURN] * 3 + [STRETCH] * 3)
    movement = first.new_zeros((len(first), 9)).requires_grad_()
    optimiser = torch.optim.Adam([movement], LEARNING_RATE)
    best = first.new_full((len(first),), -1.0)
    for _ in range(STEPS):
        points = _points(torch.tanh(movement) * limits, first)
        moved = F.grid_sample(second, points, padding_mode="border", align_corners=False)
        inside = (points.detach().abs() <= 1).all(-1)[:, None].expand_as(first)
        found = _correlation_inside(first, moved, inside)
        best = torch.maximum(best, found.detach())
        optimiser.zero_grad()
        (-found.sum()).backward()
        optimiser.step()
    return best.clamp(max=1)


def _points(movement: Tensor, like: Tensor) -> Tensor:
    """Where each voxel of `like` lies in the moved volume, as `grid_sample` counts: last axis first, -1 to 1
    from end to end."""
    shift, turn, stretch = movement.split(3, dim=1)
    cosine, sine = torch.cos(turn), torch.sin(turn)
    matrix = torch.eye(3, device=movement.device).expand(len(movement), 3, 3)
    for axis in range(3):
        a, b = (n for n in range(3) if n != axis)
        about = torch.eye(3, device=movement.device).repeat(len(movement), 1, 1)
        about[:, a, a] = about[:, b, b] = cosine[:, axis]
        about[:, a, b], about[:, b, a] = -sine[:, axis], sine[:, axis]
        matrix = about @ matrix
    matrix = matrix * stretch.exp()[:, None]
    # Turns are of voxels, coordinates count half sides.
    sides = like.new_tensor(like.shape[:1:-1])
    matrix = matrix * sides / sides[:, None]
    return F.affine_grid(torch.cat([matrix, shift[:, :, None]], 2), list(like.shape), align_corners=False)


def _correlation_inside(first: Tensor, second: Tensor, inside: Tensor) -> Tensor:
    """Pearson's correlation of pairs `(P, C, I, J, K)` over the voxels that are inside."""
    weights = inside.flatten(1).to(first.dtype)
    weights = weights / weights.sum(1, keepdim=True)

    def centred(volumes: Tensor) -> Tensor:
        rows = volumes.flatten(1)
        return (rows - (rows * weights).sum(1, keepdim=True)) * weights.sqrt()

    return F.cosine_similarity(centred(first), centred(second), dim=1, eps=1e-6)
