"""Structural similarity of two volumes over several scales."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaug.errors import DiffaugError

# Exponents of the scales, finest first (Wang et al. 2003); fewer scales take the first, made to sum to 1.
EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SIGMA = 1.5


def ms_ssim(first: Tensor, second: Tensor, *, data_range: float, scales: int = 3, kernel: int = 7) -> Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003) of pairs of volumes.

    Contrast and structure are compared at every scale, luminance at the coarsest alone; a negative mean
    covariance counts as 0. Windows are Gaussian (sigma 1.5 voxels) and lie wholly inside the volume; scales
    are halved by averaging 2 x 2 x 2 voxels.

    Args:
        first: volumes `(B, C, I, J, K)`.
        second: volumes of the same shape.
        data_range: difference of the largest and the smallest value that there can be.
        scales: number of scales, 1 to 5.
        kernel: voxels of a window on each axis, odd.

    Returns:
        Similarities `(B,)`, float64, at most 1, mean over channels.

    Raises:
        DiffaugError: for volumes too small for the windows of the coarsest scale, or of different shapes.
    """
    if first.shape != second.shape or first.ndim != 5:
        raise DiffaugError(f"volumes of shapes {tuple(first.shape)} and {tuple(second.shape)} make no pairs")
    least = kernel * 2 ** (scales - 1)
    if min(first.shape[2:]) < least:
        raise DiffaugError(
            f"{scales} scales of a window of {kernel} need {least} voxels on each axis, the volumes have "
            f"{tuple(first.shape[2:])}: take fewer scales or a smaller kernel"
        )
    exponents = torch.tensor(EXPONENTS[:scales], dtype=torch.float64)
    exponents = exponents / exponents.sum()
    a, b = first.double(), second.double()
    similarity = torch.ones(a.shape[:2], dtype=torch.float64, device=a.device)
    for scale, exponent in enumerate(exponents.tolist()):
        luminance, structure = _ssim_parts(a, b, data_range, kernel)
        similarity *= structure.clamp(min=0) ** exponent
        if scale == scales - 1:
            similarity *= luminance.clamp(min=0) ** exponent
        a, b = F.avg_pool3d(a, 2), F.avg_pool3d(b, 2)
    return similarity.mean(1)


def _ssim_parts(a: Tensor, b: Tensor, data_range: float, kernel: int) -> tuple[Tensor, Tensor]:
    """Mean luminance and contrast-structure terms `(B, C)`."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b, square_a, square_b, product = _windows([a, b, a * a, b * b, a * b], kernel)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    variances = square_a - mean_a**2 + square_b - mean_b**2
    structure = (2 * (product - mean_a * mean_b) + c2) / (variances + c2)
    return luminance.mean((2, 3, 4)), structure.mean((2, 3, 4))


def _windows(volumes: Sequence[Tensor], kernel: int) -> list[Tensor]:
    """Gaussian means of the windows inside each volume."""
    positions = torch.arange(kernel, dtype=torch.float64, device=volumes[0].device) - (kernel - 1) / 2
    weights = torch.exp(-0.5 * (positions / SIGMA) ** 2)
    weights /= weights.sum()
    out = []
    for volume in volumes:
        blurred = volume.flatten(0, 1)[:, None]
        for axis in range(3):
            shape = [1, 1, 1, 1, 1]
            shape[2 + axis] = kernel
            blurred = F.conv3d(blurred, weights.view(shape))
        out.append(blurred.view(*volume.shape[:2], *blurred.shape[2:]))
    return out
