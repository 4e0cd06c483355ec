"""Building blocks that the autoencoders and the denoiser share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` with integer padding by zeros, which is right on small volumes and fast on single ones.

    Where an axis is shorter than the kernel, the zeros are written out: oneDNN's bfloat16 gradient of the
    weights leaves part of them unset there, writes out of bounds, or never ends (torch 2.15 on Zen 5: kernel
    3 at a depth of 2, kernel 4 with stride 2 at a height of 2, kernel 7 at heights of 1 and 2).

    A single volume in float32 on a CPU is given to oneDNN, as torch gives it larger ones. Below 20480 numbers
    in channels and first two axes torch takes an implementation with a twentieth of its speed (32 channels of
    20 x 28 x 20, two cores). Without bfloat16 the flagship varies a case in 0.4 s so, and in 1.0 otherwise.
    """

    def forward(self, x: Tensor) -> Tensor:
        margins = [int(margin) for margin in self.padding]
        if any(m and n < k for n, k, m in zip(x.shape[2:], self.kernel_size, margins, strict=True)):
            x = F.pad(x, [margin for margin in reversed(margins) for _ in range(2)])
            margins = [0, 0, 0]
        if _single_in_float32(x):
            return torch.mkldnn_convolution(
                x, self.weight, self.bias, margins, self.stride, self.dilation, self.groups
            )
        return F.conv3d(x, self.weight, self.bias, self.stride, margins, self.dilation, self.groups)


def _single_in_float32(x: Tensor) -> bool:
    return (
        len(x) == 1
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class ConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` that is right on small volumes too: see `Conv3d`. Where an axis of the output is
    shorter than the kernel, what padding takes away is computed and cut off."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        margins = [int(margin) for margin in self.padding]
        axes = zip(x.shape[2:], self.stride, margins, strict=True)
        if all((n - 1) * stride >= 2 * margin for n, stride, margin in axes):
            return super().forward(x)
        whole = F.conv_transpose3d(x, self.weight, self.bias, self.stride)
        cut = [slice(margin, n - margin) for n, margin in zip(whole.shape[2:], margins, strict=True)]
        return whole[:, :, cut[0], cut[1], cut[2]]


def conv3(inputs: int, outputs: int) -> nn.Conv3d:
    """3x3x3 convolution that keeps the size."""
    return Conv3d(inputs, outputs, kernel_size=3, padding=1)


def conv1(inputs: int, outputs: int) -> nn.Conv3d:
    """Pointwise convolution."""
    return Conv3d(inputs, outputs, kernel_size=1)


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
