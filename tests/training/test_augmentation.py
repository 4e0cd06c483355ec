"""Augmentation of training cases: image and label move together, and keep what anatomy keeps."""

import numpy as np
import pytest

from diffaug.training.augmentation import AugmentationConfig, Augmenter

SHAPE, MARGIN = (24, 28, 24), 4
CANVAS = tuple(size + 2 * MARGIN for size in SHAPE)
STILL = {"rotation": 0, "scaling": 0, "stretching": 0, "shift": 0, "gamma": 0}


def ellipsoid() -> np.ndarray:
    """A label map on the canvas: label 1 in front of label 2, off the centre."""
    axes = np.meshgrid(*[np.arange(size) - size / 2 + 0.5 for size in CANVAS], indexing="ij")
    inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, (1, -2, 0), (6, 9, 5), strict=True)) <= 1
    return np.where(inside, np.where(axes[1] > -2, 1, 2), 0).astype(np.uint8)


def augment(seed: int = 0, **config: object) -> tuple[np.ndarray, np.ndarray]:
    label = ellipsoid()
    image = (label > 0).astype(np.float32)[None] * 1.6 - 0.8
    moved, moved_label = Augmenter(AugmentationConfig(**(STILL | config)), SHAPE).draw(image, label, seed)
    assert moved_label is not None
    return moved, moved_label


def test_nothing_moves_where_every_range_is_zero() -> None:
    inner = tuple(slice(MARGIN, -MARGIN) for _ in range(3))
    image, label = augment()
    assert np.array_equal(label, ellipsoid()[inner])
    assert np.allclose(image[0] > 0, label > 0)


def test_rotations_and_shifts_keep_the_volume_of_each_label() -> None:
    """Linear interpolation would lose 1 to 2 % of these."""
    moved = [augment(seed, rotation=15, shift=1.5)[1] for seed in range(5)]
    assert not any(np.array_equal(label, augment()[1]) for label in moved)
    for value in (1, 2):
        volume = np.mean([(label == value).sum() for label in moved])
        assert volume == pytest.approx((ellipsoid() == value).sum(), rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_image_and_label_move_together(seed: int) -> None:
    image, label = augment(seed, rotation=15, shift=2, scaling=0.1, stretching=0.05)
    overlap = ((image[0] > 0) & (label > 0)).sum() / ((image[0] > 0) | (label > 0)).sum()
    assert overlap > 0.97


def test_mirrors_only_where_told_to() -> None:
    plain = augment()[1]
    mirrored = [augment(seed, mirror_axes=(1,))[1] for seed in range(6)]
    same = [np.array_equal(label, plain) for label in mirrored]
    flipped = [np.array_equal(label, plain[:, ::-1]) for label in mirrored]
    assert any(same)
    assert any(flipped)
    assert all(a != b for a, b in zip(same, flipped, strict=True))


def test_gamma_changes_intensities_and_nothing_else() -> None:
    image, label = augment(1, gamma=0.5)
    assert np.array_equal(label, augment()[1])
    assert not np.allclose(image, augment()[0])


def test_a_seed_is_a_case() -> None:
    config = AugmentationConfig()
    label = ellipsoid()
    image = np.random.default_rng(0).normal(0, 0.3, (1, *CANVAS)).astype(np.float32)
    augmenter = Augmenter(config, SHAPE)
    images, labels = augmenter.draw_batch([(image, label), (image, None), (image, label)], [7, 8, 7])
    assert np.array_equal(images[0], images[2])
    assert np.array_equal(labels[0], labels[2])
    assert not np.array_equal(images[0], images[1])
    assert not labels[1].any()


def test_rotations_are_in_millimetres() -> None:
    """A ball keeps its shape on a grid whose voxels are three times as long along one axis."""
    spacing = np.array([1.0, 1.0, 3.0])
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (48, 48, 16)), indexing="ij")
    ball = sum((a * s) ** 2 for a, s in zip(axes, spacing, strict=True)) < 18**2
    image = np.where(ball, 1, -1).astype(np.float32)[None]
    config = AugmentationConfig(rotation=45, scaling=0, stretching=0, shift=0, gamma=0)
    for seed in range(3):
        overlap = []
        for voxels in ((1.0, 1.0, 3.0), (1.0, 1.0, 1.0)):
            moved = Augmenter(config, (48, 48, 16), voxels).draw(image, None, seed)[0][0] > 0
            overlap.append((moved & ball).sum() * 2 / (moved.sum() + ball.sum()))
        assert overlap[0] > 0.85, "as far as voxels of 3 mm show a ball of 36"
        assert overlap[1] < 0.7, "by voxels it would be sheared"
