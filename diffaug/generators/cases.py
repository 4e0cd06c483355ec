"""Real cases on their way to a generator's grid, checked, and what was made on its way back to their voxels.

Tensors have the axes as nibabel gives them, batch and channels first; what comes back has the shape and dtype
of what went in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from diffaug.errors import DiffaugError, LabelError, VerbError
from diffaug.generators.card import Card
from diffaug.generators.grid import Box, Placement, Window, covering_grid, place
from diffaug.generators.intensity import IntensityMap, fit_intensity_map, typical_map
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.labels import Vocabulary

# A label with a larger share beyond the grid shows another structure than the generator's, or several. Less
# is what an unusually large structure or stray voxels cost.
MOST_CUT = 0.2
# Voxels over which inpainted content fades into the untouched image, inside the mask.
INPAINT_RIM = 2


@dataclass(frozen=True)
class Case:
    """One case on the grid: `image` `(1, C, *grid)` in network units, `label` `(1, 1, *grid)` int16, places
    in the vocabulary."""

    placement: Placement
    image: Tensor | None = None
    intensity: IntensityMap | None = None
    label: Tensor | None = None


# -- onto the grid -------------------------------------------------------------------------------------------


def read_images(
    card: Card,
    image: Tensor,
    label: Tensor | None,
    affine: ArrayLike,
    *,
    label_mapping: Mapping[int, int] | None,
    allow_label_drift: bool,
    boxes: Sequence[Box | None],
    intensity: Sequence[IntensityMap] | None = None,
) -> list[Case]:
    """Bring a batch of images `(B, C, I, J, K)`, and their label maps if given, onto the card's grid, after
    checking all of it.

    Raises:
        LabelError: a label map is missing, does not match, holds unknown ids, or cannot be preserved.
        DiffaugError: an image is not what the card is for, or larger than the grid with nothing to say where.
    """
    if not isinstance(image, Tensor):
        raise DiffaugError(f"the image must be a torch.Tensor, got {type(image).__name__}")
    if image.ndim != 5 or image.shape[1] != len(card.channels):
        raise DiffaugError(
            f"image must have shape (B, {len(card.channels)}, I, J, K) with the channels {card.channels}, "
            f"got {tuple(image.shape)}"
        )
    if image.dtype == torch.bool or image.is_complex():
        raise DiffaugError(f"the image must hold integers or floats, got {image.dtype}")
    if bad := [n for n, row in enumerate(image) if not bool(torch.isfinite(row).all())]:
        raise DiffaugError(
            f"the image holds NaN or infinite values in case(s) {bad} of the batch: replace them first"
        )
    if not allow_label_drift:
        require_label(card, label is not None)
    if label is not None:
        _check_label(label)
        if label.shape[0] != image.shape[0] or label.shape[2:] != image.shape[2:]:
            raise LabelError(f"label {tuple(label.shape)} does not match image {tuple(image.shape)}")
    if intensity is None:
        intensity = [fit_intensity_map(row, card.intensity) for row in image]
    else:
        count = 1 if isinstance(intensity, IntensityMap) else len(intensity)
        if isinstance(intensity, IntensityMap) or count != len(image):
            raise DiffaugError(f"intensity needs a list of {len(image)} maps, one a case; got {count}")
        # A map of a region must not raise what is darker elsewhere in the volume.
        intensity = [m.with_floor_of(row) for m, row in zip(intensity, image, strict=True)]
    cases = []
    for n, (a, box) in enumerate(zip(_affines(affine, len(image)), boxes, strict=True)):
        row = None if label is None else label[n]
        case = place_case(card, image.shape[2:], a, label=row, label_mapping=label_mapping, box=box)
        on_grid = case.placement.image_to_grid(image[n : n + 1], intensity[n].normalise)
        cases.append(Case(case.placement, on_grid, intensity[n], case.label))
    return cases


def read_labels(
    card: Card,
    label: Tensor,
    affine: ArrayLike,
    *,
    label_mapping: Mapping[int, int] | None,
    box: Box | None,
) -> list[Case]:
    """Bring a batch of label maps `(B, 1, I, J, K)` onto the card's grid.

    Raises:
        LabelError: one holds unknown ids, or shows nothing on the grid.
    """
    _check_label(label)
    cases = [
        place_case(card, label.shape[2:], a, label=row, label_mapping=label_mapping, box=box)
        for row, a in zip(label, _affines(affine, len(label)), strict=True)
    ]
    for index, case in enumerate(cases):
        if case.label is None or not bool(case.label.any()):
            raise LabelError(f"label map {index} of the batch shows no structure on the generator's grid")
    return cases


def require_label(card: Card, given: bool) -> None:
    """Raise a LabelError where a label map is missing, or given to a generator that cannot preserve it."""
    if card.labels and not given:
        raise LabelError(
            f"{card.name} preserves a label only if it is given: pass the label map, or "
            "allow_label_drift=True if the anatomy may move"
        )
    if given and not card.labels:
        raise LabelError(
            f"{card.name} knows no labels and cannot preserve one: pass allow_label_drift=True if the "
            "anatomy may move"
        )


def require_covered(cases: Sequence[Case]) -> None:
    """Raise a VerbError where the grid does not cover all of a case, so that no plain decode of it exists."""
    for n, case in enumerate(cases):
        covered = tuple(stop - start for start, stop in case.placement.window())
        if covered != case.placement.source_shape:
            raise VerbError(
                f"a plain decode (residual=False) covers {covered} of the {case.placement.source_shape} "
                f"voxels of case {n} (grid's axis order); crop the case to the box around its label first"
            )


def masks_on_grid(mask: Tensor, cases: Sequence[Case]) -> Tensor:
    """Bool masks `(B, 1, I, J, K)` on the grid, where any part of a mask counts.

    Raises:
        VerbError: a mask reaches beyond the grid.
    """
    for n, case in enumerate(cases):
        covered = int(case.placement.take(mask[n], case.placement.window()).sum())
        if covered < int(mask[n].sum()):
            raise VerbError(
                f"the mask of case {n} has {int(mask[n].sum())} voxels, the generator's grid around the "
                f"label or box covers {covered} of them: inpaint a smaller region, or give a box=... around "
                "it"
            )
    on_grid = [case.placement.to_grid(row[None]) for case, row in zip(cases, mask, strict=True)]
    return torch.cat(on_grid) > 0


def place_case(
    card: Card,
    shape: Sequence[int],
    affine: NDArray[np.float64],
    *,
    label: Tensor | None,
    label_mapping: Mapping[int, int] | None,
    box: Box | None,
) -> Case:
    """Place a volume of spatial `shape` on the grid, and its label map `(1, I, J, K)` if there is one."""
    grid, vocabulary = card.to_grid(), Vocabulary(card.labels)
    if card.windowed and isinstance(card.networks, JointFlowNetworks):
        grid = covering_grid(grid, shape, affine, card.networks.downsampling, box)
    if label is None:
        return Case(place(grid, shape, affine, box=box))
    if not card.labels:
        return Case(place(grid, shape, affine, foreground=label[0] != 0, box=box))
    indices = vocabulary.indices(label[None], label_mapping)
    foreground = indices[0] != 0
    placement = place(grid, shape, affine, foreground=foreground[0], box=box)
    total = int(foreground.sum())
    cut = total - int(placement.take(foreground, placement.window()).sum())
    if box is None and cut > MOST_CUT * total:
        size = " x ".join(f"{n * s:.0f}" for n, s in zip(grid.shape, grid.spacing, strict=True))
        raise VerbError(
            f"{cut} of the label's {total} voxels lie outside the {size} mm that {card.name} makes: keep one "
            "structure in the label map, or call the verb with box=((i0, i1), (j0, j1), (k0, k1)) in voxels "
            "around it"
        )
    return Case(placement, label=placement.label_to_grid(indices))


def _check_label(label: Tensor) -> None:
    if not isinstance(label, Tensor):
        raise LabelError(f"a label map must be a torch.Tensor, got {type(label).__name__}")
    if label.ndim != 5 or label.shape[1] != 1:
        raise LabelError(f"a label map must have shape (B, 1, I, J, K), got {tuple(label.shape)}")


def _affines(affine: ArrayLike, count: int) -> list[NDArray[np.float64]]:
    array = np.asarray(affine.cpu() if isinstance(affine, Tensor) else affine, dtype=np.float64)
    if array.shape == (4, 4):
        return [array] * count
    if array.shape != (count, 4, 4):
        raise DiffaugError(f"affine must have shape (4, 4) or ({count}, 4, 4), got {array.shape}")
    return list(array)


# -- back from it: `volumes` `(B, C, *grid)` are in network units --------------------------------------------


def add_differences(image: Tensor, cases: Sequence[Case], differences: Tensor) -> Tensor:
    """The images with differences added, which fade to nothing where an image goes on beyond the grid."""
    out = image.clone()
    for n, case in enumerate(cases):
        assert case.intensity is not None
        faded = differences[n : n + 1] * case.placement.fade().to(differences.device)
        values, window = case.placement.from_grid(faded)
        change = case.intensity.denormalise_difference(values[0])
        old = case.placement.take(image[n], window)
        new = to_dtype(case.intensity.bound(old.double() + change), image.dtype)
        case.placement.put_back(out[n], torch.where(change == 0, old, new), window)
    return out


def replace(image: Tensor, cases: Sequence[Case], volumes: Tensor) -> Tensor:
    """The volumes in the images' units and on their voxels; the grid must cover these."""
    out = torch.empty_like(image)
    for n, case in enumerate(cases):
        assert case.intensity is not None
        values, window = case.placement.from_grid(volumes[n : n + 1])
        values = to_dtype(case.intensity.denormalise(values[0]), image.dtype)
        case.placement.put_back(out[n], values, window)
    return out


def replace_inside(
    image: Tensor, mask: Tensor, cases: Sequence[Case], volumes: Tensor, *, differences: bool = False
) -> Tensor:
    """The images with the volumes inside the bool masks `(B, 1, I, J, K)`, fading in over their rims; with
    `differences` these are added to the images instead."""
    out = image.clone()
    for n, case in enumerate(cases):
        assert case.intensity is not None
        values, window = case.placement.from_grid(volumes[n : n + 1])
        weight = fade_inside(mask[n], case.placement, window)
        old = case.placement.take(image[n], window)
        if differences:
            change = case.intensity.denormalise_difference(values[0])
            new = case.intensity.bound(old.double() + change * weight)
        else:
            new = old.double() * (1 - weight) + case.intensity.denormalise(values[0]) * weight
        new = torch.where(weight > 0, to_dtype(new, image.dtype), old)
        case.placement.put_back(out[n], new, window)
    return out


def beside_labels(card: Card, label: Tensor, cases: Sequence[Case], volumes: Tensor) -> Tensor:
    """The volumes in the card's typical units, float32 `(B, C, I, J, K)` on the label maps' voxels; beyond
    the grid they have the lower end of these units."""
    intensity = typical_map(card.intensity)
    floor = intensity.low.float().view(1, -1, 1, 1, 1)
    out = floor.expand(len(label), -1, *label.shape[2:]).clone()
    for n, case in enumerate(cases):
        values, window = case.placement.from_grid(volumes[n : n + 1])
        case.placement.put_back(out[n], intensity.denormalise(values[0]), window)
    return out.to(label.device)


def fade_inside(mask: Tensor, placement: Placement, window: Window) -> Tensor:
    """Weights of the voxels of `window`: 0 outside a bool mask `(1, I, J, K)`, rising to 1 over the rim
    inside it, or over half its thickness."""
    # With a voxel more on each side, since what lies beyond the window is outside the mask.
    grown = [(max(0, a - 1), min(n, b + 1)) for (a, b), n in zip(window, placement.source_shape, strict=True)]
    mask = placement.take(mask, grown).contiguous()
    outside, depth = (~mask).float(), mask.float()
    for _ in range(INPAINT_RIM):
        outside = nn.functional.max_pool3d(outside, 3, stride=1, padding=1)
        depth += outside == 0
    # Where the mask is thinner than two rims, its middle is still all new.
    weight = depth / nn.functional.max_pool3d(depth, 2 * INPAINT_RIM + 1, 1, INPAINT_RIM).clamp(min=1)
    inner = (slice(a - g, b - g) for (a, b), (g, _) in zip(window, grown, strict=True))
    return weight[:, *inner]


def to_dtype(volume: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype`: rounded and clipped to an integer one."""
    if volume.dtype == dtype or dtype.is_floating_point:
        return volume.to(dtype)
    limits = torch.iinfo(dtype)
    return volume.round().clamp(limits.min, limits.max).to(dtype)
