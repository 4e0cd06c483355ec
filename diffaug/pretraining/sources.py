"""Cases to pretrain on: of datasets, streamed from a generator, or a mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from diffaug.generators.generator import Generator
from diffaug.generators.seeds import case_seed
from diffaug.segmentation.cases import Prepared, Space, prepare
from diffaug.segmentation.patches import Source

# Samples that are made at once, and that one draw chooses from.
BATCH = 8
BLOCK = 32


@dataclass
class Streamed:
    """Samples of a generator, made while the network trains: blocks of 32, each sample drawn `reuse` times.

    Attributes:
        generator: with the verb `sample`.
        space: of the network.
        classes: id of the generator -> class of the network.
        seed: of the samples and their order.
        reuse: how often each is drawn.
    """

    generator: Generator
    space: Space
    classes: Mapping[int, int]
    seed: int
    reuse: int
    _block: tuple[int, list[Prepared]] = field(default=(-1, []), repr=False)

    def case(self, draw: int) -> Prepared:
        """The case of a draw, counted from 0."""
        turn, place = divmod(draw, BLOCK * self.reuse)
        if self._block[0] != turn:
            first = turn * BLOCK
            self._block = turn, self.samples(range(first, first + BLOCK))
        random = torch.Generator().manual_seed(case_seed(self.seed, turn))
        return self._block[1][int(torch.randperm(BLOCK * self.reuse, generator=random)[place]) % BLOCK]

    def samples(self, numbers: range) -> list[Prepared]:
        """Samples by their number, which decides their seed."""
        found = []
        for start in range(0, len(numbers), BATCH):
            rows = numbers[start : start + BATCH]
            made = self.generator.sample(len(rows), seed=[case_seed(self.seed, n) for n in rows])
            for n, image, label in zip(rows, made.image, made.label, strict=True):
                name = f"sample {n}"
                found.append(prepare(name, name, image, label, made.affine, self.space, self.classes))
        return found


@dataclass(frozen=True)
class Mixed:
    """Cases of several sources, each drawn with its share.

    Attributes:
        sources: at least one.
        shares: of each, summing to 1.
        seed: of the choices.
    """

    sources: Sequence[Source]
    shares: Sequence[float]
    seed: int

    def case(self, draw: int) -> Prepared:
        """The case of a draw, counted from 0."""
        random = torch.Generator().manual_seed(case_seed(self.seed, draw))
        chosen = torch.multinomial(torch.tensor(list(self.shares)), 1, generator=random)
        return self.sources[int(chosen)].case(draw)


def hold_out(cases: Sequence[Prepared], share: float, seed: int) -> tuple[list[Prepared], list[Prepared]]:
    """Cases that train, and those of the held-out patients: at least one, as long as another one trains."""
    patients = sorted({case.patient for case in cases})
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(share * len(patients))) if len(patients) > 1 else 0
    held = {patients[n] for n in order[:count]}
    return [c for c in cases if c.patient not in held], [c for c in cases if c.patient in held]
