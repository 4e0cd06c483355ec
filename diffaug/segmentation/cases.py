"""Cases as segmentation networks see them: of one orientation and spacing, standardised, large enough."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import DatasetError, DiffaugError
from diffaug.generators.grid import Grid, Placement, covering_grid, place
from diffaug.progress import Progress

RAS = ("R", "A", "S")
# Percentiles to which intensities are clipped before they are standardised.
CLIPPED = (0.5, 99.5)
# Voxels of the largest patch that is chosen without being asked: what two CPU cores train in seconds.
MOST_VOXELS = 64**3


Positive = Annotated[float, Field(gt=0)]
Side = Annotated[int, Field(ge=1)]


class Window(BaseModel):
    """A scale of intensities such as HU: clipped to `low` and `high`, less `mean`, divided by `std`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    mean: float
    std: float = Field(gt=0)

    @classmethod
    def of(cls, low: float, high: float) -> Self:
        """That brings the bounds to -1 and 1.

        Raises:
            DiffaugError: low is not below high.
        """
        if not low < high:
            raise DiffaugError(f"a window needs low below high, got {low:g} and {high:g}")
        return cls(low=low, high=high, mean=(low + high) / 2, std=(high - low) / 2)


class Space(BaseModel):
    """The space in which a network works.

    Attributes:
        spacing: of voxels along the axes of the network's arrays, mm.
        patch: voxels that the network sees at once, `(I, J, K)`.
        window: of intensities; None: each case is clipped to its 0.5 and 99.5 percentiles and scaled to zero
            mean and unit variance, channel by channel.
        orientation: where the axes of the network's arrays point.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spacing: tuple[Positive, Positive, Positive]
    patch: tuple[Side, Side, Side]
    window: Window | None = None
    orientation: tuple[str, str, str] = RAS

    @property
    def grid(self) -> Grid:
        """A patch's grid; beyond a scan's end lies its mirror image."""
        return Grid(self.orientation, self.spacing, self.patch)


@dataclass(frozen=True)
class Prepared:
    """One case in a network's space.

    Attributes:
        name, patient: of the case.
        image: `(C, I, J, K)` float32, standardised; each side at least that of a patch.
        label: `(1, I, J, K)` int16, or None.
        placement: of the case's own voxels, by which predictions find their way back.
    """

    name: str
    patient: str
    image: Tensor
    label: Tensor | None
    placement: Placement


def choose_space(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], multiple: Sequence[int]
) -> Space:
    """Median spacing of volumes in RAS order, and a patch that holds the median volume, or what of it has at
    most 64^3 voxels.

    Args:
        spacings: mm, of each volume.
        shapes: voxels, of each volume.
        multiple: of which the patch's sides are multiples.
    """
    a, b, c = np.median(np.asarray(spacings, dtype=float), axis=0).tolist()
    extents = np.median(np.asarray(spacings) * np.asarray(shapes), axis=0) / (a, b, c)
    # Long sides are cut first, as far as to the side of a cube.
    side = max(extents)
    while np.prod(np.minimum(extents, side)) > MOST_VOXELS:
        side -= 1
    i, j, k = (
        int(m * max(1, ceil(round(float(n)) / m)))
        for n, m in zip(np.minimum(extents, side), multiple, strict=True)
    )
    if (i, j, k) == tuple(multiple):
        # A network keeps more than one voxel where it is coarsest.
        i, j, k = 2 * i, 2 * j, 2 * k
    return Space(spacing=(a, b, c), patch=(i, j, k))


def prepare(
    name: str,
    patient: str,
    image: Tensor,
    label: Tensor | None,
    affine: NDArray[np.float64],
    space: Space,
    classes: Mapping[int, int],
) -> Prepared:
    """Bring a case into a network's space.

    Args:
        image: `(C, I, J, K)`, array axes as stored.
        label: `(1, I, J, K)` ids of the dataset, or None.
        affine: `(4, 4)`, RAS+ mm.
        classes: id in the label map -> class of the network; what is not among them is background.
    """
    grid = covering_grid(space.grid, image.shape[1:], affine, (1, 1, 1))
    placement = place(grid, image.shape[1:], affine)
    # Standardised by its own voxels, before its mirror image is added.
    standard = standardise(image, space.window)
    return Prepared(
        name,
        patient,
        placement.to_grid(standard[None])[0],
        None if label is None else _on_grid(label, placement, classes),
        placement,
    )


def _on_grid(label: Tensor, placement: Placement, classes: Mapping[int, int]) -> Tensor:
    """Class by class, as large volumes with many classes would not fit into memory at once."""
    found = torch.zeros(placement.grid.shape, dtype=torch.int16)
    best = _share(~torch.isin(label, torch.tensor([n for n in classes if classes[n] != 0])), placement)
    for number, own in classes.items():
        if own != 0:
            share = _share(label == number, placement)
            found[share > best] = own
            best = torch.maximum(share, best)
    return found[None]


def _share(mask: Tensor, placement: Placement) -> Tensor:
    """The share of a mask `(1, I, J, K)` in each voxel of the grid, in the volume alone."""
    return placement.to_grid(mask[None])[0, 0] * placement.inside()


def standardise(image: Tensor, window: Window | None) -> Tensor:
    """`(C, I, J, K)` float32 in network units; see `Space.window`. A constant channel becomes zero."""
    values = image.float()
    if window is not None:
        return (values.clamp(window.low, window.high) - window.mean) / window.std
    channels = []
    for channel in values:
        low, high = np.percentile(channel.numpy(), CLIPPED)
        clipped = channel.clamp(float(low), float(high))
        channels.append((clipped - clipped.mean()) / clipped.std().clamp_min(1e-12))
    return torch.stack(channels)


def read_prepared(
    cases: Sequence[CaseFiles], space: Space, classes: Mapping[int, int], progress: Progress, title: str
) -> list[Prepared]:
    """Read cases and bring them into a network's space.

    Raises:
        DatasetError: a file cannot be read, or holds NaN or infinity.
    """
    prepared = []
    with progress.task(title, total=len(cases)) as task:
        for case in cases:
            loaded = load_case(case)
            if not np.isfinite(loaded.image).all():
                raise DatasetError([f"{case.images[0]} holds NaN or infinity: replace these voxels"])
            label = None if loaded.label is None else torch.from_numpy(loaded.label)
            image = torch.from_numpy(loaded.image)
            prepared.append(prepare(case.name, case.patient, image, label, loaded.affine, space, classes))
            task.advance()
    return prepared
