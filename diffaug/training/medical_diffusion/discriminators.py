"""The patch discriminators of the VQ-GAN: one of slices, one of volumes (Isola et al. 2017; Ge et al. 2022).

Modules and parameters have the names of the authors' checkpoints.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.generators.blocks import Conv3d, Float32GroupNorm


class PatchDiscriminator(nn.Module):
    """Judges patches of an image: the outputs of all five layers, the last of which are the logits.

    Args:
        dimensions: 2 for slices `(B, C, H, W)`, 3 for volumes `(B, C, D, H, W)`.
        norm: "batch" as the authors', or "group".
    """

    def __init__(
        self, dimensions: Literal[2, 3], channels: int = 1, norm: Literal["group", "batch"] = "batch"
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d if dimensions == 2 else Conv3d
        batch_norm = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm3d
        widths = [channels, 64, 128, 256, 512, 1]
        strides = [2, 2, 2, 1, 1]
        for n, stride in enumerate(strides):
            layers: list[nn.Module] = [
                convolution(widths[n], widths[n + 1], kernel_size=4, stride=stride, padding=2)
            ]
            if 0 < n < 4:
                layers.append(
                    batch_norm(widths[n + 1]) if norm == "batch" else Float32GroupNorm(32, widths[n + 1])
                )
            if n < 4:
                layers.append(nn.LeakyReLU(0.2))
            self.add_module(f"model{n}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.children():
            x = layer(x)
            outputs.append(x)
        return outputs


class Discriminators(nn.Module):
    """The discriminator of slices along depth and that of volumes."""

    def __init__(self, channels: int = 1, norm: Literal["group", "batch"] = "batch") -> None:
        super().__init__()
        self.image_discriminator = PatchDiscriminator(2, channels, norm)
        self.video_discriminator = PatchDiscriminator(3, channels, norm)

    def forward(self, volume: Tensor, slices: Tensor) -> list[list[Tensor]]:
        """Outputs of both for volumes `(B, C, D, H, W)` and the index `(B,)` of a slice of each."""
        rows = torch.arange(len(volume), device=volume.device)
        return [self.image_discriminator(volume[rows, :, slices]), self.video_discriminator(volume)]


def hinge(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """The discriminators' loss: half of E[max(0, 1 - real)] + E[max(0, 1 + fake)], of both together."""
    losses = [
        0.5 * (F.relu(1 - r[-1].float()).mean() + F.relu(1 + f[-1].float()).mean())
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).sum()


def adversarial(fake: list[list[Tensor]]) -> Tensor:
    """The generator's loss: minus the mean logit, of both together."""
    return torch.stack([-f[-1].float().mean() for f in fake]).sum()


def feature_matching(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Mean absolute difference of the outputs of each layer but the last, summed over layers and
    discriminators."""
    losses = [
        (f.float() - r.detach().float()).abs().mean()
        for reals, fakes in zip(real, fake, strict=True)
        for r, f in zip(reals[:-1], fakes[:-1], strict=True)
    ]
    return torch.stack(losses).sum()
