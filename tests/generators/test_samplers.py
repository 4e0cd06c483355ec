"""The samplers against a target whose probability flow is known in closed form."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.generators.samplers import (
    SAMPLERS,
    adams_bashforth,
    add_noise,
    euler,
    heun,
    keep_outside,
    noise_levels,
)

MEAN, DEVIATION = 2.0, 0.4


def variance(level: float) -> float:
    """Of `x_t = (1 - t) x_0 + t e` for x_0 ~ N(MEAN, DEVIATION²)."""
    return (1 - level) ** 2 * DEVIATION**2 + level**2


def velocity(x: Tensor, level: float) -> Tensor:
    """E[e - x_0 | x_t = x]: exact for the Gaussian target."""
    covariance = level - (1 - level) * DEVIATION**2
    return -MEAN + covariance / variance(level) * (x - (1 - level) * MEAN)


def exact(x: Tensor, level: float) -> Tensor:
    """Where the flow from `x` at `level` ends: it keeps the number of standard deviations from the mean."""
    return MEAN + DEVIATION * (x - (1 - level) * MEAN) / variance(level) ** 0.5


def largest_error(sampler: Callable[..., Tensor], steps: int, start: float, shift: float) -> float:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    found = sampler(velocity, x, noise_levels(steps, start, shift))
    return float((found - exact(x, start)).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (adams_bashforth, 2)])
@pytest.mark.parametrize("start", [1.0, 0.6])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_error_falls_with_the_order_of_the_sampler(
    sampler: Callable[..., Tensor], order: int, start: float, shift: float
) -> None:
    errors = torch.tensor([largest_error(sampler, steps, start, shift) for steps in (256, 512, 1024)])
    slopes = torch.log2(errors[:-1] / errors[1:])
    assert slopes.tolist() == pytest.approx([order, order], abs=0.15)
    assert errors[-1] < 5e-3


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_samples_have_the_targets_distribution(sampler: Callable[..., Tensor]) -> None:
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = sampler(velocity, noise, noise_levels(100))
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_weak_variation_stays_near_its_start_and_keeps_the_distribution(
    sampler: Callable[..., Tensor],
) -> None:
    generator = torch.Generator().manual_seed(2)
    clean = MEAN + DEVIATION * torch.randn(20_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(20_000, generator=generator, dtype=torch.float64)
    kept = []
    for strength in (0.1, 0.5, 1.0):
        varied = sampler(velocity, add_noise(clean, noise, strength), noise_levels(150, start=strength))
        assert varied.mean().item() == pytest.approx(MEAN, abs=0.02)
        assert varied.std().item() == pytest.approx(DEVIATION, rel=0.04)
        kept.append(torch.corrcoef(torch.stack([clean, varied]))[0, 1].item())
        # The flow is linear here: what a variation keeps is the share of the signal in the noised sample.
        assert kept[-1] == pytest.approx((1 - strength) * DEVIATION / variance(strength) ** 0.5, abs=0.03)
    assert kept[0] > 0.9


@pytest.mark.parametrize(("sampler", "calls"), [(euler, 5), (heun, 10), (adams_bashforth, 5)])
def test_number_of_evaluations(sampler: Callable[..., Tensor], calls: int) -> None:
    seen: list[float] = []

    def counted(x: Tensor, level: float) -> Tensor:
        seen.append(level)
        return velocity(x, level)

    sampler(counted, torch.zeros(1), noise_levels(5))
    assert len(seen) == calls
    assert seen[0] == 1.0


@pytest.mark.parametrize("masked", [False, True])
def test_two_slopes_are_extrapolated_over_unequal_steps(masked: bool) -> None:
    """A velocity that grows with the level: every step but the first is exact, whatever its length."""
    levels = [1.0, 0.9, 0.5, 0.2, 0.0]
    x = torch.zeros(4)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])
    clean = torch.full((4,), 7.0)
    project = keep_outside(clean, torch.zeros(4), mask) if masked else None
    found = adams_bashforth(lambda x, level: torch.full_like(x, level), x, levels, project)
    # Euler's first step is 1 * 0.1 long; from there on the integral of the level.
    expected = -0.1 - 0.9**2 / 2
    inside = mask > 0
    assert torch.allclose(found[inside], torch.full((2,), expected))
    assert torch.allclose(found[~inside], torch.full((2,), 7.0 if masked else expected))


def test_one_euler_step_reaches_the_mean() -> None:
    """From pure noise the exact velocity is `noise - mean`, and a single step takes it off."""
    noise = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.allclose(euler(velocity, noise, [1.0, 0.0]), torch.full((3,), MEAN))


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("start", [1.0, 0.35, 1e-3])
@pytest.mark.parametrize("shift", [1.0, 0.5, 3.0])
def test_levels_fall_from_exactly_the_start_to_exactly_zero(steps: int, start: float, shift: float) -> None:
    levels = noise_levels(steps, start, shift)
    assert len(levels) == steps + 1
    assert levels[0] == start
    assert levels[-1] == 0.0
    assert all(a > b for a, b in pairwise(levels))


def test_levels_without_shift_are_equal_steps() -> None:
    assert noise_levels(4, start=0.8) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_shift_moves_the_levels_as_published() -> None:
    plain, shifted = noise_levels(10), noise_levels(10, shift=3.0)
    assert shifted == pytest.approx([3 * t / (1 + 2 * t) for t in plain])
    # A start in the middle of the shifted schedule continues with the rest of that schedule.
    assert noise_levels(6, start=shifted[4], shift=3.0) == pytest.approx(shifted[4:])


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"steps": 3, "start": 0.0}, {"steps": 3, "start": 1.1}, {"steps": 3, "shift": 0.0}],
)
def test_impossible_schedules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(DiffaugError, match="steps must be >= 1"):
        noise_levels(**wrong)  # type: ignore[arg-type]


def test_add_noise_takes_a_level_per_case() -> None:
    clean, noise = torch.full((3, 2, 2), 4.0), torch.full((3, 2, 2), -2.0)
    mixed = add_noise(clean, noise, torch.tensor([0.0, 0.5, 1.0]))
    assert mixed[:, 0, 0].tolist() == [4.0, 1.0, -2.0]
    assert torch.equal(mixed[1], add_noise(clean[1], noise[1], 0.5))


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_projection_keeps_the_outside_exactly_and_leaves_the_inside_to_the_flow(
    sampler: Callable[..., Tensor],
) -> None:
    generator = torch.Generator().manual_seed(3)
    clean, noise = torch.randn(2, 1, 2, 4, 4, 4, generator=generator)
    mask = torch.zeros_like(clean)
    mask[..., :2, :, :] = 1
    trajectory: list[tuple[Tensor, float]] = []
    keep = keep_outside(clean, noise, mask)

    def project(x: Tensor, level: float) -> Tensor:
        x = keep(x, level)
        trajectory.append((x, level))
        return x

    levels = noise_levels(8)
    found = sampler(velocity, noise, levels, project)
    outside = mask == 0
    assert torch.equal(found[outside], clean[outside])
    assert [level for _, level in trajectory] == levels[1:]
    for x, level in trajectory:
        assert torch.equal(x[outside], add_noise(clean, noise, level)[outside])
    # Voxels of this target are independent, so the projection must not change the ones inside.
    assert torch.equal(found[~outside], sampler(velocity, noise, levels)[~outside])
