"""Seeds: every case of a batch has its own, and its noise depends on nothing else."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffaug.errors import DiffaugError


def case_seed(root: int, index: int) -> int:
    """Seed of case `index` of a run with seed `root` (both >= 0), whatever the batch, sharding or order."""
    return int(np.random.SeedSequence([root, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def case_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed per case: derived from an integer, or a sequence of `count` seeds as it is."""
    given = [seed] if isinstance(seed, (int, float, np.number)) else list(seed)
    if wrong := [s for s in given if not isinstance(s, (int, np.integer)) or not 0 <= s < 2**63]:
        raise DiffaugError(f"a seed is an integer from 0 to 2**63 - 1, got {wrong[0]!r}")
    if isinstance(seed, (int, np.integer)):
        return [case_seed(int(seed), index) for index in range(count)]
    if len(given) != count:
        raise DiffaugError(
            f"{len(given)} seeds were given for {count} cases; give one integer or one seed per case"
        )
    return [int(s) for s in given]


class CaseNoise:
    """Standard normal noise, a stream of its own for each case.

    Drawn on the CPU, so that a seed means the same noise on every device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise `(cases, *shape)`; row b depends on seed b, and on the shapes drawn, alone."""
        rows = [torch.randn(tuple(shape), generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device)
