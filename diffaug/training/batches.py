"""Batches of augmented training cases, drawn ahead by a thread."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from diffaug.generators.seeds import case_seed
from diffaug.training.augmentation import Augmenter
from diffaug.training.cases import Canvases
from diffaug.training.plan import PlanBase

Batch = tuple[NDArray[np.float32], NDArray[np.uint8]]


class AugmentedBatches:
    """Batch n of augmented cases, the next one being drawn by a thread while this one is used.

    For networks that look at images and label maps apart: where only some cases have a label map, the others
    come with one of theirs, so that few of them are seen as often as many would be.
    """

    def __init__(self, plan: PlanBase, canvases: Canvases, batch: int, rank: int, ranks: int) -> None:
        self.plan, self.canvases, self.batch = plan, canvases, batch
        self.rank, self.ranks = rank, ranks
        self.labelled = np.flatnonzero(canvases.labelled)
        self.augmenter = Augmenter(plan.augmentation, plan.grid.shape, plan.grid.spacing, plan.grid.outside)
        self.pool = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        drawn_ahead = self.ahead is not None and self.ahead[0] == step
        batch = self.ahead[1].result() if self.ahead is not None and drawn_ahead else self._draw(step)
        self.ahead = (step + 1, self.pool.submit(self._draw, step + 1))
        return batch

    def _draw(self, step: int) -> Batch:
        seed = case_seed(self.plan.seed, 2 * step)
        rng = np.random.default_rng(seed)
        chosen = rng.integers(len(self.canvases), size=self.batch)
        lenders = rng.choice(self.labelled, self.batch) if self.labelled.size else chosen
        mine = range(self.rank, self.batch, self.ranks)
        cases = []
        for n in mine:
            image, label = self.canvases.case(int(chosen[n]))
            cases.append((image, self.canvases.case(int(lenders[n]))[1] if label is None else label))
        return self.augmenter.draw_batch(cases, [case_seed(seed, n) for n in mine])
