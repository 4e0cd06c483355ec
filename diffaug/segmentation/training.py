"""Training a segmentation network on patches, with strong classical augmentation."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from diffaug.errors import DiffaugError
from diffaug.evaluation.augmentation import augment
from diffaug.evaluation.segmenter import dice_and_cross_entropy
from diffaug.generators.hardware import has_bfloat16
from diffaug.segmentation.patches import Patches

# Loss of a network at a step, counted from 0, whose randomness depends on the step alone.
Objective = Callable[[nn.Module, int], Tensor]


class Schedule(BaseModel):
    """How a network is trained.

    Attributes:
        steps: of the optimiser, AdamW.
        batch: patches a step.
        learning_rate: the largest one; it rises over the first twentieth, then falls to zero along a cosine.
        augmentation: whether patches are turned, scaled, bent, blurred, shaded and soiled.
        mirror_axis: spatial axis (0 R, 1 A, 2 S) that is mirrored in half of the patches, or None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch: int = Field(2, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    augmentation: bool = True
    mirror_axis: int | None = Field(None, ge=0, le=2)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = max(1, self.steps // 20)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * min((step + 1) / warmup, cosine)


@dataclass(frozen=True)
class Segmentation:
    """The objective of segmentation: cross entropy and soft Dice on patches of labelled cases.

    Attributes:
        patches: of cases with label maps, numbered from 0 to classes - 1.
        classes: background included.
    """

    patches: Patches
    classes: int
    schedule: Schedule

    def __call__(self, network: nn.Module, step: int) -> Tensor:
        random = self.patches.random(step)
        images, labels = self.patches.draw(step, random)
        device = next(network.parameters()).device
        images, shares = augmented(images.to(device), labels.to(device), self.classes, self.schedule, random)
        return dice_and_cross_entropy(logits(network, images), shares)


def optimise(
    network: nn.Module,
    objective: Objective,
    schedule: Schedule,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train a network in place; it ends in evaluation mode.

    Equal arguments give equal weights on one machine with one number of threads.

    Args:
        on_step: called with the step, from 1, and its loss.
    """
    optimiser = torch.optim.AdamW(network.parameters(), schedule.learning_rate, weight_decay=1e-2)
    network.train()
    for step in range(schedule.steps):
        optimiser.param_groups[0]["lr"] = schedule.rate(step)
        loss = finite(objective(network, step), step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    network.eval()


def finite(loss: Tensor, step: int) -> Tensor:
    """The loss.

    Raises:
        DiffaugError: it is no number.
    """
    if not bool(torch.isfinite(loss.detach())):
        raise DiffaugError(
            f"the loss is {float(loss.detach())} at step {step + 1}: look at the intensities of the cases, "
            "or take a lower learning rate"
        )
    return loss


def augmented(
    images: Tensor, labels: Tensor, classes: int, schedule: Schedule, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images and the share of each class in each voxel, `(B, classes, I, J, K)`."""
    # In float32 also where a training runs in bfloat16, which would leave some hundred grey levels.
    with torch.autocast(images.device.type, enabled=False):
        return _augmented(images, labels, classes, schedule, random)


def _augmented(
    images: Tensor, labels: Tensor, classes: int, schedule: Schedule, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    if schedule.augmentation:
        return augment(images, labels, classes, schedule.mirror_axis, random)
    return images, torch.cat([labels == n for n in range(classes)], 1).float()


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Float32 output of a network, computed in bfloat16 where the hardware is fast at it."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=has_bfloat16(images.device)):
        return network(images).float()
