"""The rates of a training loop, in closed form."""

import math

import pytest

from diffaug.training.loop import learning_rate_factor


@pytest.mark.parametrize(("step", "factor"), [(0, 0.01), (49, 0.5), (99, 1.0), (600, 1.0), (800, 0.5)])
def test_rate_rises_over_a_tenth_stays_and_falls_as_a_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(step, 1000, 0.4) == pytest.approx(factor)


def test_rate_without_decay_stays() -> None:
    assert learning_rate_factor(999, 1000, 0.0) == 1.0


@pytest.mark.parametrize("steps", [1, 10, 150])
def test_a_short_run_from_fitted_weights_never_reaches_the_full_rate(steps: int) -> None:
    factors = [learning_rate_factor(step, steps, 0.5, fitted=True) for step in range(steps)]
    assert factors[0] == pytest.approx(1 / 200)
    assert max(factors) <= steps / 200


def test_a_long_run_from_fitted_weights_is_like_any_other() -> None:
    for step in range(2000):
        expected = learning_rate_factor(step, 2000, 0.5)
        assert math.isclose(learning_rate_factor(step, 2000, 0.5, fitted=True), expected)
