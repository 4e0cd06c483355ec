"""Random patches of cases; those of a step depend on the seed and the step alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diffaug.generators.seeds import case_seed
from diffaug.segmentation.cases import Prepared

# Share of patches around a voxel of a structure, as in nnU-Net.
FOREGROUND = 1 / 3

# Of seeds, beyond any step.
SWAPS = 2**40

# Gives a case in the place of another, such as a variation of it.
Swap = Callable[[Prepared, torch.Generator], Prepared]


class Source(Protocol):
    """Where cases come from."""

    def case(self, draw: int) -> Prepared:
        """The case of a draw, counted from 0."""


@dataclass
class Listed:
    """Cases of a list in random order, each drawn once before any is drawn again.

    Attributes:
        cases: at least one.
        seed: of the order.
    """

    cases: Sequence[Prepared]
    seed: int
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)

    def case(self, draw: int) -> Prepared:
        """The case of a draw, counted from 0."""
        turn, place = divmod(draw, len(self.cases))
        if self._order[0] != turn:
            random = torch.Generator().manual_seed(case_seed(self.seed, turn))
            self._order = turn, torch.randperm(len(self.cases), generator=random).tolist()
        return self.cases[self._order[1][place]]


@dataclass(frozen=True)
class Patches:
    """Random patches of a source's cases.

    Attributes:
        source: of cases.
        patch: sides `(I, J, K)`, no longer than those of any case.
        batch: patches a step.
        seed: of where patches lie.
        swap: what comes in the place of a case.
        labelled: whether label maps are looked at; if not, patches lie anywhere.
    """

    source: Source
    patch: Sequence[int]
    batch: int
    seed: int
    swap: Swap | None = None
    labelled: bool = True

    def random(self, step: int) -> torch.Generator:
        """Random numbers of a step."""
        return torch.Generator().manual_seed(case_seed(self.seed, step))

    def draw(self, step: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images `(B, C, *patch)` of a step, counted from 0, and label maps `(B, 1, *patch)`, all background
        where they are not looked at."""
        drawn = [self.source.case(step * self.batch + n) for n in range(self.batch)]
        if self.swap is not None:
            # Random numbers of its own: all else is as it would be without it.
            own = torch.Generator().manual_seed(case_seed(case_seed(self.seed, SWAPS), step))
            drawn = [self.swap(case, own) for case in drawn]
        images, labels = [], []
        for case in drawn:
            window = _window(case, self.patch, self.labelled, random)
            images.append(case.image[window])
            shown = case.label if self.labelled else None
            labels.append(torch.zeros_like(images[-1][:1]).short() if shown is None else shown[window])
        return torch.stack(images), torch.stack(labels)


def _window(
    case: Prepared, patch: Sequence[int], labelled: bool, random: torch.Generator
) -> tuple[slice, slice, slice, slice]:
    """Where a patch lies: anywhere, or around a voxel of a structure."""
    sides = case.image.shape[1:]
    draws = torch.rand(5, generator=random).tolist()
    starts = [int(draw * (n - m + 1)) for draw, n, m in zip(draws[:3], sides, patch, strict=True)]
    larger = any(n > m for n, m in zip(sides, patch, strict=True))
    if larger and labelled and case.label is not None and draws[3] < FOREGROUND:
        voxels = case.label[0].nonzero()
        if len(voxels):
            centre = voxels[int(draws[4] * len(voxels))].tolist()
            starts = [min(max(c - m // 2, 0), n - m) for c, n, m in zip(centre, sides, patch, strict=True)]
    i, j, k = (slice(start, start + m) for start, m in zip(starts, patch, strict=True))
    return slice(None), i, j, k
