"""Distances of feature sets against closed forms and brute force."""

import numpy as np
import pytest

from diffaug.errors import DiffaugError
from diffaug.evaluation.distributions import (
    frechet_distance,
    manifold_overlap,
    median_distance,
    mmd,
    principal_components,
)


def test_frechet_distance_of_gaussians_with_known_moments() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    y = x * [2.0, 1.0, 0.5] + [1.0, 0.0, -2.0]
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (0.5 - 1) ** 2)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y))


def test_mmd_is_unbiased_and_as_large_as_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    same = [mmd(rng.normal(size=(60, 1)), rng.normal(size=(60, 1)), 1.0) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert min(same) < 0
    apart = mmd(rng.normal(size=(3000, 1)), rng.normal(2.0, size=(3000, 1)), 1.0)
    # E k(x, y) = sqrt(s / (s + 2)) exp(-m^2 / (2 (s + 2))) with s = bandwidth^2 = 1.
    assert apart == pytest.approx(2 * np.sqrt(1 / 3) * (1 - np.exp(-4 / 6)), abs=0.03)


def test_components_are_ordered_orthonormal_and_as_many_as_the_cases_allow() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(50, 6)) * [9, 5, 1, 1, 0.1, 0.1] + 3
    found = principal_components(features, 2)
    assert np.allclose(found.axes @ found.axes.T, np.eye(2))
    spread = found.project(features).std(0)
    assert spread[0] > spread[1] > 3
    assert np.allclose(found.project(features).mean(0), 0)
    assert 0.9 < found.explained < 1
    assert len(principal_components(features[:4]).axes) == 3
    assert principal_components(features, 16).explained == pytest.approx(1)


def test_overlap_against_brute_force() -> None:
    rng = np.random.default_rng(3)
    real, synthetic, k = rng.normal(size=(30, 2)), rng.normal(0.7, size=(40, 2)), 3

    def reach(points: np.ndarray) -> list[float]:
        return [sorted(np.linalg.norm(points - p, axis=1))[k] for p in points]

    inside = [
        [np.linalg.norm(s - r) <= radius for r, radius in zip(real, reach(real), strict=True)]
        for s in synthetic
    ]
    back = [
        [np.linalg.norm(s - r) <= radius for s, radius in zip(synthetic, reach(synthetic), strict=True)]
        for r in real
    ]
    nearest = [min(np.linalg.norm(synthetic - r, axis=1)) for r in real]
    found = manifold_overlap(real, synthetic, k)
    assert found.precision == pytest.approx(np.mean([any(row) for row in inside]))
    assert found.recall == pytest.approx(np.mean([any(row) for row in back]))
    assert found.density == pytest.approx(np.mean([sum(row) / k for row in inside]))
    assert found.coverage == pytest.approx(np.mean(np.array(nearest) <= reach(real)))


def test_one_distribution_overlaps_and_a_collapsed_one_does_not_cover() -> None:
    rng = np.random.default_rng(4)
    real = rng.normal(size=(200, 4))
    same = manifold_overlap(real, rng.normal(size=(200, 4)))
    assert same.coverage > 0.9
    assert same.precision > 0.8
    collapsed = manifold_overlap(real, 0.01 * rng.normal(size=(200, 4)))
    assert collapsed.precision > 0.9
    assert collapsed.coverage < 0.6
    assert collapsed.recall < 0.1


def test_too_few_cases_are_refused() -> None:
    with pytest.raises(DiffaugError, match="5 synthetic cases have no 5 neighbours"):
        manifold_overlap(np.zeros((9, 2)), np.zeros((5, 2)))
    with pytest.raises(DiffaugError, match="at least 2 cases"):
        frechet_distance(np.zeros((1, 2)), np.zeros((5, 2)))
    assert median_distance([[0.0], [1.0], [3.0]]) == 2.0
