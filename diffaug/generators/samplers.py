"""Samplers of the probability-flow equation of linear flow matching (Lipman et al. 2023, Liu et al. 2023).

A sample at noise level t in [0, 1] is `x_t = (1 - t) x_0 + t e`, with e standard normal; the network predicts
the velocity `dx/dt = e - x_0`. Sampling integrates from the starting level down to 0, exactly over the last
step too.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffaug.errors import DiffaugError

Velocity = Callable[[Tensor, float], Tensor]
Projection = Callable[[Tensor, float], Tensor]


def add_noise(clean: Tensor, noise: Tensor, level: Tensor | float) -> Tensor:
    """`(1 - level) * clean + level * noise`; a tensor `level` has shape (B,)."""
    if isinstance(level, Tensor):
        level = level.view(-1, *[1] * (clean.ndim - 1))
    return (1 - level) * clean + level * noise


def noise_levels(steps: int, start: float = 1.0, shift: float = 1.0) -> list[float]:
    """`steps + 1` decreasing levels from `start` to 0.

    `shift` > 1 spends more steps at high noise (t -> shift t / (1 + (shift - 1) t), Esser et al. 2024).
    """
    if steps < 1 or not 0 < start <= 1 or shift <= 0:
        raise DiffaugError(
            "steps must be >= 1, start in (0, 1] and shift > 0, "
            f"got steps={steps}, start={start}, shift={shift}"
        )
    # Equal steps in the unshifted time, whose start is the inverse of the shift at `start`.
    origin = start / (shift - (shift - 1) * start)
    times = [origin * (steps - n) / steps for n in range(steps + 1)]
    levels = [shift * t / (1 + (shift - 1) * t) for t in times]
    return [start, *levels[1:-1], 0.0]


def euler(velocity: Velocity, x: Tensor, levels: list[float], project: Projection | None = None) -> Tensor:
    """First-order integration: one evaluation of `velocity` a step, then `project(x, level)`."""
    for level, following in pairwise(levels):
        x = x + (following - level) * velocity(x, level)
        if project is not None:
            x = project(x, following)
    return x


def heun(velocity: Velocity, x: Tensor, levels: list[float], project: Projection | None = None) -> Tensor:
    """Second-order integration (trapezoidal rule): two evaluations of `velocity` a step, then `project`."""
    for level, following in pairwise(levels):
        slope = velocity(x, level)
        ahead = velocity(x + (following - level) * slope, following)
        x = x + (following - level) * 0.5 * (slope + ahead)
        if project is not None:
            x = project(x, following)
    return x


def adams_bashforth(
    velocity: Velocity, x: Tensor, levels: list[float], project: Projection | None = None
) -> Tensor:
    """Second-order multistep integration: one evaluation a step, then `project`.

    Each step follows the line through the last two slopes (two-step Adams-Bashforth rule for unequal steps);
    the first step is Euler's.
    """
    before: tuple[float, Tensor] | None = None
    for level, following in pairwise(levels):
        slope = velocity(x, level)
        ahead = slope
        if before is not None:
            earlier, earlier_slope = before
            ahead = slope + (following - level) / (2 * (level - earlier)) * (slope - earlier_slope)
        x = x + (following - level) * ahead
        before = level, slope
        if project is not None:
            x = project(x, following)
    return x


def keep_outside(clean: Tensor, noise: Tensor, mask: Tensor) -> Projection:
    """Projection for inpainting: outside `mask` (1 inside) the sample follows the noised `clean` exactly."""

    def project(x: Tensor, level: float) -> Tensor:
        return torch.where(mask > 0, x, add_noise(clean, noise, level))

    return project


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "adams-bashforth": adams_bashforth,
}
