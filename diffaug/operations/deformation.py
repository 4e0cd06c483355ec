"""Other shapes of the same anatomy: cases moved by a smooth random displacement, within bounds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import label as components
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from diffaug.generators.cases import to_dtype
from diffaug.generators.grid import Placement
from diffaug.generators.labels import most_likely

# Spacing of the displacement's control points, as a share of the grid's longest side.
CONTROL = 1 / 4
# Shares of a displacement that are tried, largest first, until the result is within bounds.
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
# Least factor by which a deformation may locally shrink a volume: what folds has one below 0.
LEAST_JACOBIAN = 0.1


class Deformed(NamedTuple):
    """Image `(C, I, J, K)`, label map `(1, I, J, K)`, and the share of the displacement that was within
    bounds: 0 where none was, and both are as they were."""

    image: Tensor
    label: Tensor
    share: float


def check_deformation(deformation: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a deformation.

    Raises:
        ValueError: unless they are an amplitude (mm) and a seed, at least 0 both.
    """
    amplitude, seed = deformation.get("amplitude"), deformation.get("seed")
    if not (isinstance(amplitude, int | float) and amplitude >= 0 and isinstance(seed, int) and seed >= 0):
        raise ValueError(
            f'deformation must be {{"amplitude": mm, "seed": integer}}, both at least 0, got {deformation!r}'
        )
    return {"amplitude": float(amplitude), "seed": seed}


def deform(
    image: Tensor,
    label: Tensor,
    placement: Placement,
    spacing: NDArray[np.float64],
    *,
    amplitude: float,
    seed: int,
    volumes: Mapping[int, tuple[float, float]],
) -> Deformed:
    """Move a case by a smooth random displacement.

    The displacement is a cubic spline through normal draws, and fades where the case goes on beyond the
    generator's grid. It is made smaller until it folds nothing (its Jacobian determinant is positive), each
    label has as many connected components as before, and its volume lies within its bounds, or nearer to
    them than before.

    Args:
        image: `(C, I, J, K)`, any numeric dtype.
        label: `(1, I, J, K)`, integers.
        placement: of the generator's grid in the case.
        spacing: of the case, mm, in its own axes.
        amplitude: largest displacement, mm.
        seed: of the draws.
        volumes: id -> smallest and largest volume, mm^3; labels without one may have any.
    """
    window = placement.window()
    sizes = [float(spacing[axis]) for axis in placement.axes]
    old = placement.take(label, window)[0]
    field = _displacement(placement, amplitude, seed)
    for share in SHARES:
        moved = share * field
        if _least_jacobian(moved, sizes) <= LEAST_JACOBIAN:
            continue
        positions = _positions(moved, sizes)
        new = _moved_label(old, positions)
        if _within_bounds(old, new, volumes, float(np.prod(sizes))):
            still = (moved == 0).all(dim=0)
            out = Deformed(image.clone(), label.clone(), share)
            placement.put_back(out.label, torch.where(still, old, new)[None], window)
            before = placement.take(image, window)
            after = to_dtype(_sample(before.double(), positions.double()), image.dtype)
            placement.put_back(out.image, torch.where(still, before, after), window)
            return out
    return Deformed(image.clone(), label.clone(), 0.0)


def _displacement(placement: Placement, amplitude: float, seed: int) -> Tensor:
    """A displacement `(3, *window)` in mm, along the grid's axes, at the case's voxels within the grid."""
    grid = placement.grid
    extents = [n * s for n, s in zip(grid.shape, grid.spacing, strict=True)]
    step = CONTROL * max(extents)
    # A control point beyond each end, so that the spline is as free there as in the middle.
    counts = [int(np.ceil(extent / step)) + 3 for extent in extents]
    draws = torch.randn(3, *counts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    positions = [1 + np.arange(n) * s / step for n, s in zip(grid.shape, grid.spacing, strict=True)]
    mesh = np.meshgrid(*positions, indexing="ij")
    spline = np.stack([map_coordinates(values, mesh, order=3, mode="nearest") for values in draws.numpy()])
    field = torch.from_numpy(spline) * placement.fade()
    largest = field.norm(dim=0).max().clamp_min(1e-12)
    values, _ = placement.from_grid((field * (amplitude / largest)).float()[None])
    return values[0]


def _least_jacobian(field: Tensor, sizes: list[float]) -> float:
    """Smallest determinant of the Jacobian of `x + u(x)`, by central differences."""
    if min(field.shape[1:]) < 2:
        return 1.0
    rows = [torch.stack(torch.gradient(u, spacing=sizes)) for u in field]
    jacobian = torch.stack(rows).movedim((0, 1), (-2, -1)) + torch.eye(3)
    return float(torch.linalg.det(jacobian).min())


def _positions(field: Tensor, sizes: list[float]) -> Tensor:
    """Where what is shown at each voxel x was, `x + u(x)`: `(I, J, K, 3)` as `grid_sample` takes them."""
    mesh = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in field.shape[1:]), indexing="ij")
    axes = [
        2 * (x + u / size) / max(n - 1, 1) - 1
        for x, u, size, n in zip(mesh, field, sizes, field.shape[1:], strict=True)
    ]
    return torch.stack(axes[::-1], dim=-1)


def _sample(volume: Tensor, positions: Tensor) -> Tensor:
    """A volume `(C, I, J, K)` at positions, linear between voxels."""
    return nn.functional.grid_sample(
        volume[None], positions[None], padding_mode="border", align_corners=True
    )[0]


def _moved_label(label: Tensor, positions: Tensor) -> Tensor:
    """A label map `(I, J, K)` at positions; between voxels the label with the largest share wins."""
    ids = torch.unique(label)
    shares = _sample((label == ids.view(-1, 1, 1, 1)).float(), positions)
    return ids[most_likely(shares[None])[0]]


def _within_bounds(
    old: Tensor, new: Tensor, volumes: Mapping[int, tuple[float, float]], voxel: float
) -> bool:
    for value in torch.unique(old).tolist():
        before, after = (old == value).numpy(), (new == value).numpy()
        if value and components(before, np.ones((3, 3, 3)))[1] != components(after, np.ones((3, 3, 3)))[1]:
            return False
        low, high = volumes.get(int(value), (0.0, np.inf))
        was, becomes = (_beyond(float(mask.sum()) * voxel, low, high) for mask in (before, after))
        if becomes > 0 and becomes >= was:
            return False
    return True


def _beyond(volume: float, low: float, high: float) -> float:
    """How far a volume lies outside its bounds."""
    return max(low - volume, volume - high, 0.0)
