"""The presets' preprocessing as TorchIO pipelines, and how scans are prepared for two of them.

    import torchio as tio
    from diffaug.training.medical_diffusion.presets import PRESETS

    subjects = tio.SubjectsDataset(subjects, transform=PRESETS["chest-lidc"].pipeline())

Intensities are scaled before a scan is cropped: by the whole scan, not by what the grid shows of it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffaug.errors import DiffaugError, ExtraError
from diffaug.generators.grid import Grid, bounding_box, place

try:
    import torchio as tio
    from torchio.transforms.spatial_transform import SpatialTransform
except ImportError as error:
    raise ExtraError("TorchIO", "torchio") from error

Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]
Scan = TypeVar("Scan", tio.Subject, tio.ScalarImage)


def knee_mrnet(spacing: Spacing, shape: Shape) -> tio.Compose:
    """Sagittal slices of a knee; each scan by its own minimum and maximum."""
    return tio.Compose(
        [
            tio.ToCanonical(),
            tio.RescaleIntensity((-1, 1), masking_method=scanned),
            ToGrid(spacing, shape),
        ]
    )


def brain_adni(spacing: Spacing, shape: Shape) -> tio.Compose:
    """A skull-stripped brain, its box in the middle of a cube."""
    return tio.Compose(
        [
            CenterForeground(),
            tio.RescaleIntensity((-1, 1), masking_method=scanned),
            ToGrid(spacing, shape),
        ]
    )


def breast_duke(spacing: Spacing, shape: Shape) -> tio.Compose:
    """Axial slices of one breast, which `split_breasts` cut out."""
    return tio.Compose(
        [
            tio.ToCanonical(),
            tio.RescaleIntensity((-1, 1), masking_method=scanned),
            ToGrid(spacing, shape),
        ]
    )


def chest_lidc(spacing: Spacing, shape: Shape) -> tio.Compose:
    """The middle of a chest CT, from air to bone."""
    return tio.Compose(
        [
            tio.ToCanonical(),
            tio.Clamp(-1000, 400),
            tio.RescaleIntensity((-1, 1), in_min_max=(-1000, 400)),
            ToGrid(spacing, shape),
        ]
    )


PIPELINES: dict[str, Callable[[Spacing, Shape], tio.Compose]] = {
    "knee-mrnet": knee_mrnet,
    "brain-adni": brain_adni,
    "breast-duke": breast_duke,
    "chest-lidc": chest_lidc,
}


class ToGrid(SpatialTransform):
    """The middle of an RAS volume at `spacing` (mm) in `shape` voxels.

    A volume of this spacing (within 1 %) is cropped and padded; another one is interpolated linearly, after
    a blur where that makes it coarser. What lies beyond it is -1, the low end of scaled intensities; in label
    maps 0.
    """

    def __init__(self, spacing: Spacing, shape: Shape, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spacing = spacing
        self.shape = shape
        self.args_names = ["spacing", "shape"]

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        grid = Grid(("R", "A", "S"), self.spacing, self.shape)
        for image in self.get_images(subject):
            i, j, k = image.spatial_shape
            if image.orientation != grid.orientation:
                raise DiffaugError(
                    f"the volume's axes are {''.join(image.orientation)}: apply torchio.ToCanonical first"
                )
            # A box that is the whole volume: of a larger one the grid shows the middle.
            placement = place(grid, (i, j, k), image.affine, box=((0, i), (0, j), (0, k)))
            onto = np.diag([*placement.ratio, 1.0])
            onto[:3, 3] = placement.offset
            resample = tio.Resample((self.shape, image.affine @ onto), antialias=not placement.same_spacing)
            # TorchIO fills what lies beyond with 0, and its blur overshoots by a thousandth.
            background = -1 if isinstance(image, tio.ScalarImage) else 0
            image.set_data(image.data - background)
            resampled = resample(image)
            if background:
                resampled = tio.Clamp(0, 2)(resampled)
            image.set_data(resampled.data + background)
            image.affine = resampled.affine
        return subject


class CenterForeground(SpatialTransform):
    """The cube of `size` mm around what is above 0 in the first scalar image of a subject, in RAS: a
    skull-stripped brain amid zeros."""

    def __init__(self, size: float = 228, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size
        self.args_names = ["size"]

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        subject = tio.ToCanonical()(subject)
        image = subject.get_images(intensity_only=True, include=self.include, exclude=self.exclude)[0]
        box = bounding_box((image.data > 0).any(dim=0))
        if box is None:
            raise DiffaugError(
                f"nothing in {image.path or 'the image'} is above 0 (its maximum is {image.data.max():g}): "
                "give a skull-stripped scan with 0 around the brain"
            )
        crop, pad = [], []
        for (low, high), n, spacing in zip(box, image.spatial_shape, image.spacing, strict=True):
            length = round(self.size / spacing)
            start = (low + high - length) // 2
            crop += [max(0, start), max(0, n - start - length)]
            pad += [max(0, -start), max(0, start + length - n)]
        return tio.Pad(tuple(pad))(tio.Crop(tuple(crop))(subject))


def split_breasts(scan: Scan) -> tuple[Scan, Scan]:
    """A scan of both breasts, cut in the middle: the patient's left half and the right one, in RAS."""
    scan = tio.ToCanonical()(scan)
    width = scan.spatial_shape[0]
    middle = width // 2
    left, right = (
        tio.Crop((low, high, 0, 0, 0, 0))(scan) for low, high in ((0, width - middle), (middle, 0))
    )
    return left, right


def scanned(volume: Tensor) -> Tensor:
    """True in the volume `(C, I, J, K)` but in its outer slices that are constant: padding is no part of the
    range of its intensities."""
    mask = torch.zeros_like(volume, dtype=torch.bool)
    for channel, found in zip(volume, mask, strict=True):
        box = [slice(None)] * 3
        for axis in range(3):
            slices = channel[tuple(box)].movedim(axis, 0).flatten(1)
            varied = (slices.amax(dim=1) > slices.amin(dim=1)).nonzero().flatten().tolist()
            if varied:
                box[axis] = slice(varied[0], varied[-1] + 1)
        found[tuple(box)] = True
    return mask
