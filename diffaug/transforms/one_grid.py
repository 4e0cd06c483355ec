"""Whether images lie on one grid, as the channels and the label map of a case must."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from diffaug.errors import DiffaugError

# Images are on one grid if no corner voxel differs by more than this part of the smallest voxel edge.
SAME_PLACE = 0.05


class Place(NamedTuple):
    """Spatial shape `(I, J, K)` and affine `(4, 4)`, voxel to world, mm."""

    shape: Sequence[int]
    affine: NDArray[Any]


def check_one_grid(places: Mapping[str, Place], advice: str) -> None:
    """Refuse images that differ in shape or place.

    Args:
        places: of each image, by how an error names it.
        advice: what brings them onto the grid of the first in the framework at hand.

    Raises:
        DiffaugError: names two images, their shapes and affines, and the advice.
    """
    (first_name, first), *others = places.items()
    corners = np.array(np.meshgrid(*([0, size - 1] for size in first.shape))).reshape(3, -1)
    edge = float(nib.affines.voxel_sizes(first.affine).min())
    for name, other in others:
        moved = (first.affine - other.affine) @ np.vstack([corners, np.ones((1, corners.shape[1]))])
        if tuple(other.shape) != tuple(first.shape) or np.abs(moved).max() > SAME_PLACE * edge:
            raise DiffaugError(
                f"{first_name} and {name} are not on one grid: shapes {tuple(first.shape)} and "
                f"{tuple(other.shape)}, affines {first.affine.tolist()} and {other.affine.tolist()}. "
                f"Bring them onto one with {advice}"
            )
