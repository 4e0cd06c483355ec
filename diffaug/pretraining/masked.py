"""Masked autoencoding of a convolutional U-Net: cubes of a patch are blanked, and the network restores them.

He et al. 2022 (Masked autoencoders are scalable vision learners), for 3D convolutional networks as in Wald et
al. 2025 (Revisiting MAE pre-training for 3D medical image segmentation), without sparse convolutions: what is
blanked has the mean intensity 0, and the loss counts it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffaug.segmentation.patches import Patches
from diffaug.segmentation.training import Schedule, augmented, logits

# Sides of the blanked cubes, voxels, and the share of a patch that they cover.
CUBE = 8
SHARE = 0.6


@dataclass(frozen=True)
class Masked:
    """The objective: mean squared error of blanked voxels, for a network with as many outputs as channels.

    Attributes:
        patches: whose label maps are not looked at.
    """

    patches: Patches
    schedule: Schedule

    def __call__(self, network: nn.Module, step: int) -> Tensor:
        random = self.patches.random(step)
        images, labels = self.patches.draw(step, random)
        device = next(network.parameters()).device
        images, _ = augmented(images.to(device), labels.to(device), 2, self.schedule, random)
        blank = blanked(images.shape, random).to(images.device)
        restored = logits(network, images.masked_fill(blank, 0))
        return ((restored - images) ** 2).masked_select(blank.expand_as(images)).mean()


def blanked(shape: Sequence[int], random: torch.Generator) -> Tensor:
    """Which voxels of a batch `(B, C, I, J, K)` are blanked, `(B, 1, I, J, K)`: of each case the same number
    of random cubes."""
    count = [-(-n // CUBE) for n in shape[2:]]
    scores = torch.rand((shape[0], count[0] * count[1] * count[2]), generator=random)
    least = scores.kthvalue(max(1, round(SHARE * scores.shape[1])), dim=1, keepdim=True).values
    cubes = (scores <= least).view(shape[0], 1, *count)
    for axis in range(3):
        cubes = cubes.repeat_interleave(CUBE, dim=2 + axis)
    return cubes[:, :, : shape[2], : shape[3], : shape[4]]
