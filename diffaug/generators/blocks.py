"""Building blocks that the autoencoders and the denoiser share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def space_to_depth(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Move blocks of `factors` voxels into channels.

    `(B, C, I, J, K)` to `(B, C*fI*fJ*fK, I/fI, J/fJ, K/fK)`.
    """
    b, c, i, j, k = x.shape
    fi, fj, fk = factors
    x = x.reshape(b, c, i // fi, fi, j // fj, fj, k // fk, fk)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * fi * fj * fk, i // fi, j // fj, k // fk)


def depth_to_space(x: Tensor, factors: Sequence[int]) -> Tensor:
    """The inverse of `space_to_depth`."""
    b, c, i, j, k = x.shape
    fi, fj, fk = factors
    x = x.reshape(b, c // (fi * fj * fk), fi, fj, fk, i, j, k)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // (fi * fj * fk), i * fi, j * fj, k * fk)


def conv3(inputs: int, outputs: int) -> nn.Conv3d:
    """3x3x3 convolution that keeps the size."""
    return nn.Conv3d(inputs, outputs, kernel_size=3, padding=1)


def conv1(inputs: int, outputs: int) -> nn.Conv3d:
    """Pointwise convolution."""
    return nn.Conv3d(inputs, outputs, kernel_size=1)


def zero(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Float32GroupNorm(nn.GroupNorm):
    """Group norm, computed in float32 whatever the precision around it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float()).to(x.dtype)


class ResidualBlock(nn.Module):
    """Two normalised convolutions around an identity; `condition` (B, D) modulates the second norm."""

    def __init__(self, width: int, condition: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = conv3(width, width)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv2 = zero(conv3(width, width))
        self.modulation = zero(nn.Linear(condition, 2 * width)) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.norm2(h)
        if self.modulation is not None and condition is not None:
            scale, shift = self.modulation(condition)[:, :, None, None, None].chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return x + self.conv2(nn.functional.silu(h))
