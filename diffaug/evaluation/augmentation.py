"""Strong classical augmentation of a batch of standardised volumes and their labels, on tensors.

Each case draws its own parameters. Lengths are in voxels, angles in radians, intensities in standard
deviations of the volume (`diffaug.evaluation.segmenter.standardise`).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# Control points of the deformation on each axis, and the largest value that each parameter takes.
CONTROL_POINTS = 6
ROTATION = 0.3
SCALING = 0.2
STRETCH = 0.1
SHIFT = 3.0
ELASTIC = 1.0
BLUR = 1.0
BIAS = 0.3
GAMMA = 0.4
CONTRAST = 0.4
BRIGHTNESS = 0.3
NOISE = 0.3


def augment(
    images: Tensor, labels: Tensor, classes: int, mirror_axis: int | None, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Turn, scale, shift, bend, mirror, blur, shade and soil a batch.

    Args:
        images: standardised volumes (B, C, I, J, K), float32.
        labels: label maps (B, 1, I, J, K), integers from 0 to classes - 1.
        classes: number of labels, the background included.
        mirror_axis: spatial axis (0, 1 or 2) that is mirrored in half of the cases, or None.
        random: source of every random number, on the CPU.

    Returns:
        Images (B, C, I, J, K), and the share of each label in each voxel (B, classes, I, J, K), float32. What
        comes in from beyond the border has the value at the border.
    """
    grids = _sampling_grids(len(images), images.shape[2:], mirror_axis, random).to(images.device)
    foreground = torch.cat([labels == label for label in range(1, classes)], 1).to(images.dtype)
    warped = F.grid_sample(
        torch.cat([images, foreground], 1), grids, padding_mode="border", align_corners=True
    )
    images, foreground = warped.split([images.shape[1], classes - 1], 1)
    shares = torch.cat([1 - foreground.sum(1, keepdim=True), foreground], 1)
    return _alter_intensities(images.contiguous(), random), shares


def _uniform(random: torch.Generator, n: int, *shape: int, limit: float, probability: float = 1.0) -> Tensor:
    """Numbers (n, *shape) between -limit and limit, zero for the cases that are left out by `probability`."""
    numbers = (torch.rand((n, *shape), generator=random) * 2 - 1) * limit
    return numbers * (torch.rand((n, *[1] * len(shape)), generator=random) < probability)


def _sampling_grids(n: int, shape: torch.Size, mirror_axis: int | None, random: torch.Generator) -> Tensor:
    """Coordinates for `grid_sample` (n, I, J, K, 3): an affine map plus a smooth displacement.

    Both live on a coarse lattice of control points; trilinear interpolation is exact for the affine part.
    """
    half = (torch.tensor(shape, dtype=torch.float32) - 1) / 2
    axes = [torch.linspace(-h, h, CONTROL_POINTS) for h in half.tolist()]
    lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    scales = _uniform(random, n, 1, limit=SCALING, probability=0.5) + _uniform(random, n, 3, limit=STRETCH)
    matrices = _rotations(_uniform(random, n, 3, limit=ROTATION, probability=0.5)) * scales.exp()[:, None, :]
    if mirror_axis is not None:
        matrices[torch.rand(n, generator=random) < 0.5, mirror_axis] *= -1
    points = torch.einsum("nab,bijk->naijk", matrices, lattice)
    points += _uniform(random, n, 3, limit=SHIFT)[..., None, None, None]
    bend = _uniform(random, n, 1, limit=ELASTIC, probability=0.3)[..., None, None, None]
    points += bend * torch.randn(points.shape, generator=random)
    points /= half[:, None, None, None]
    # `grid_sample` wants the coordinates as (z, y, x) of an image, that is the last axis first.
    return F.interpolate(points, size=shape, mode="trilinear", align_corners=True).flip(1).movedim(1, -1)


def _rotations(angles: Tensor) -> Tensor:
    """Rotation matrices (n, 3, 3) from angles around the three axes (n, 3), radians."""
    cosine, sine = angles.cos(), angles.sin()
    matrices = torch.eye(3).expand(len(angles), 3, 3)
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3).repeat(len(angles), 1, 1)
        turn[:, a, a] = turn[:, b, b] = cosine[:, axis]
        turn[:, a, b], turn[:, b, a] = -sine[:, axis], sine[:, axis]
        matrices = matrices @ turn
    return matrices


def _alter_intensities(images: Tensor, random: torch.Generator) -> Tensor:
    """Blur, bias field, gamma, contrast, brightness and noise, each in a quarter to a half of the cases."""
    n, device = len(images), images.device

    def per_case(limit: float, probability: float) -> Tensor:
        return _uniform(random, n, limit=limit, probability=probability).view(n, 1, 1, 1, 1).to(device)

    images = _blur(images, _uniform(random, n, limit=BLUR, probability=0.25).abs().to(device))
    waves = torch.randn((n, 1, 3, 3, 3), generator=random).to(device) * per_case(BIAS, 0.3)
    bias = F.interpolate(waves, size=images.shape[2:], mode="trilinear", align_corners=True).exp_()
    low = images.amin((2, 3, 4), keepdim=True)
    span = (images.amax((2, 3, 4), keepdim=True) - low).clamp_min(1e-6)
    images = ((images - low) / span).mul_(bias).pow_(per_case(GAMMA, 0.3).exp())
    images = images.mul_(span).add_(low).mul_(per_case(CONTRAST, 0.5).exp()).add_(per_case(BRIGHTNESS, 0.3))
    noise = torch.randn(images.shape, generator=random).to(device)
    return images.add_(noise.mul_(per_case(NOISE, 0.3)))


def _blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian blur of each case with its own standard deviation (B,) in voxels; hardly any below 0.3."""
    n = len(images)
    for axis in (2, 3, 4):
        size = images.shape[axis]
        positions = torch.arange(size, dtype=images.dtype, device=images.device)
        distances = positions[:, None] - positions
        weights = torch.exp(-0.5 * (distances / sigmas.clamp_min(0.1).view(n, 1, 1)) ** 2)
        weights /= weights.sum(2, keepdim=True)
        lines = images.movedim(axis, 2)
        images = (weights[:, None] @ lines.flatten(3)).view(lines.shape).movedim(2, axis)
    return images.contiguous()
