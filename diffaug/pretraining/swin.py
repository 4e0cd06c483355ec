"""The self-supervision of Swin UNETR (Tang et al. 2022, arXiv 2111.14791), with which *Medical Diffusion*
pretrains.

Two views of each patch are turned by a random right angle and partly cut out. From both, the encoder's heads
restore the patch (L1), tell the angle (cross entropy), and find the other view among all (InfoNCE). The loss
is the sum of the three.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.errors import DiffaugError
from diffaug.generators.hardware import has_bfloat16
from diffaug.segmentation.patches import Patches

# Of the contrast, and the length of its vectors.
TEMPERATURE = 0.5
CONTRAST = 128
# Right angles that a view may be turned by.
ANGLES = 4
# Share of a patch that is cut out, in boxes of up to a quarter of its sides.
CUT = 0.3


class SwinSelfSupervised(nn.Module):
    """The encoder of a MONAI SwinUNETR with three heads.

    Args:
        encoder: its `swinViT`.
        channels: of the images.
    """

    def __init__(self, encoder: Any, channels: int) -> None:
        super().__init__()
        self.swinViT = encoder
        width = 16 * int(encoder.embed_dim)
        self.angle = nn.Linear(width, ANGLES)
        self.contrast = nn.Linear(width, CONTRAST)
        blocks: list[nn.Module] = []
        for _ in range(5):
            blocks += [
                nn.Conv3d(width, width // 2, 3, padding=1),
                nn.InstanceNorm3d(width // 2),
                nn.LeakyReLU(),
                nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
            ]
            width //= 2
        self.restore = nn.Sequential(*blocks, nn.Conv3d(width, channels, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of views `(B, C, I, J, K)`: logits of angles `(B, 4)`, unit vectors `(B, 128)`, and the restored
        patches `(B, C, I, J, K)`."""
        deepest = self.swinViT(images)[-1]
        pooled = deepest.mean((2, 3, 4))
        return self.angle(pooled), F.normalize(self.contrast(pooled).float(), dim=1), self.restore(deepest)


@dataclass(frozen=True)
class Swin:
    """The objective, for a `SwinSelfSupervised`.

    Attributes:
        patches: whose label maps are not looked at; two of their sides are equal, to be turned in.
    """

    patches: Patches

    def __call__(self, network: nn.Module, step: int) -> Tensor:
        random = self.patches.random(step)
        images, _ = self.patches.draw(step, random)
        device = next(network.parameters()).device
        plane = turning_plane(self.patches.patch)
        angles = torch.randint(ANGLES, (2 * len(images),), generator=random)
        turned = torch.stack(
            [
                torch.rot90(image, int(n), plane)
                for image, n in zip(torch.cat([images, images]), angles, strict=True)
            ]
        )
        views = turned.clone()
        for view in views:
            cut_out(view, random)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
            logits, vectors, restored = network(views.to(device))
        return (
            (restored.float() - turned.to(device)).abs().mean()
            + F.cross_entropy(logits.float(), angles.to(device))
            + contrast(vectors)
        )


def turning_plane(patch: Sequence[int]) -> tuple[int, int]:
    """Axes of `(C, I, J, K)` whose sides are equal.

    Raises:
        DiffaugError: there are none.
    """
    for first, second in ((0, 1), (0, 2), (1, 2)):
        if patch[first] == patch[second]:
            return 1 + first, 1 + second
    raise DiffaugError(
        f"a patch of {tuple(patch)} voxels cannot be turned by right angles: give one with two equal sides"
    )


def cut_out(view: Tensor, random: torch.Generator) -> None:
    """Set boxes of a view `(C, I, J, K)` to 0, in place, until they cover their share."""
    sides = view.shape[1:]
    blank = torch.zeros(sides, dtype=torch.bool)
    while blank.float().mean() < CUT:
        window = []
        for side in sides:
            length = 1 + int(torch.randint(max(1, side // 4), (1,), generator=random))
            start = int(torch.randint(side - length + 1, (1,), generator=random))
            window.append(slice(start, start + length))
        blank[tuple(window)] = True
    view.masked_fill_(blank, 0)


def contrast(vectors: Tensor) -> Tensor:
    """InfoNCE of unit vectors `(2 B, n)`: row b and row b + B show one patch."""
    count = len(vectors) // 2
    similarities = vectors @ vectors.T / TEMPERATURE
    similarities = similarities.masked_fill(
        torch.eye(2 * count, dtype=torch.bool, device=vectors.device), float("-inf")
    )
    partners = torch.arange(2 * count, device=vectors.device).roll(count)
    return F.cross_entropy(similarities, partners)
