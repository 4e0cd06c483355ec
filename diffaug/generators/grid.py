"""The grid that a generator works on, and the way onto it and back for any orientation, spacing and size.

A volume is placed by axis flips, permutation, per-axis scaling and a shift; it is never sheared or rotated by
a fraction of a turn: an oblique volume keeps its own axes, named by the nearest anatomical direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Literal

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffaug.errors import DiffaugError

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
# Half-open voxel bounds on each axis of a volume in the grid's orientation.
Window = list[tuple[int, int]]
# What images show on a grid beyond the end of the scan: its mirror image, or the low end of its intensities.
Outside = Literal["mirror", "background"]

# A volume whose extent exceeds the grid by more than this factor on an axis is a "larger scan": where in it
# the object lies has to be said by a label or a box.
LARGER_SCAN = 1.25
# Spacings closer than this (relative) are treated as equal: voxels are then copied, not interpolated.
SAME_SPACING = 1e-2
# Width (grid voxels) of the rim over which changes fade to nothing where the volume goes on beyond the grid.
RIM = 4


@dataclass(frozen=True)
class Grid:
    """Orientation (axis codes, such as ("R", "A", "S")), spacing (mm) and shape (voxels) of volumes, and what
    images show beyond the end of a scan."""

    orientation: tuple[str, str, str]
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    outside: Outside = "mirror"

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel-to-world affine (mm, RAS+) of a volume on the grid, centred on the world's origin."""
        result = np.eye(4)
        result[:3, :3] = 0
        for axis, (world, direction) in enumerate(nib.orientations.axcodes2ornt(self.orientation)):
            result[int(world), axis] = direction * self.spacing[axis]
        result[:3, 3] = -result[:3, :3] @ ((np.array(self.shape) - 1) / 2)
        return result


@dataclass(frozen=True)
class Placement:
    """How one volume lies on a grid.

    `axes` and `flips` reorient the volume's array to the grid's orientation; after that, grid voxel u of an
    axis lies at source voxel `offset + u * ratio`. `source_shape` is the volume's, after that.
    """

    grid: Grid
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    ratio: tuple[float, float, float]
    offset: tuple[float, float, float]
    source_shape: tuple[int, int, int]

    # -- reorientation ---------------------------------------------------------------------------------------

    def reorient(self, volume: Tensor) -> Tensor:
        """`(..., I, J, K)` as given, to the grid's axis order and directions (a view where possible)."""
        lead = volume.ndim - 3
        volume = volume.permute(*range(lead), *(lead + a for a in self.axes))
        flipped = [lead + n for n, flip in enumerate(self.flips) if flip]
        return volume.flip(flipped) if flipped else volume

    def restore(self, volume: Tensor) -> Tensor:
        """The inverse of `reorient`."""
        lead = volume.ndim - 3
        flipped = [lead + n for n, flip in enumerate(self.flips) if flip]
        volume = volume.flip(flipped) if flipped else volume
        inverse = np.argsort(self.axes)
        return volume.permute(*range(lead), *(lead + int(a) for a in inverse))

    # -- geometry --------------------------------------------------------------------------------------------

    @property
    def same_spacing(self) -> bool:
        """True where the volume has the grid's spacing, so that voxels are copied."""
        return all(r == 1.0 for r in self.ratio)

    def window(self) -> Window:
        """The source voxels whose centres the grid covers."""
        bounds = []
        for axis, size in enumerate(self.source_shape):
            ratio, offset = self.ratio[axis], self.offset[axis]
            low = offset - 0.5 * ratio
            high = offset + (self.grid.shape[axis] - 0.5) * ratio
            start = max(0, int(np.ceil(low - 1e-6)))
            stop = min(size, int(np.ceil(high - 1e-6)))
            bounds.append((start, max(start, stop)))
        return bounds

    def _support(self) -> Window:
        """The source voxels on which values on the grid depend, by interpolation and blur."""
        bounds = []
        for axis, size in enumerate(self.source_shape):
            reach = 3 * self.ratio[axis]
            low = self.offset[axis] - reach
            high = self.offset[axis] + (self.grid.shape[axis] - 1) * self.ratio[axis] + reach
            bounds.append((max(0, int(np.floor(low))), min(size, int(np.ceil(high)) + 1)))
        return bounds

    def _positions(self, axis: int) -> Tensor:
        """Where the grid's voxels lie on a source axis, in source voxels."""
        return self.offset[axis] + self.ratio[axis] * torch.arange(self.grid.shape[axis], dtype=torch.float64)

    def _index(self, window: Window) -> tuple[EllipsisType | slice, ...]:
        """`window` as an index of the volume's own axes, its last three."""
        slices = [slice(None)] * 3
        for axis, (start, stop) in enumerate(window):
            if self.flips[axis]:
                start, stop = self.source_shape[axis] - stop, self.source_shape[axis] - start
            slices[self.axes[axis]] = slice(start, stop)
        return (..., *slices)

    def take(self, volume: Tensor, window: Window) -> Tensor:
        """The part of `volume` `(..., I, J, K)` that `window` covers, in the reoriented order."""
        return self.reorient(volume[self._index(window)])

    def put_back(self, volume: Tensor, patch: Tensor, window: Window) -> None:
        """Write `patch` (reoriented order, covering `window`) into `volume` `(..., I, J, K)`, in place."""
        volume[self._index(window)] = self.restore(patch).to(volume.dtype)

    # -- resampling ------------------------------------------------------------------------------------------

    def to_grid(self, volume: Tensor, prepare: Callable[[Tensor], Tensor] = Tensor.float) -> Tensor:
        """Resample a volume `(B, C, I, J, K)` in its own array order onto the grid (trilinear, antialiased).

        `prepare` makes floats of the part of the volume that the grid needs; it must act on each voxel by
        itself. Voxels of the grid outside the volume mirror it (reflection about the centres of its border
        voxels).
        """
        support = self._support()
        volume = prepare(self.take(volume, support))
        positions = [self._positions(axis) - start for axis, (start, _) in enumerate(support)]
        if self.same_spacing:
            for axis, position in enumerate(positions):
                index = _reflect(position.long(), volume.shape[2 + axis]).to(volume.device)
                volume = volume.index_select(2 + axis, index)
            return volume
        for axis in range(3):
            volume = _antialias(volume, axis, self.ratio[axis])
        return _sample(volume, positions, padding="reflection")

    def image_to_grid(self, image: Tensor, prepare: Callable[[Tensor], Tensor] = Tensor.float) -> Tensor:
        """`to_grid` for an image that `prepare` brings to network units: beyond the volume it is what the
        grid says."""
        values = self.to_grid(image, prepare)
        if self.grid.outside == "mirror":
            return values
        return torch.where(self.inside().to(values.device) > 0, values, values.new_tensor(-1.0))

    def label_to_grid(self, label: Tensor) -> Tensor:
        """Resample a label map `(B, 1, I, J, K)` of integers >= 0 onto the grid, where it is 0 outside the
        volume; between voxels the value with the largest share wins, the lowest of equals.

        Shares are resampled value by value: all those of a body with 132 structures would not fit.
        """
        inside = self.inside().to(label.device) > 0
        if self.same_spacing:
            return self.to_grid(label, lambda part: part) * inside
        values = torch.unique(self.take(label, self._support())).tolist()
        best = torch.zeros(len(label), 1, *self.grid.shape, device=label.device)
        result = torch.zeros(best.shape, dtype=label.dtype, device=label.device)
        for value in values:
            share = self.to_grid(label, lambda part, value=value: (part == value).float())  # type: ignore[misc]
            better = (share > best) & inside
            best[better], result[better] = share[better], value
        return result

    def inside(self) -> Tensor:
        """1 at the grid's voxels whose centres lie in the volume, else 0 `(*grid.shape)`."""
        masks = []
        for axis, size in enumerate(self.source_shape):
            position = self._positions(axis)
            masks.append(((position > -0.5 - 1e-6) & (position < size - 0.5 + 1e-6)).float())
        return _outer(masks)

    def from_grid(self, volume: Tensor) -> tuple[Tensor, Window]:
        """Resample a grid volume `(B, C, *grid.shape)` to the source voxels that the grid covers.

        Returns the values in the *reoriented* source order, and the window that they cover.
        """
        window = self.window()
        positions = []
        for axis, (start, stop) in enumerate(window):
            index = torch.arange(start, stop, dtype=torch.float64)
            positions.append((index - self.offset[axis]) / self.ratio[axis])
        if self.same_spacing:
            for axis, position in enumerate(positions):
                volume = volume.index_select(2 + axis, position.long().to(volume.device))
            return volume, window
        for axis in range(3):
            volume = _antialias(volume, axis, 1 / self.ratio[axis])
        return _sample(volume, positions, padding="border"), window

    def fade(self) -> Tensor:
        """Smooth mask `(*grid.shape)`: 1 inside, falling to 0 at faces beyond which the volume goes on."""
        ramps = []
        for axis in range(3):
            size = self.grid.shape[axis]
            index = torch.arange(size, dtype=torch.float32)
            ramp = torch.ones(size)
            if self.offset[axis] > 0.5 * self.ratio[axis]:
                ramp = ramp * _smoothstep((index + 0.5) / RIM)
            last = self.offset[axis] + (size - 1) * self.ratio[axis]
            if last < self.source_shape[axis] - 1 - 0.5 * self.ratio[axis]:
                ramp = ramp * _smoothstep((size - 0.5 - index) / RIM)
            ramps.append(ramp)
        return _outer(ramps)


def place(
    grid: Grid,
    shape: Sequence[int],
    affine: NDArray[np.float64],
    *,
    foreground: Tensor | None = None,
    box: Box | None = None,
) -> Placement:
    """Find the place of a volume with array `shape` and `affine` (RAS+ mm) on `grid`.

    On an axis where the volume is not longer than the grid, its centre lies on the grid's centre. On a longer
    axis the grid lies around the centre of `box` (half-open voxel bounds) or of `foreground` (bool, `shape`),
    inside the volume.

    Raises:
        DiffaugError: for a larger scan (more than 1.25 times the grid on an axis) with neither label nor box,
            or a box outside the volume.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise DiffaugError(f"the affine must be an invertible 4 x 4 matrix (mm, RAS+), got {affine.tolist()}")
    source = nib.orientations.io_orientation(affine)
    target = nib.orientations.axcodes2ornt(grid.orientation)
    transform = nib.orientations.ornt_transform(source, target)
    # transform[a] says where source axis a goes; `axes[n]` is the source axis that becomes grid axis n.
    axes = tuple(int(a) for a in np.argsort(transform[:, 0]))
    flips = tuple(bool(transform[a, 1] < 0) for a in axes)
    spacing = nib.affines.voxel_sizes(affine)
    bounds = _bounds(shape, foreground, box)

    ratio: list[float] = []
    offset: list[float] = []
    for n, axis in enumerate(axes):
        size, length = int(shape[axis]), grid.shape[n]
        r = grid.spacing[n] / float(spacing[axis])
        r = 1.0 if abs(r - 1) < SAME_SPACING else r
        centre = (size - 1) / 2
        half = (length - 1) / 2 * r
        if size > length * r + 1e-6:
            if bounds is not None:
                low, high = bounds[axis]
                wanted = (low + high - 1) / 2
                wanted = size - 1 - wanted if flips[n] else wanted
                slack = (r - 1) / 2
                centre = min(max(wanted, half + slack), size - 1 - half - slack)
            elif size > LARGER_SCAN * length * r:
                raise DiffaugError(
                    f"the volume's axis {axis} is {size * spacing[axis]:.0f} mm long, the generator makes an "
                    f"object of {length * grid.spacing[n]:.0f} mm: give the object's label map (with "
                    "foreground in it) or box=((i0, i1), (j0, j1), (k0, k1)) in voxels"
                )
        start = centre - half
        offset.append(float(np.floor(start + 0.5 + 1e-9)) if r == 1.0 else start)
        ratio.append(r)
    reoriented = [int(shape[a]) for a in axes]
    return Placement(
        grid,
        (axes[0], axes[1], axes[2]),
        (flips[0], flips[1], flips[2]),
        (ratio[0], ratio[1], ratio[2]),
        (offset[0], offset[1], offset[2]),
        (reoriented[0], reoriented[1], reoriented[2]),
    )


def covering_grid(
    grid: Grid,
    shape: Sequence[int],
    affine: NDArray[np.float64],
    multiple: Sequence[int],
    box: Box | None = None,
) -> Grid:
    """A grid of the same orientation and spacing that covers a volume, or a box in it, and is no smaller.

    Args:
        shape, affine, box: as for `place`.
        multiple: of which the sides are multiples.
    """
    source = nib.orientations.io_orientation(affine)
    target = nib.orientations.axcodes2ornt(grid.orientation)
    axes = np.argsort(nib.orientations.ornt_transform(source, target)[:, 0])
    spacing = nib.affines.voxel_sizes(affine)
    sides = []
    for n, axis in enumerate(int(a) for a in axes):
        size = shape[axis] if box is None else box[axis][1] - box[axis][0]
        wanted = int(np.ceil(size * float(spacing[axis]) / grid.spacing[n] - 1e-3))
        sides.append(max(grid.shape[n], -(-wanted // multiple[n]) * multiple[n]))
    return replace(grid, shape=(sides[0], sides[1], sides[2]))


def _bounds(shape: Sequence[int], foreground: Tensor | None, box: Box | None) -> Box | None:
    """What a grid smaller than the volume lies around, in voxels of the volume."""
    if box is not None:
        if len(box) != 3:
            raise DiffaugError(f"a box is ((i0, i1), (j0, j1), (k0, k1)) in voxels, got {box}")
        for axis, (low, high) in enumerate(box):
            if not 0 <= low < high <= shape[axis]:
                raise DiffaugError(
                    f"box {box} does not lie in the volume of shape {tuple(shape)}: axis {axis} needs "
                    f"0 <= start < stop <= {shape[axis]}"
                )
        return box
    return None if foreground is None else bounding_box(foreground)


def bounding_box(foreground: Tensor) -> Box | None:
    """Half-open bounds of the true voxels of `(I, J, K)`; None where there are none."""
    plane = foreground.any(dim=2)
    profiles = [plane.any(dim=1), plane.any(dim=0), foreground.any(dim=0).any(dim=0)]
    hits = [profile.nonzero().flatten().tolist() for profile in profiles]
    if not hits[0]:
        return None
    i, j, k = ((hit[0], hit[-1] + 1) for hit in hits)
    return i, j, k


def _outer(factors: list[Tensor]) -> Tensor:
    """`(I,)`, `(J,)` and `(K,)` to their product `(I, J, K)`."""
    return factors[0][:, None, None] * factors[1][None, :, None] * factors[2][None, None, :]


def _smoothstep(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror indices outside [0, size) back into it, without repeating the border voxel."""
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.remainder(period)
    return torch.where(index < size, index, period - index)


def _antialias(volume: Tensor, axis: int, ratio: float) -> Tensor:
    """Gaussian blur along one spatial axis before it is sampled `ratio` times more coarsely."""
    if ratio <= 1.0 + SAME_SPACING:
        return volume
    sigma = 0.5 * (ratio**2 - 1) ** 0.5
    radius = max(1, int(np.ceil(3 * sigma)))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32, device=volume.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    shape = [1, 1, 1, 1, 1]
    shape[2 + axis] = len(kernel)
    padding = [0] * 6
    padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = radius
    b, c = volume.shape[:2]
    flat = volume.reshape(b * c, 1, *volume.shape[2:])
    flat = nn.functional.conv3d(nn.functional.pad(flat, padding, mode="replicate"), kernel.view(shape))
    return flat.reshape(volume.shape)


def _sample(volume: Tensor, positions: list[Tensor], padding: str) -> Tensor:
    """Trilinear samples of `(B, C, I, J, K)` at the grid that three lists of voxel positions span."""
    axes = []
    for axis, position in enumerate(positions):
        size = volume.shape[2 + axis]
        axes.append((2 * position / max(size - 1, 1) - 1).to(volume.device, torch.float32))
    mesh = torch.meshgrid(*axes, indexing="ij")
    coordinates = torch.stack(mesh[::-1], dim=-1)[None].expand(volume.shape[0], -1, -1, -1, -1)
    return nn.functional.grid_sample(
        volume, coordinates, mode="bilinear", padding_mode=padding, align_corners=True
    )
