"""The reference segmenter on problems small enough for a test."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.evaluation.augmentation import augment
from diffaug.evaluation.overlap import dice
from diffaug.evaluation.segmenter import (
    Segmenter,
    dice_and_cross_entropy,
    fit_segmenter,
    predict,
    standardise,
)


def bright_boxes(count: int, seed: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Noise with a bright box (label 1) and a dark one (label 2) at random places, 24 voxels a side."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, channels, 24, 24, 24)).astype(np.float32) * 0.3
    labels = np.zeros((count, 1, 24, 24, 24), np.int16)
    for image, label in zip(images, labels, strict=True):
        for value, shift in ((1, 3.0), (2, -3.0)):
            low = rng.integers(2, 13, size=2)
            start = 2 if value == 1 else 13
            box = (slice(start, start + 8), slice(low[0], low[0] + 9), slice(low[1], low[1] + 9))
            image[(slice(None), *box)] += shift
            label[(0, *box)] = value
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def trained() -> Segmenter:
    images, labels = bright_boxes(12, seed=0)
    return fit_segmenter(standardise(images), labels, steps=60, seed=0, batch=4)


def test_it_learns_to_tell_bright_from_dark_boxes(trained: Segmenter) -> None:
    images, labels = bright_boxes(6, seed=1)
    scores = dice(predict(trained, standardise(images)), labels)
    assert scores.mean() > 0.75
    untrained = fit_segmenter(standardise(images), labels, steps=1, seed=0)
    assert dice(predict(untrained, standardise(images)), labels).mean() < 0.5


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not() -> None:
    images, labels = bright_boxes(3, seed=2)
    states = [fit_segmenter(images, labels, steps=3, seed=seed, batch=2).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_training_leaves_the_global_random_state_and_the_starting_model_alone(trained: Segmenter) -> None:
    images, labels = bright_boxes(3, seed=3)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    tuned = fit_segmenter(standardise(images), labels, steps=2, seed=0, start=trained)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in tuned.state_dict().items())


def test_a_trained_start_is_where_training_begins(trained: Segmenter) -> None:
    images, labels = bright_boxes(6, seed=4)
    images = standardise(images)
    losses: dict[str, list[float]] = {"start": [], "scratch": []}
    fit_segmenter(
        images, labels, steps=3, seed=0, start=trained, on_step=lambda _, loss: losses["start"].append(loss)
    )
    fit_segmenter(images, labels, steps=3, seed=0, on_step=lambda _, loss: losses["scratch"].append(loss))
    assert len(losses["start"]) == 3
    assert losses["start"][0] < 0.7 * losses["scratch"][0]


def test_several_channels_and_labels_are_possible() -> None:
    images, labels = bright_boxes(2, seed=5, channels=2)
    model = fit_segmenter(images, labels, steps=1, seed=0, classes=5, batch=2)
    assert model(images).shape == (2, 5, 24, 24, 24)
    predicted = predict(model, images)
    assert predicted.shape == labels.shape
    assert predicted.dtype == torch.int16


def test_a_case_is_predicted_alike_alone_and_in_a_batch(trained: Segmenter) -> None:
    images = standardise(bright_boxes(3, seed=6)[0])
    assert torch.equal(predict(trained, images)[1:2], predict(trained, images[1:2]))


@pytest.mark.parametrize(
    ("image_shape", "label_shape", "message"),
    [
        ((2, 1, 16, 16, 16), (2, 1, 16, 16, 8), "belong|need labels"),
        ((2, 1, 16, 16, 12), (2, 1, 16, 16, 12), "multiple of 8"),
    ],
)
def test_volumes_that_do_not_fit_are_refused(
    image_shape: tuple[int, ...], label_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DiffaugError, match=message):
        fit_segmenter(torch.zeros(image_shape), torch.zeros(label_shape, dtype=torch.int16), steps=1, seed=0)


def test_standardise_forgets_units_and_outliers() -> None:
    volume = torch.randn(2, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    result = standardise(volume)
    assert result.mean((2, 3, 4)).abs().max() < 1e-5
    assert (result.std((2, 3, 4)) - 1).abs().max() < 1e-3
    torch.testing.assert_close(standardise(volume * 700 + 90), result, atol=1e-3, rtol=1e-3)
    spoiled = volume.clone()
    spoiled[:, :, 0, 0, 0] = 1e6
    assert (standardise(spoiled) - result)[:, :, 1:].abs().max() < 0.1
    assert torch.equal(standardise(torch.full((1, 1, 8, 8, 8), 7)), torch.zeros(1, 1, 8, 8, 8))


def test_loss_is_smallest_for_the_truth_and_follows_soft_labels() -> None:
    labels = bright_boxes(2, seed=7)[1]
    shares = torch.cat([labels == label for label in range(3)], 1).float()
    assert dice_and_cross_entropy(shares * 40, shares) < 1e-3
    assert dice_and_cross_entropy(shares.roll(2, 3) * 40, shares) > 1
    halves = torch.full((1, 2, 8, 8, 8), 0.5)
    loss = dice_and_cross_entropy(torch.zeros(1, 2, 8, 8, 8), halves)
    assert loss == pytest.approx(np.log(2) + 0.5, abs=1e-5)


def test_augmentation_moves_image_and_label_together() -> None:
    labels = bright_boxes(8, seed=8)[1]
    images = labels.float() * 2
    augmented, shares = augment(images, labels, 3, None, torch.Generator().manual_seed(0))
    assert shares.shape == (8, 3, 24, 24, 24)
    torch.testing.assert_close(shares.sum(1), torch.ones(8, 24, 24, 24))
    assert not torch.equal(shares.argmax(1, keepdim=True), labels.long())
    for case in range(8):
        inside = augmented[case][shares[case, 2:] > 0.9]
        outside = augmented[case][shares[case, :1] > 0.9]
        assert inside.mean() > outside.mean() + 1


def test_augmentation_mirrors_about_half_of_the_cases() -> None:
    labels = torch.zeros(64, 1, 16, 16, 16, dtype=torch.int16)
    labels[:, :, :5] = 1
    _, plain = augment(labels.float(), labels, 2, None, torch.Generator().manual_seed(1))
    _, mirrored = augment(labels.float(), labels, 2, 0, torch.Generator().manual_seed(1))

    def on_the_right(shares: Tensor) -> int:
        return int((shares[:, 1, 10:].mean((1, 2, 3)) > shares[:, 1, :6].mean((1, 2, 3))).sum())

    assert on_the_right(plain) == 0
    assert 20 <= on_the_right(mirrored) <= 44


def test_augmentation_gives_each_case_its_own_parameters_and_repeats_with_the_seed() -> None:
    images, labels = bright_boxes(1, seed=9)
    images, labels = images.repeat(4, 1, 1, 1, 1), labels.repeat(4, 1, 1, 1, 1)
    first = augment(images, labels, 3, None, torch.Generator().manual_seed(3))
    again = augment(images, labels, 3, None, torch.Generator().manual_seed(3))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert len({tensor.sum().item() for tensor in first[0]}) == 4
    assert torch.isfinite(first[0]).all()


def test_dice_of_known_overlaps() -> None:
    true = torch.zeros(2, 1, 4, 4, 4, dtype=torch.int16)
    true[:, :, :2] = 1
    predicted = true.roll(1, 2)
    predicted[1] = true[1]
    scores = dice(predicted, true, labels=(1, 2))
    assert scores.shape == (2, 2)
    torch.testing.assert_close(scores[:, 0], torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert scores[:, 1].isnan().all()
    with pytest.raises(DiffaugError, match="cannot be compared"):
        dice(true, true[:1])
