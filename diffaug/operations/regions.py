"""Regions that an inpainting makes anew: ellipsoids and boxes anywhere that the generator reaches, the
structures of a label map, or what lies around them.

A region is plain JSON:

    {"shape": "ellipsoid" or "box", "centre": 3 shares of the reach, "radii": 3 lengths in mm}
    {"shape": "label" or "around", "labels": ids in order of preference, "margin": mm}

with one number per axis of the generator's grid.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from diffaug.generators.grid import Grid, Placement

Shape = Literal["ellipsoid", "box", "label", "around"]
# Radii of drawn ellipsoids and boxes, as shares of the grid's extent on each axis.
RADII = (0.1, 0.25)
# Margins around drawn structures, in voxels of the grid.
MARGIN = (1.0, 4.0)


def draw_region(shape: Shape, grid: Grid, labels: Sequence[int], rng: torch.Generator) -> dict[str, Any]:
    """A random region of a shape, for any case; `labels` are the ids that it may be about."""
    if shape not in get_args(Shape):
        raise ValueError(f"region must be one of {', '.join(get_args(Shape))}, got {shape!r}")

    def uniform(bounds: tuple[float, float], count: int) -> list[float]:
        low, high = bounds
        values: list[float] = (low + (high - low) * torch.rand(count, generator=rng)).tolist()
        return values

    if shape in ("label", "around"):
        order = torch.randperm(len(labels), generator=rng).tolist()
        margin = uniform(MARGIN, 1)[0] * min(grid.spacing)
        return {"shape": shape, "labels": [int(labels[n]) for n in order], "margin": margin}
    extents = [n * s for n, s in zip(grid.shape, grid.spacing, strict=True)]
    radii = [share * extent for share, extent in zip(uniform(RADII, 3), extents, strict=True)]
    return {"shape": shape, "centre": uniform((0.0, 1.0), 3), "radii": radii}


def check_region(region: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a region.

    Raises:
        ValueError: names what a region of its shape has.
    """
    anywhere = region.get("shape") in ("ellipsoid", "box")
    try:
        if anywhere:
            centre, radii = ([float(v) for v in region[name]] for name in ("centre", "radii"))
            good = len(centre) == len(radii) == 3 and min(radii) > 0 and 0 <= min(centre) <= max(centre) <= 1
            found: dict[str, Any] = {"shape": region["shape"], "centre": centre, "radii": radii}
        else:
            labels, margin = [int(v) for v in region["labels"]], float(region["margin"])
            good = region["shape"] in ("label", "around") and len(labels) > 0 and margin >= 0
            found = {"shape": region["shape"], "labels": labels, "margin": margin}
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            'region must be {"shape": "ellipsoid" or "box", "centre": 3 shares, "radii": 3 lengths in mm} or '
            f'{{"shape": "label" or "around", "labels": ids, "margin": mm}}, got {region!r}'
        )
    return found


def region_mask(
    region: Mapping[str, Any], placement: Placement, label: Tensor | None, spacing: NDArray[Any]
) -> Tensor:
    """The voxels of a case that belong to a region: bool `(1, I, J, K)`, within what the grid covers.

    Args:
        region: see the module.
        placement: of the generator's grid in the case.
        label: `(1, I, J, K)`, the user's own ids; only needed for regions of labels.
        spacing: of the case, mm, in its own axes.
    """
    window = placement.window()
    sizes = [stop - start for start, stop in window]
    # In the grid's axis order from here on.
    spacings = [float(spacing[axis]) for axis in placement.axes]
    if region["shape"] in ("label", "around"):
        assert label is not None
        inside = _near_label(region, placement.take(label.cpu(), window)[0], spacings)
    else:
        inside = _within(region, sizes, spacings)
    shape = placement.restore(torch.empty(placement.source_shape)).shape
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    placement.put_back(mask, inside[None], window)
    return mask


def _within(region: Mapping[str, Any], sizes: Sequence[int], spacings: Sequence[float]) -> Tensor:
    """An ellipsoid or box; its centre lies where all of it does, if it is small enough."""
    distances = []
    for size, spacing, share, radius in zip(sizes, spacings, region["centre"], region["radii"], strict=True):
        reach = min(radius / spacing, (size - 1) / 2)
        centre = reach + share * (size - 1 - 2 * reach)
        distances.append((torch.arange(size) - centre).abs() * spacing / radius)
    i, j, k = (d.view([-1 if axis == n else 1 for axis in range(3)]) for n, d in enumerate(distances))
    if region["shape"] == "box":
        return (i <= 1) & (j <= 1) & (k <= 1)
    return i**2 + j**2 + k**2 <= 1


def _near_label(region: Mapping[str, Any], label: Tensor, spacings: Sequence[float]) -> Tensor:
    """The first of the labels that is there, grown by the margin; or that margin alone."""
    present = [value for value in region["labels"] if bool((label == value).any())]
    if not present:
        return torch.zeros_like(label, dtype=torch.bool)
    structure = label == present[0]
    distance = torch.from_numpy(distance_transform_edt(~structure.numpy(), sampling=list(spacings)))
    grown = distance <= region["margin"]
    return grown if region["shape"] == "label" else grown & (label == 0)
