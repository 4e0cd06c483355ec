"""Random patches of cases; those of a step depend on the seed and the step alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaug.generators.seeds import case_seed
from diffaug.segmentation.cases import Prepared

# Share of patches around a voxel of a structure, as in nnU-Net.
FOREGROUND = 1 / 3

# Index that no step reaches, of the seed of the orders of cases.
ORDERS = 2**40

# Gives a case in the place of another, such as a variation of it.
Swap = Callable[[Prepared, torch.Generator], Prepared]


@dataclass
class Patches:
    """Where patches come from.

    Attributes:
        cases: every one is drawn once before any is drawn again.
        patch: sides `(I, J, K)`, no longer than those of any case.
        batch: patches a step.
        seed: of everything.
        swap: what comes in the place of a case.
    """

    cases: Sequence[Prepared]
    patch: Sequence[int]
    batch: int
    seed: int
    swap: Swap | None = None
    _orders: dict[int, list[int]] = field(default_factory=dict)

    def random(self, step: int) -> torch.Generator:
        """Random numbers of a step."""
        return torch.Generator().manual_seed(case_seed(self.seed, step))

    def draw(self, step: int, random: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Images `(B, C, *patch)` of a step, counted from 0, and label maps `(B, 1, *patch)`, or None where a
        case has none."""
        drawn = [self.cases[self._case(step * self.batch + n)] for n in range(self.batch)]
        drawn = [case if self.swap is None else self.swap(case, random) for case in drawn]
        windows = [_window(case, self.patch, random) for case in drawn]
        images = torch.stack([case.image[window] for case, window in zip(drawn, windows, strict=True)])
        labels = [
            case.label[window] for case, window in zip(drawn, windows, strict=True) if case.label is not None
        ]
        return images, torch.stack(labels) if len(labels) == len(drawn) else None

    def _case(self, index: int) -> int:
        round_, place = divmod(index, len(self.cases))
        if round_ not in self._orders:
            random = torch.Generator().manual_seed(case_seed(case_seed(self.seed, ORDERS), round_))
            self._orders = {round_: torch.randperm(len(self.cases), generator=random).tolist()}
        return self._orders[round_][place]


def _window(
    case: Prepared, patch: Sequence[int], random: torch.Generator
) -> tuple[slice, slice, slice, slice]:
    """Where a patch lies: anywhere, or around a voxel of a structure."""
    sides = case.image.shape[1:]
    draws = torch.rand(5, generator=random).tolist()
    starts = [int(draw * (n - m + 1)) for draw, n, m in zip(draws[:3], sides, patch, strict=True)]
    larger = any(n > m for n, m in zip(sides, patch, strict=True))
    if larger and case.label is not None and draws[3] < FOREGROUND:
        voxels = case.label[0].nonzero()
        if len(voxels):
            centre = voxels[int(draws[4] * len(voxels))].tolist()
            starts = [min(max(c - m // 2, 0), n - m) for c, n, m in zip(centre, sides, patch, strict=True)]
    i, j, k = (slice(start, start + m) for start, m in zip(starts, patch, strict=True))
    return slice(None), i, j, k
