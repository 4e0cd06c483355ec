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
# Draws of a mixture in which each source has its share exactly.
TURN = 1000


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


@dataclass
class Mixed:
    """Cases of several sources, each drawn with its share, to a thousandth.

    Attributes:
        sources: at least one.
        shares: of each, summing to 1.
        seed: of their order.
    """

    sources: Sequence[Source]
    shares: Sequence[float]
    seed: int
    _turn: tuple[int, list[tuple[int, int]]] = field(default=(-1, []), repr=False)

    def case(self, draw: int) -> Prepared:
        """The case of a draw, counted from 0."""
        turn, place = divmod(draw, TURN)
        if self._turn[0] != turn:
            self._turn = turn, self._draws(turn)
        source, own = self._turn[1][place]
        return self.sources[source].case(own)

    def _draws(self, turn: int) -> list[tuple[int, int]]:
        """Source of each draw of a turn, and which of that source's own draws it is."""
        ends = [round(TURN * sum(self.shares[: n + 1])) for n in range(len(self.shares))]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        random = torch.Generator().manual_seed(case_seed(self.seed, turn))
        order = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        next_draw = [turn * count for count in counts]
        found = []
        for source in order[torch.randperm(TURN, generator=random)].tolist():
            found.append((source, next_draw[source]))
            next_draw[source] += 1
        return found


def held_out_patients(cases: Sequence[Prepared], share: float, seed: int) -> set[str]:
    """Patients of all sources who are held out: at least one, as long as others stay; and of labelled and of
    unlabelled ones alike."""
    held: set[str] = set()
    labelled = {case.patient for case in cases if case.label is not None}
    for patients in (sorted(labelled), sorted({case.patient for case in cases} - labelled)):
        order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, round(share * len(patients))) if len(patients) > 1 else 0
        held |= {patients[n] for n in order[:count]}
    return held
