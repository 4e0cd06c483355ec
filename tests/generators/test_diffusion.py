"""Schedule and samplers against published values, textbook formulas, and a target known in closed form."""

from itertools import pairwise
from math import sqrt

import pytest
import torch
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.generators.diffusion import (
    CLEAN,
    SAMPLERS,
    CosineSchedule,
    ancestral,
    clean_estimate,
    ddim,
    inner_steps,
    keep_outside,
    visited_steps,
)
from diffaug.generators.seeds import CaseNoise

MEAN, DEVIATION = 0.3, 0.2
SCHEDULE = CosineSchedule(300)


def exact_noise(x: Tensor, step: int) -> Tensor:
    """E[e | x_t] for x_0 ~ N(MEAN, DEVIATION²)."""
    share = SCHEDULE.clean_share(step)
    variance = share * DEVIATION**2 + 1 - share
    return sqrt(1 - share) / variance * (x - sqrt(share) * MEAN)


def flow_end(x: Tensor, step: int) -> Tensor:
    """Where the probability flow from `x` at `step` ends: it keeps the standard deviations from the mean."""
    share = SCHEDULE.clean_share(step)
    return MEAN + DEVIATION * (x - sqrt(share) * MEAN) / sqrt(share * DEVIATION**2 + 1 - share)


@pytest.mark.parametrize(
    ("steps", "values"),
    [
        (300, (1.564963e-4, 7.499933e-1, 0.9999, 0.9998435, 2.698608e-5, 2.698608e-9, 8.976458e-5)),
        (200, (2.549726e-4, 7.499848e-1, 0.9999, 0.9997450, 6.071799e-5, 6.071799e-9, 1.520288e-4)),
        (4, (1.529878e-1, 7.078587e-1, 0.9999, 0.8470122, 1.442721e-1, 1.442721e-5, 1.260273e-1)),
    ],
)
def test_schedule_has_the_published_values(steps: int, values: tuple[float, ...]) -> None:
    tables = CosineSchedule(steps).buffers()
    assert len(tables) == 12
    assert all(table.dtype == torch.float32 and table.shape == (steps,) for table in tables.values())
    betas, shares = tables["betas"], tables["alphas_cumprod"]
    found = (
        betas[0],
        betas[-2],
        betas[-1],
        shares[0],
        shares[-2],
        shares[-1],
        tables["posterior_variance"][1],
    )
    assert [float(v) for v in found] == pytest.approx(values, rel=1e-6)


def test_ancestral_sampling_is_ddpm_step_by_step() -> None:
    """All steps, written with the twelve float32 tables of the authors' checkpoints."""
    schedule = CosineSchedule(60)
    t = schedule.buffers()
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.3

    def denoise(x: Tensor, step: int) -> Tensor:
        return torch.tanh(torch.einsum("ij,bj...->bi...", weights, x)) + 0.001 * step

    seeds, shape = [5, 9], (4, 2, 3, 3)
    start = CaseNoise(seeds).draw(shape)
    stream = CaseNoise(seeds)
    x = stream.draw(shape)
    for step in reversed(range(60)):
        noise = denoise(x, step)
        estimate = t["sqrt_recip_alphas_cumprod"][step] * x - t["sqrt_recipm1_alphas_cumprod"][step] * noise
        estimate = estimate.clamp(-1, 1)
        x = t["posterior_mean_coef1"][step] * estimate + t["posterior_mean_coef2"][step] * x
        if step:
            x = x + torch.exp(0.5 * t["posterior_log_variance_clipped"][step]) * stream.draw(shape)
    noise = CaseNoise(seeds)
    assert torch.equal(noise.draw(shape), start)
    found = ancestral(denoise, start, schedule, visited_steps(schedule, 60), noise)
    assert (found - x).norm() / x.norm() < 1e-5


def test_ancestral_sampling_nearly_has_the_targets_moments() -> None:
    """Its variance is that for data without spread, so what has some comes out a little narrow."""
    noise = CaseNoise([0])
    x = noise.draw((20000, 1))
    for count, tolerance in ((300, 0.05), (60, 0.12)):
        made = ancestral(exact_noise, x, SCHEDULE, visited_steps(SCHEDULE, count), noise, clip=False)
        assert made.mean().item() == pytest.approx(MEAN, abs=0.006)
        assert made.std().item() == pytest.approx(DEVIATION, rel=tolerance)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm-solver++", 2)])
def test_deterministic_samplers_converge_to_the_flow(name: str, order: int) -> None:
    x = torch.linspace(-2, 2, 9).view(1, 9)
    start = 240

    def error(count: int) -> float:
        steps = visited_steps(SCHEDULE, count, start)
        made = SAMPLERS[name](exact_noise, x, SCHEDULE, steps, CaseNoise([0]), clip=False)
        return float((made - flow_end(x, start)).abs().max())

    assert error(120) < 0.012
    assert error(60) < 1.1 * error(15) / 4**order


def test_one_step_gives_the_clean_estimate() -> None:
    x = torch.randn(2, 5)
    expected = clean_estimate(SCHEDULE, x, exact_noise(x, 299), 299, clip=True)
    for sampler in SAMPLERS.values():
        made = sampler(exact_noise, x, SCHEDULE, visited_steps(SCHEDULE, 1), CaseNoise([0, 1]))
        assert torch.allclose(made, expected, atol=1e-6)


def test_estimates_are_clipped_only_where_asked() -> None:
    x = torch.full((1, 1), 3.0)
    assert clean_estimate(SCHEDULE, x, torch.zeros(1, 1), 200, clip=True).item() == 1.0
    assert clean_estimate(SCHEDULE, x, torch.zeros(1, 1), 200, clip=False).item() > 3.0


def test_visited_steps_begin_at_the_start_and_end_clean() -> None:
    assert visited_steps(SCHEDULE, 300) == [*range(299, -1, -1), CLEAN]
    assert visited_steps(SCHEDULE, 3) == [299, 199, 99, CLEAN]
    assert visited_steps(SCHEDULE, 10, start=4) == [4, 3, 2, 1, 0, CLEAN]
    for count in (0, 301):
        with pytest.raises(DiffaugError, match=f"between 1 and 300, the schedule's, got {count}"):
            visited_steps(SCHEDULE, count)


def test_inner_steps_are_every_fourth_of_200() -> None:
    assert inner_steps(CosineSchedule(200), 50) == [*range(197, 0, -4), 0]


@pytest.mark.parametrize(("total", "first"), [(4, 2), (12, 10), (200, 197), (300, 297), (1000, 992)])
def test_inner_steps_begin_near_the_noise_whatever_their_number(total: int, first: int) -> None:
    """Where the noise prediction's error counts at most 100 times, and no earlier."""
    schedule = CosineSchedule(total)
    assert schedule.alphas_cumprod[first] >= 1e-4 > schedule.alphas_cumprod[first + 1]
    for count in {*range(1, min(total, 60)), total // 2, total}:
        steps = inner_steps(schedule, count)
        assert steps[0] == first
        assert steps[-1] == 0
        assert len(steps) == min(count, first) + 1
        assert all(step > following for step, following in pairwise(steps))
    assert inner_steps(schedule, total, start=0) == [0, CLEAN]
    with pytest.raises(DiffaugError, match=f"between 1 and {total}"):
        inner_steps(schedule, total + 1)


def test_unclipped_ddim_from_the_inner_steps_stays_near_the_flow() -> None:
    x = torch.linspace(-1, 1, 5).view(1, 5)
    made = ddim(exact_noise, x, SCHEDULE, inner_steps(SCHEDULE, 100), CaseNoise([0]), clip=False)
    assert (made - flow_end(x, 298)).abs().max() < 0.03


@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_the_mask_every_sampler_ends_at_the_clean_latent(name: str) -> None:
    clean, noise = torch.randn(1, 2, 3, 3, 3), torch.randn(1, 2, 3, 3, 3)
    mask = torch.zeros(1, 1, 3, 3, 3)
    mask[..., 1] = 1
    project = keep_outside(SCHEDULE, clean, noise, mask)
    made = SAMPLERS[name](
        exact_noise, noise, SCHEDULE, visited_steps(SCHEDULE, 10), CaseNoise([0]), project=project
    )
    outside = (mask == 0).expand_as(made)
    assert torch.equal(made[outside], clean[outside])
    assert not torch.equal(made[~outside], clean[~outside])


def test_noise_is_added_case_by_case() -> None:
    clean, noise = torch.randn(3, 2, 2, 2, 2), torch.randn(3, 2, 2, 2, 2)
    mixed = SCHEDULE.add_noise(clean, noise, torch.tensor([0, 100, 299]))
    for n, step in enumerate((0, 100, 299)):
        assert torch.allclose(mixed[n], SCHEDULE.add_noise(clean[n], noise[n], step), atol=1e-6)
    assert torch.equal(SCHEDULE.add_noise(clean, noise, CLEAN), clean)
