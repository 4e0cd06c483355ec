"""Diffusion processes: how a latent becomes noise, and how a trajectory leads back.

Each makes a latent in one call, whatever the verb: from noise alone, from a clean latent that is partly
noised (SDEdit, Meng et al. 2022), or with everything outside a mask held to a clean latent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from diffaug.generators import diffusion, samplers
from diffaug.generators.diffusion import CLEAN, Schedule, inner_steps, visited_steps
from diffaug.generators.model import Sampling
from diffaug.generators.samplers import add_noise, noise_levels
from diffaug.generators.seeds import CaseNoise

# The process's own sampler that reproduces MONAI's RFlowScheduler.
MONAI_EULER = "monai-euler"


@dataclass(frozen=True)
class DiscreteDiffusion:
    """Diffusion in discrete steps; networks predict the noise in `x_t` `(B, ...)` at step t.

    Attributes:
        schedule: of its noise.
        clip: samplers clip their estimates of the clean latent to [-1, 1].
        inner: samplers keep away from both ends of the schedule (see `inner_steps`).
    """

    schedule: Schedule
    clip: bool
    inner: bool

    def make(
        self,
        predict: Callable[[Tensor, int], Tensor],
        start: Tensor,
        noise: CaseNoise,
        sampling: Sampling,
        *,
        clean: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """A latent.

        Args:
            predict: noise at a step.
            start: standard normal noise `(B, ...)`.
            noise: from which samplers draw more.
            clean: the latent that is varied, or kept outside `mask`.
            strength: noise level in (0, 1] from which `clean` is varied; the steps shrink in proportion.
            mask: 1 where the latent is made anew.
        """
        x = start
        if strength is None:
            steps = self._steps(sampling)
        else:
            assert clean is not None
            steps = self._steps(sampling, max(1, round(strength * self.schedule.steps)) - 1)
            x = self.schedule.add_noise(clean, start, steps[0])
        project = None
        if mask is not None:
            assert clean is not None
            project = diffusion.keep_outside(self.schedule, clean, start, mask)
        sampler = diffusion.SAMPLERS[sampling.sampler]
        x = sampler(predict, x, self.schedule, steps, noise, clip=self.clip, project=project)
        # Once more, for steps that end before the data are clean.
        return x if project is None else project(x, CLEAN)

    def _steps(self, sampling: Sampling, start: int | None = None) -> list[int]:
        """The steps that a sampler visits from `start` (default: the last) down; in proportion fewer."""
        share = 1.0 if start is None else (start + 1) / self.schedule.steps
        spread = inner_steps if self.inner else visited_steps
        return spread(self.schedule, max(1, round(sampling.steps * share)), start)


@dataclass(frozen=True)
class RectifiedFlow:
    """Linear flow from noise to data; networks predict the velocity `e - x_0` of `x_t` at level t in [0, 1].

    Attributes:
        steps: of the networks' time, T; level t is their time t T.
    """

    steps: int

    def make(
        self,
        predict: Callable[[Tensor, float], Tensor],
        start: Tensor,
        noise: CaseNoise,
        sampling: Sampling,
        *,
        clean: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """A latent; arguments are those of `DiscreteDiffusion.make`. No more noise is drawn."""
        level, x = 1.0, start
        if strength is not None:
            assert clean is not None
            level, x = strength, add_noise(clean, start, strength)
        project = None
        if mask is not None:
            assert clean is not None
            project = samplers.keep_outside(clean, start, mask)
        count = max(1, round(sampling.steps * level))
        levels = noise_levels(count, start=level, shift=sampling.shift)
        if sampling.sampler == MONAI_EULER:
            return monai_euler(predict, x, levels, self.steps, project)
        return samplers.SAMPLERS[sampling.sampler](predict, x, levels, project)


def monai_euler(
    predict: Callable[[Tensor, float], Tensor],
    x: Tensor,
    levels: list[float],
    steps: int,
    project: Callable[[Tensor, float], Tensor] | None = None,
) -> Tensor:
    """Euler's rule with the rounding of MONAI's RFlowScheduler (1.5 to 1.6), for its very images.

    Times are kept in float16, and each step ends at the whole number below the next: 30 steps add up to
    1.0098 of the way, not to 1.
    """
    times = [float(np.float16(level * steps)) for level in levels]
    for time, following in pairwise(times):
        x = x - (time - int(following)) / steps * predict(x, time / steps)
        if project is not None:
            x = project(x, following / steps)
    return x


Process = DiscreteDiffusion | RectifiedFlow
