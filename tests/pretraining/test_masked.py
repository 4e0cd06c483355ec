"""Masked autoencoding: what is blanked, and that it is learnt."""

import numpy as np
import pytest
import torch
from torch import nn

from diffaug.pretraining.masked import Masked, blanked
from diffaug.pretraining.stages import objective
from diffaug.segmentation.cases import Prepared
from diffaug.segmentation.patches import Listed, Patches
from diffaug.segmentation.training import Schedule, optimise
from tests.segmentation.test_cases import blobs


def test_cubes_cover_their_share() -> None:
    blank = blanked((3, 2, 40, 56, 40), torch.Generator().manual_seed(0))
    assert blank.shape == (3, 1, 40, 56, 40)
    shares = blank.float().mean((1, 2, 3, 4))
    assert shares == pytest.approx([0.6] * 3, abs=1e-6)
    cubes = blank.unfold(2, 8, 8).unfold(3, 8, 8).unfold(4, 8, 8).flatten(5)
    assert ((cubes.all(5)) | ~cubes.any(5)).all()
    assert not torch.equal(blank[0], blank[1])


def test_the_loss_counts_what_is_blanked_alone() -> None:
    case, _ = blobs((16, 16, 16), np.eye(4))
    schedule = Schedule(steps=1, augmentation=False)
    masked = Masked(Patches(Listed([case], 0), (16, 16, 16), 1, 0, labelled=False), schedule)

    class Copy(nn.Module):
        """Gives back what it sees, which is 0 where it was blanked."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    random = masked.patches.random(3)
    masked.patches.draw(3, random)
    blank = blanked((1, 1, 16, 16, 16), random)
    wanted = float((case.image[None][blank] ** 2).mean())
    assert float(masked(Copy(), 3)) == pytest.approx(wanted, rel=0.01)


def test_labels_decide_nothing() -> None:
    case, _ = blobs((40, 40, 40), np.eye(4))
    unlabelled = Prepared(case.name, case.patient, case.image, None, case.placement)
    schedule = Schedule(steps=1)
    network = nn.Conv3d(1, 1, 3, padding=1)
    losses = [
        float(
            objective("masked", Patches(Listed([one], 0), (16, 16, 16), 2, 0), 3, schedule)(
                network, 0
            ).detach()
        )
        for one in (case, unlabelled)
    ]
    assert losses[0] == losses[1]


def test_it_learns() -> None:
    cases = [blobs((16, 16, 16), np.eye(4), seed)[0] for seed in range(3)]
    schedule = Schedule(steps=60, learning_rate=1e-2, augmentation=False)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 8, 9, padding=4), nn.ReLU(), nn.Conv3d(8, 1, 3, padding=1))
    losses: list[float] = []
    aim = Masked(Patches(Listed(cases, 0), (16, 16, 16), 2, 0), schedule)
    optimise(network, aim, schedule, lambda _, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
