"""Correlations at the best of all shifts, turns and stretches."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from scipy import ndimage

from diffaug.evaluation.alignment import aligned_correlations, correlations, registered_correlations


def volumes(count: int, channels: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, 12, 8, 16, generator=torch.Generator().manual_seed(seed))


def test_a_shifted_volume_is_found_whole_whatever_comes_in_at_the_border() -> None:
    others = volumes(5)
    scan = volumes(1, seed=1)
    copy = volumes(1, seed=2)
    copy[:, :, 2:, :-1, 1:] = scan[:, :, :-2, 1:, :-1]
    found = aligned_correlations(torch.cat([copy, others]), scan, 2)
    assert found[0, 0] == pytest.approx(1, abs=1e-5)
    assert found[1:].max() < 0.5


@pytest.mark.parametrize("channels", [1, 2])
def test_it_is_the_largest_of_all_shifts(channels: int) -> None:
    first, second = volumes(3, channels), volumes(2, channels, seed=1)
    expected = np.full((3, 2), -1.0)
    for n, m in np.ndindex(3, 2):
        for shift in product((-1, 0, 1), repeat=3):
            a, b = first[n].numpy(), second[m].numpy()
            for axis, s in enumerate(shift, start=1):
                size = a.shape[axis] - abs(s)
                a = a.take(range(max(0, s), max(0, s) + size), axis)
                b = b.take(range(max(0, -s), max(0, -s) + size), axis)
            expected[n, m] = max(expected[n, m], np.corrcoef(a.ravel(), b.ravel())[0, 1])
    assert np.allclose(aligned_correlations(first, second, 1), expected, atol=1e-5)


def test_no_shift_is_plain_correlation() -> None:
    first, second = volumes(3), volumes(4, seed=1)
    expected = np.corrcoef(first.flatten(1), second.flatten(1))[:3, 3:]
    assert np.allclose(aligned_correlations(first, second, 0), expected, atol=1e-5)


def test_three_quarters_of_a_side_always_overlap() -> None:
    first, second = volumes(2), volumes(2, seed=1)
    # Sides of 12, 8 and 16 voxels.
    assert torch.equal(aligned_correlations(first, second, 9), aligned_correlations(first, second, 4))
    assert not torch.equal(aligned_correlations(first, second, 4), aligned_correlations(first, second, 2))
    thin = torch.randn(2, 1, 12, 3, 1)
    assert aligned_correlations(thin, thin, 2).diagonal().tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -0.7312, 1e6])
def test_constant_volumes_are_like_nothing(value: float) -> None:
    constant = torch.full((1, 1, 12, 8, 16), value)
    for other in (volumes(1), torch.full_like(constant, 0.1)):
        assert aligned_correlations(constant, other, 1).item() == 0
        assert correlations(constant.flatten(1), other.flatten(1)).item() == 0
        assert registered_correlations(constant, other).item() == pytest.approx(0, abs=1e-2)


def test_correlations_are_numpys() -> None:
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 9, generator=random), torch.randn(5, 9, generator=random)
    assert np.allclose(correlations(a, b), np.corrcoef(a, b)[:3, 3:], atol=1e-6)
    assert correlations(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_copies_are_no_more_than_equal() -> None:
    assert aligned_correlations(volumes(9), volumes(9), 2).max() <= 1
    assert registered_correlations(volumes(9), volumes(9)).max() <= 1


# -------- shifted, turned and stretched


def smooth(count: int, seed: int = 0) -> torch.Tensor:
    """Volumes `(count, 1, 20, 14, 16)` of structures of some voxels."""
    noise = np.random.default_rng(seed).normal(size=(count, 1, 20, 14, 16))
    return torch.from_numpy(ndimage.gaussian_filter(noise, (0, 0, 2, 2, 2))).float()


def moved(volumes: torch.Tensor, matrix: np.ndarray, shift: Sequence[float] = (0, 0, 0)) -> torch.Tensor:
    """Each volume at `matrix @ (voxel - centre) + centre + shift`."""
    centre = (np.array(volumes.shape[2:]) - 1) / 2
    offset = centre - matrix @ centre + np.array(shift)
    images = [
        ndimage.affine_transform(v[0], matrix, offset, order=3, mode="nearest") for v in volumes.numpy()
    ]
    return torch.from_numpy(np.stack(images))[:, None]


def turn(degrees: float, axis: int) -> np.ndarray:
    a, b = (n for n in range(3) if n != axis)
    matrix, radians = np.eye(3), np.deg2rad(degrees)
    matrix[a, a] = matrix[b, b] = np.cos(radians)
    matrix[a, b], matrix[b, a] = -np.sin(radians), np.sin(radians)
    return matrix


@pytest.mark.parametrize(
    "matrix",
    [
        turn(12, 0),
        turn(-12, 1),
        turn(12, 2),
        np.diag([1.12, 1, 1]),
        np.diag([1, 0.9, 1.1]),
        turn(8, 0) @ turn(8, 2),
    ],
)
def test_moved_copies_are_found(matrix: np.ndarray) -> None:
    scans = smooth(6)
    copies = moved(scans, matrix, (0.5, -1.3, 0.7))
    plain = correlations(copies.flatten(1), scans.flatten(1)).diagonal()
    found = registered_correlations(copies, scans)
    assert (found > plain).all()
    assert found.min() > 0.93
    assert plain.max() < 0.95
    assert registered_correlations(copies, scans.roll(1, 0)).max() < 0.8


def test_no_movement_is_never_worse() -> None:
    first, second = smooth(5), smooth(5, seed=1)
    plain = correlations(first.flatten(1), second.flatten(1)).diagonal()
    assert (registered_correlations(first, second) > plain - 1e-5).all()
    assert registered_correlations(first, first).min() > 1 - 1e-5


def test_pairs_do_not_depend_on_each_other() -> None:
    first, second = smooth(3), smooth(3, seed=1)
    alone = torch.cat([registered_correlations(first[n : n + 1], second[n : n + 1]) for n in range(3)])
    assert torch.allclose(registered_correlations(first, second), alone, atol=1e-4)
