"""Correlations at the best of all shifts."""

from itertools import product

import numpy as np
import pytest
import torch

from diffaug.evaluation.alignment import aligned_correlations


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


def test_constant_volumes_are_like_nothing() -> None:
    found = aligned_correlations(torch.ones(1, 1, 8, 8, 8), volumes(1)[:, :, :8, :, :8], 1)
    assert found.item() == pytest.approx(0, abs=1e-5)
    assert aligned_correlations(volumes(9), volumes(9), 2).max() <= 1
