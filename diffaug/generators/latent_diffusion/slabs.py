"""MONAI's autoencoders in slabs along the first axis: what they compute, in a fraction of the memory.

Decoding a volume at once holds up to ten activations at its resolution (measured at 96^3, of 64 channels
each: 7.3 with AutoencoderKL, 9.5 with AutoencoderKlMaisi). Here each layer runs slab by slab with the
statistics of the whole volume, so that nothing depends on where slabs begin; windows that overlap, the usual
way, normalise each by its own. No more than three activations are held (measured: 3.2 and 0.2 GiB): the input
of a block that narrows, which has twice the channels, and its output.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Voxels of a slab: with 64 channels 16 MiB. 2^18 took 0.8 activations of 96^3 more, and a fifth longer.
SLAB_VOXELS = 2**16


def encode(autoencoder: Any, image: Tensor) -> Tensor:
    """The mean of the posterior of images `(B, C, I, J, K)`."""
    return _convolved(autoencoder.quant_conv_mu, _run(autoencoder.encoder, image))


def decode(autoencoder: Any, latent: Tensor) -> Tensor:
    """Images of latents `(B, Z, i, j, k)`."""
    return _run(autoencoder.decoder, _convolved(autoencoder.post_quant_conv, latent))


def _run(network: Any, x: Tensor) -> Tensor:
    """An encoder's or a decoder's blocks, one after the other."""
    block: Any
    for block in network.blocks:
        kind = type(block).__name__
        if isinstance(block, nn.GroupNorm):
            scale, shift = _normalisation(block, x)
            x.mul_(scale).add_(shift)
        elif kind in ("AEKLResBlock", "MaisiResBlock"):
            x = _residual(block, x)
        elif kind in ("AEKLDownsample", "MaisiDownsample"):
            x = _halved(block, x)
        elif kind == "MaisiUpsample" and not block.use_convtranspose:
            x = _doubled(block.conv, x, "trilinear")
        elif kind == "UpSample" and hasattr(block, "postconv") and hasattr(block, "upsample_non_trainable"):
            x = _doubled(block.postconv, x, "nearest")
        elif kind in ("Convolution", "MaisiConvolution"):
            x = _convolved(block, x)
        else:
            # Attention, at the coarsest resolution.
            x = block(x)
    return x


def _residual(block: Any, x: Tensor) -> Tensor:
    """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`, in the place of `x` where it fits there."""
    first, second = _conv3d(block.conv1), _conv3d(block.conv2)
    h = _activated_convolution(block.norm1, first, x)
    scale, shift = _normalisation(block.norm2, h)
    narrows = not isinstance(block.nin_shortcut, nn.Identity)
    before: Tensor | None = None
    for start, stop in _slabs(h):
        part = h[:, :, max(0, start - 1) : stop + 1].clone()
        if before is not None:
            # Its first plane was overwritten by the slab before.
            part[:, :, :1] = before
        before = h[:, :, stop - 1 : stop].clone()
        made = _on_slab(second, F.silu(part.mul_(scale).add_(shift)), start == 0, stop == h.shape[2])
        if narrows:
            h[:, :, start:stop] = made.add_(_conv3d(block.nin_shortcut)(x[:, :, start:stop]))
        else:
            x[:, :, start:stop] += made
    return h if narrows else x


def _activated_convolution(norm: nn.Module, convolution: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(silu(norm(x)))`, beside `x`."""
    scale, shift = _normalisation(norm, x)
    out = x.new_empty(x.shape[0], convolution.out_channels, *x.shape[2:])
    for start, stop in _slabs(out):
        part = x[:, :, max(0, start - 1) : stop + 1].clone().mul_(scale).add_(shift)
        out[:, :, start:stop] = _on_slab(convolution, F.silu(part), start == 0, stop == x.shape[2])
    return out


def _convolved(module: nn.Module, x: Tensor) -> Tensor:
    convolution = _conv3d(module)
    if convolution.kernel_size[0] == 1:
        return torch.cat([convolution(x[:, :, start:stop]) for start, stop in _slabs(x)], dim=2)
    out = x.new_empty(x.shape[0], convolution.out_channels, *x.shape[2:])
    for start, stop in _slabs(x):
        part = x[:, :, max(0, start - 1) : stop + 1]
        out[:, :, start:stop] = _on_slab(convolution, part, start == 0, stop == x.shape[2])
    return out


def _doubled(module: nn.Module, x: Tensor, mode: str) -> Tensor:
    """Interpolated to twice the size, then convolved."""
    convolution, length = _conv3d(module), x.shape[2]
    out = x.new_empty(x.shape[0], convolution.out_channels, *(2 * n for n in x.shape[2:]))
    for start, stop in _slabs(out, even=True):
        # A plane more on each side for the kernel, and one for the interpolation.
        low, high = max(0, start // 2 - 2), min(length, stop // 2 + 2)
        part = F.interpolate(x[:, :, low:high], scale_factor=2.0, mode=mode)
        first, last = max(0, start - 1) - 2 * low, min(2 * length, stop + 1) - 2 * low
        made = _on_slab(convolution, part[:, :, first:last], start == 0, stop == 2 * length)
        out[:, :, start:stop] = made
    return out


def _halved(block: Any, x: Tensor) -> Tensor:
    """A convolution of stride 2, with a plane of zeros behind each axis."""
    convolution = _conv3d(block.conv)
    out = x.new_empty(x.shape[0], convolution.out_channels, *(n // 2 for n in x.shape[2:]))
    for start, stop in _slabs(out):
        part = F.pad(x[:, :, 2 * start : 2 * stop + 1], (0, 1, 0, 1))
        if part.shape[2] < 2 * (stop - start) + 1:
            part = F.pad(part, (0, 0, 0, 0, 0, 1))
        out[:, :, start:stop] = F.conv3d(part, convolution.weight, convolution.bias, stride=2)
    return out


def _on_slab(convolution: nn.Conv3d, part: Tensor, first: bool, last: bool) -> Tensor:
    """A 3 x 3 x 3 convolution of a slab that has its neighbours' planes; zeros lie beyond the volume."""
    if first or last:
        part = F.pad(part, (0, 0, 0, 0, int(first), int(last)))
    return F.conv3d(part, convolution.weight, convolution.bias, padding=(0, 1, 1))


def _normalisation(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Group normalisation as factors and summands `(B, C, 1, 1, 1)`, by the statistics of all of `x`."""
    assert isinstance(norm, nn.GroupNorm)
    batch, channels, groups = x.shape[0], x.shape[1], norm.num_groups
    count = x[0].numel() // groups

    def grouped(values: Tensor) -> Tensor:
        return values.reshape(batch, groups, -1).double()

    total = sum(
        (grouped(x[:, :, a:b].sum((2, 3, 4), dtype=torch.float64)).sum(2) for a, b in _slabs(x)),
        torch.zeros(batch, groups, dtype=torch.float64, device=x.device),
    )
    mean = total / count
    spread = torch.zeros_like(mean)
    of_channels = mean.repeat_interleave(channels // groups, dim=1)[:, :, None, None, None].float()
    for start, stop in _slabs(x):
        squares = (x[:, :, start:stop] - of_channels).square_().sum((2, 3, 4), dtype=torch.float64)
        spread += grouped(squares).sum(2)
    deviation = (spread / count + norm.eps).sqrt()
    per_channel = 1 / deviation.repeat_interleave(channels // groups, dim=1)
    scale = per_channel * norm.weight.double()
    shift = norm.bias.double() - mean.repeat_interleave(channels // groups, dim=1) * scale
    scale, shift = (each[:, :, None, None, None].to(x.dtype) for each in (scale, shift))
    return scale, shift


def _slabs(x: Tensor, even: bool = False) -> Iterator[tuple[int, int]]:
    """Bounds of slabs along the first axis, of an even depth where asked."""
    length = x.shape[2]
    depth = max(2, SLAB_VOXELS // (x.shape[3] * x.shape[4]) // 2 * 2) if even else 0
    depth = depth or max(1, SLAB_VOXELS // (x.shape[3] * x.shape[4]))
    for start in range(0, length, depth):
        yield start, min(start + depth, length)


def _conv3d(module: Any) -> nn.Conv3d:
    """The convolution inside MONAI's wrappers."""
    while not isinstance(module, nn.Conv3d):
        module = module.conv
    return module
