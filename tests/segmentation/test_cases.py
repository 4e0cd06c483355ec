"""Cases in a network's space, their patches, and predictions on the cases' own voxels."""

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffaug.segmentation.cases import Prepared, Space, Window, choose_space, prepare, standardise
from diffaug.segmentation.patches import Listed, Patches
from diffaug.segmentation.prediction import predict_case
from diffaug.segmentation.scoring import score
from diffaug.segmentation.training import Schedule, Segmentation, optimise

SPACE = Space(spacing=(1.0, 1.0, 1.0), patch=(16, 16, 16))
CLASSES = {0: 0, 3: 1, 7: 2}


def blobs(
    shape: tuple[int, int, int], affine: np.ndarray, seed: int = 0, space: Space = SPACE
) -> tuple[Prepared, Tensor]:
    """A prepared case with two boxes, and its label map as stored."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.int16)
    i, j, k = shape
    label[i // 4 : i // 2, j // 4 : j // 2, k // 4 : 3 * k // 4] = 3
    label[i // 2 : 3 * i // 4, j // 2 : 3 * j // 4, k // 4 : 3 * k // 4] = 7
    image = torch.from_numpy((100 * label + rng.normal(0, 20, shape)).astype(np.float32))[None]
    stored = torch.from_numpy(label)[None]
    return prepare("case", "patient", image, stored, affine, space, CLASSES), stored


class Oracle(nn.Module):
    """Reads the class off the intensity, as `blobs` draws it."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels))

    def forward(self, images: Tensor) -> Tensor:
        return -50 * (images - self.levels.view(1, -1, 1, 1, 1)) ** 2


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.integers(12, 40)] * 3),
    code=st.sampled_from(["RAS", "LPS", "SRA", "PIR", "ALS"]),
)
def test_predictions_come_back_voxel_for_voxel(shape: tuple[int, int, int], code: str) -> None:
    """Of equal spacing: an oracle's prediction is the label map itself, whatever orientation and size."""
    affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(code), shape)
    case, stored = blobs(shape, affine)
    assert all(n >= m for n, m in zip(case.image.shape[1:], SPACE.patch, strict=True))
    assert case.label is not None
    levels = [float(case.image[0][case.label[0] == n].mean()) for n in range(3)]
    found = predict_case(Oracle(levels), case, SPACE.patch)
    assert found.shape == stored.shape
    wanted = torch.zeros_like(stored)
    for number, own in CLASSES.items():
        wanted[stored == number] = own
    assert (found == wanted).float().mean() > 0.999


def test_predictions_are_resampled_to_the_scan() -> None:
    affine = np.diag([2.0, 1.5, 1.0, 1.0])
    case, stored = blobs((20, 24, 30), affine)
    assert case.image.shape == (1, 40, 36, 30)
    assert case.label is not None
    levels = [float(case.image[0][case.label[0] == n].mean()) for n in range(3)]
    found = predict_case(Oracle(levels), case, SPACE.patch)
    assert found.shape == stored.shape
    for number, own in CLASSES.items():
        scores = score((found == own).int(), (stored == number).int(), [1], (2, 1.5, 1), 2.0)[0]
        assert scores.dice > 0.85


def test_the_mirrored_rim_is_no_structure() -> None:
    case, _ = blobs((10, 12, 10), np.eye(4))
    assert case.image.shape == (1, 16, 16, 16)
    assert case.label is not None
    outside = case.label.clone()
    outside[:, 3:13, 2:14, 3:13] = 0
    assert not outside.any()
    assert case.image[0, 0].std() > 0


def test_standardise() -> None:
    image = torch.randn(2, 20, 20, 20) * torch.tensor([5.0, 0.1]).view(2, 1, 1, 1) + 30
    found = standardise(image, None)
    assert found.mean((1, 2, 3)).abs().max() < 1e-4
    assert (found.std((1, 2, 3)) - 1).abs().max() < 1e-3
    assert not standardise(torch.full((1, 4, 4, 4), 7.0), None).any()
    window = standardise(torch.tensor([[[[-2000.0, -1000, 0, 400, 900]]]]), Window.of(-1000, 400))
    assert window.flatten().tolist() == pytest.approx([-1, -1, 3 / 7, 1, 1])


def test_choose_space() -> None:
    space = choose_space([(1, 1, 1)] * 3, [(36, 50, 35), (34, 52, 40), (36, 48, 36)], (8, 8, 8))
    assert space == Space(spacing=(1, 1, 1), patch=(40, 56, 40))
    tiny = choose_space([(1, 1, 1)], [(5, 6, 7)], (8, 8, 8))
    assert tiny.patch == (16, 16, 16)
    large = choose_space([(0.8, 0.8, 3)], [(512, 512, 40)], (16, 16, 8))
    assert large.spacing == (0.8, 0.8, 3)
    assert large.patch[2] == 40
    assert large.patch[0] == large.patch[1] <= 96


def test_patches_of_a_step_depend_on_the_step_alone() -> None:
    cases = [blobs((24, 20, 30), np.eye(4), seed)[0] for seed in range(3)]
    patches, again = (Patches(Listed(cases, 5), (16, 16, 16), 2, seed=5) for _ in range(2))
    drawn = [patches.draw(step, patches.random(step)) for step in range(6)]
    for step in (4, 0, 5):
        images, labels = again.draw(step, again.random(step))
        assert torch.equal(images, drawn[step][0])
        assert torch.equal(labels, drawn[step][1])
    # Twelve patches of three cases: each four times.
    drawn_cases = [id(patches.source.case(n)) for n in range(12)]
    assert [drawn_cases.count(id(case)) for case in cases] == [4, 4, 4]


def test_training_learns_and_repeats_to_the_bit() -> None:
    cases = [blobs((20, 20, 20), np.eye(4), seed)[0] for seed in range(2)]
    schedule = Schedule(steps=30, learning_rate=1e-2)

    def train() -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 3, 3, padding=1))
        losses: list[float] = []
        aim = Segmentation(Patches(Listed(cases, 0), (16, 16, 16), 2, 0), 3, schedule)
        optimise(network, aim, schedule, lambda _, loss: losses.append(loss))
        return losses, network

    losses, network = train()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert losses == train()[0]
    assert not network.training


def test_schedule() -> None:
    schedule = Schedule(steps=100, learning_rate=0.5)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(0.5, rel=0.02)
    assert rates[-1] < 0.001


def test_scores_by_hand() -> None:
    true = torch.zeros(1, 20, 20, 20, dtype=torch.int16)
    true[0, 5:15, 5:15, 5:15] = 1
    shifted = torch.roll(true, 2, dims=1)
    first, second = score(shifted, true, [1, 2], (1.5, 1, 1), 3.0)
    assert first.dice == pytest.approx(0.8)
    assert first.hd95 == pytest.approx(3.0)
    assert first.nsd == pytest.approx(1.0)
    assert score(shifted, true, [1], (1.5, 1, 1), 1.0)[0].nsd < 0.9
    assert second == (1.0, 1.0, 0.0)
    missed = score(torch.zeros_like(true), true, [1], (1, 1, 1), 1.0)[0]
    assert missed == (0.0, 0.0, pytest.approx(math.sqrt(1200)))
