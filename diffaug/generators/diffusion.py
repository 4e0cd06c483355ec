"""Discrete-time diffusion: noise schedules, the forward process and its samplers.

Ho et al. 2020 (DDPM), Nichol and Dhariwal 2021 (the cosine schedule), Rombach et al. 2022 (the scaled linear
one), Song et al. 2021 (DDIM), Lu et al. 2022 (DPM-Solver++).

`x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e` for steps t = 0 .. T - 1, where a_t is the cumulative product of
1 - b_t; the network predicts the noise e. All arithmetic on the schedule is in float64.
"""

from collections.abc import Callable
from itertools import pairwise
from math import exp, expm1, log, sqrt

import torch
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.generators.seeds import CaseNoise

# The noise in `x_t` `(B, ...)` at a step, of the same shape.
Denoiser = Callable[[Tensor, int], Tensor]
# What a sampler goes on with instead of its `x_t` `(B, ...)` at the step it has come to, `CLEAN` included.
Projection = Callable[[Tensor, int], Tensor]

# The step "before" step 0: clean data.
CLEAN = -1
# Share of clean data at which samplers that do not clip may begin.
UNCLIPPED_SHARE = 1e-4


class Schedule:
    """How much noise there is at each step: `betas` `(T,)`, float64."""

    def __init__(self, betas: Tensor) -> None:
        self.steps = len(betas)
        self.betas = betas
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)

    def clean_share(self, step: int) -> float:
        """The cumulative product at `step`; 1 at `CLEAN`."""
        return 1.0 if step == CLEAN else float(self.alphas_cumprod[step])

    def add_noise(self, clean: Tensor, noise: Tensor, step: Tensor | int) -> Tensor:
        """`x_t` of clean data; a tensor `step` has shape (B,) and no `CLEAN` in it."""
        if isinstance(step, Tensor):
            shares = self.alphas_cumprod[step.cpu()].view(-1, *[1] * (clean.ndim - 1))
            return shares.sqrt().to(clean) * clean + (1 - shares).sqrt().to(clean) * noise
        share = self.clean_share(step)
        return sqrt(share) * clean + sqrt(1 - share) * noise

    def buffers(self) -> dict[str, Tensor]:
        """The twelve float32 tables that the authors' checkpoints carry."""
        a, b = self.alphas_cumprod, self.betas
        before = torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]])
        variance = b * (1 - before) / (1 - a)
        tables = {
            "betas": b,
            "alphas_cumprod": a,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": a.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - a).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - a).log(),
            "sqrt_recip_alphas_cumprod": (1 / a).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / a - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": b * before.sqrt() / (1 - a),
            "posterior_mean_coef2": (1 - before) * (1 - b).sqrt() / (1 - a),
        }
        return {name: table.float() for name, table in tables.items()}


class CosineSchedule(Schedule):
    """The cosine schedule with `steps` steps, s = 0.008 and betas of at most 0.9999."""

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise DiffaugError(f"a schedule has at least 1 step, got {steps}")
        x = torch.arange(steps + 1, dtype=torch.float64) / steps
        shape = torch.cos((x + 0.008) / 1.008 * torch.pi / 2).square()
        shape = shape / shape[0]
        super().__init__((1 - shape[1:] / shape[:-1]).clamp(0, 0.9999))


class ScaledLinearSchedule(Schedule):
    """Betas whose square roots rise linearly from that of `first` to that of `last`."""

    def __init__(self, steps: int, first: float, last: float) -> None:
        if steps < 1:
            raise DiffaugError(f"a schedule has at least 1 step, got {steps}")
        super().__init__(torch.linspace(sqrt(first), sqrt(last), steps, dtype=torch.float64).square())


def visited_steps(schedule: Schedule, count: int, start: int | None = None) -> list[int]:
    """`count` evenly spread steps from `start` (default: the last) down, then `CLEAN`.

    Raises:
        DiffaugError: for fewer than 1, or more than the schedule has.
    """
    _check_count(schedule, count)
    first = schedule.steps - 1 if start is None else start
    count = min(count, first + 1)
    return [(first + 1) * (count - n) // count - 1 for n in range(count)] + [CLEAN]


def inner_steps(schedule: Schedule, count: int, start: int | None = None) -> list[int]:
    """Like `visited_steps`, away from both ends: `count` evenly spread steps from `start` down to step 1,
    then step 0; from no later a step than one at which an error of the noise prediction counts 100 times in
    the estimate of `x_0`. 50 of 200 are DiffTumor's 197, 193, ... 5, 1, 0.

    For samplers that do not clip, which cannot begin at the last step: there the error counts 13000 times (of
    200 steps; 64 times two steps earlier).

    Raises:
        DiffaugError: for fewer than 1, or more than the schedule has.
    """
    _check_count(schedule, count)
    inner = int((schedule.alphas_cumprod >= UNCLIPPED_SHARE).nonzero().max())
    first = inner if start is None else min(start, inner)
    if first < 1:
        return [0, CLEAN]
    count = min(count, first)
    return [first - round(n * (first - 1) / max(1, count - 1)) for n in range(count)] + [0]


def _check_count(schedule: Schedule, count: int) -> None:
    if not 1 <= count <= schedule.steps:
        raise DiffaugError(f"steps must lie between 1 and {schedule.steps}, the schedule's, got {count}")


def clean_estimate(schedule: Schedule, x: Tensor, noise: Tensor, step: int, clip: bool) -> Tensor:
    """The `x_0` that a noise prediction implies; clipped to [-1, 1] where the sampler does so.

    At the last of 300 steps the noise prediction's error is amplified 19000 times: there the clipping is part
    of the sampler, not an option.
    """
    share = schedule.clean_share(step)
    estimate = sqrt(1 / share) * x - sqrt(1 / share - 1) * noise
    return estimate.clamp(-1, 1) if clip else estimate


def ancestral(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: list[int],
    noise: CaseNoise,
    *,
    clip: bool = True,
    project: Projection | None = None,
) -> Tensor:
    """The stochastic sampler of DDPM, over all steps or over some of them (Nichol and Dhariwal 2021).

    Each step draws from the posterior q(x_s | x_t, x_0), s the next step visited, with the estimate of x_0.

    Args:
        x: `(B, ...)`, noised to the first of `steps`.
        steps: the steps visited, descending, then where to end: `CLEAN`, or step 0.
        noise: from which the cases draw.
        clip: the estimate of x_0 is clipped to [-1, 1].
        project: applied after each step.

    Returns:
        `(B, ...)` at the last of `steps`.
    """
    for step, following in pairwise(steps):
        estimate = clean_estimate(schedule, x, denoise(x, step), step, clip)
        share, next_share = schedule.clean_share(step), schedule.clean_share(following)
        kept = float(1 - schedule.betas[step]) if following == step - 1 else share / next_share
        x = (1 - kept) * sqrt(next_share) / (1 - share) * estimate + (1 - next_share) * sqrt(kept) / (
            1 - share
        ) * x
        if following != CLEAN:
            variance = (1 - kept) * (1 - next_share) / (1 - share)
            x = x + exp(0.5 * log(max(variance, 1e-20))) * noise.draw(x.shape[1:])
        if project is not None:
            x = project(x, following)
    return x


def ddim(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: list[int],
    noise: CaseNoise,
    *,
    clip: bool = True,
    project: Projection | None = None,
) -> Tensor:
    """DDIM (eta 0): deterministic, each step follows the noise that the estimate of `x_0` implies.

    Arguments are those of `ancestral`; no noise is drawn.
    """
    for step, following in pairwise(steps):
        estimate = clean_estimate(schedule, x, denoise(x, step), step, clip)
        share, next_share = schedule.clean_share(step), schedule.clean_share(following)
        implied = (x - sqrt(share) * estimate) / sqrt(1 - share)
        x = sqrt(next_share) * estimate + sqrt(1 - next_share) * implied
        if project is not None:
            x = project(x, following)
    return x


def dpm_solver(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    steps: list[int],
    noise: CaseNoise,
    *,
    clip: bool = True,
    project: Projection | None = None,
) -> Tensor:
    """DPM-Solver++ 2M: second-order multistep in the estimate of `x_0`, over the log signal-to-noise ratio.

    The first and the last step are of first order (the last one ends at infinite signal-to-noise ratio).
    Arguments are those of `ancestral`; no noise is drawn.
    """
    before: tuple[float, Tensor] | None = None
    for step, following in pairwise(steps):
        estimate = clean_estimate(schedule, x, denoise(x, step), step, clip)
        if following == CLEAN:
            x = estimate
        else:
            share, next_share = schedule.clean_share(step), schedule.clean_share(following)
            here, ahead = _log_ratio(share), _log_ratio(next_share)
            direction = estimate
            if before is not None:
                earlier, earlier_estimate = before
                direction = estimate + (ahead - here) / (2 * (here - earlier)) * (estimate - earlier_estimate)
            x = sqrt((1 - next_share) / (1 - share)) * x - sqrt(next_share) * expm1(here - ahead) * direction
            before = here, estimate
        if project is not None:
            x = project(x, following)
    return x


def keep_outside(schedule: Schedule, clean: Tensor, noise: Tensor, mask: Tensor) -> Projection:
    """Projection for inpainting: outside `mask` (1 inside) the sample follows the noised `clean` exactly."""

    def project(x: Tensor, step: int) -> Tensor:
        return torch.where(mask > 0, x, schedule.add_noise(clean, noise, step))

    return project


def _log_ratio(share: float) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return 0.5 * log(share / (1 - share))


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm-solver++": dpm_solver,
}
