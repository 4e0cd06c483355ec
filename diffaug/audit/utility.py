"""Utility: segmenters trained on synthetic cases and tested on real ones, and the reverse."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffaug.audit.record import Figure, Utility
from diffaug.audit.volumes import on_grid
from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import DiffaugError
from diffaug.evaluation.overlap import dice
from diffaug.evaluation.segmenter import Segmenter, fit_segmenter, predict
from diffaug.evaluation.statistics import mean_interval
from diffaug.generators.grid import Grid, place
from diffaug.progress import Progress, Task

STEPS = 6000
# Cases that a segmenter is trained or tested on, at most: they lie in memory.
MOST_CASES = 500

Cases = tuple[Dataset, Sequence[CaseFiles]]


class _Pairs(NamedTuple):
    images: Tensor
    labels: Tensor
    patients: list[str]


def measure_utility(
    synthetic: Cases, training: Cases, held_out: Cases, grid: Grid, progress: Progress, steps: int = STEPS
) -> Utility:
    """Dice of the reference U-Net, trained on as many synthetic as real cases at most, by label name.

    Raises:
        DiffaugError: the three sets have no label of one name.
    """
    names = [
        name
        for number, name in synthetic[0].labels.items()
        if number != 0 and all(name in part[0].labels.values() for part in (training, held_out))
    ]
    if not names:
        raise DiffaugError(
            "utility needs label maps with names that all three datasets share: the synthetic ones have "
            f"{', '.join(synthetic[0].labels.values()) or 'none'}, the training ones "
            f"{', '.join(training[0].labels.values()) or 'none'}"
        )
    made, real, others = (_read(*part, grid, names, progress) for part in (synthetic, training, held_out))
    segmenters = {}
    for title, pairs in (("synthetic", made), ("real", real)):
        with progress.task(f"training on {title} cases", total=steps) as task:
            segmenters[title] = fit_segmenter(
                pairs.images,
                pairs.labels,
                steps=steps,
                seed=0,
                classes=len(names) + 1,
                on_step=partial(_advance, task),
            )
    return Utility(
        trained_on_synthetic_tested_on_real=_score(segmenters["synthetic"], others),
        trained_on_real_tested_on_real=_score(segmenters["real"], others),
        trained_on_real_tested_on_synthetic=_score(segmenters["real"], made),
        training_cases=len(made.images),
        steps=steps,
    )


def _advance(task: Task, _: int, loss: float) -> None:
    task.advance(loss=loss)


def _read(
    dataset: Dataset, cases: Sequence[CaseFiles], grid: Grid, names: Sequence[str], progress: Progress
) -> _Pairs:
    """Labelled cases on the grid, labels numbered as in `names`, from 1."""
    numbers = [next(n for n, own in dataset.labels.items() if own == name) for name in names]
    labelled = [case for case in cases if case.label is not None][:MOST_CASES]
    images, labels = [], []
    with progress.task(f"reading {dataset.name}", total=len(labelled)) as task:
        for case in labelled:
            loaded = load_case(case)
            assert loaded.label is not None
            found = loaded.label[0]
            placement = place(grid, found.shape, loaded.affine, foreground=torch.from_numpy(found > 0))
            shares = np.stack([~np.isin(found, numbers), *(found == n for n in numbers)])
            labels.append(placement.label_to_grid(torch.from_numpy(shares)[None])[0].argmax(0, keepdim=True))
            images.append(torch.from_numpy(on_grid(case, loaded, grid)))
            task.advance()
    return _Pairs(torch.stack(images), torch.stack(labels).short(), [case.patient for case in labelled])


def _score(model: Segmenter, pairs: _Pairs) -> Figure:
    """Mean Dice over labels and cases, with an interval over patients."""
    ids = tuple(range(1, int(pairs.labels.max()) + 1))
    scores = torch.nanmean(dice(predict(model, pairs.images), pairs.labels, ids), 1).numpy()
    scored = np.isfinite(scores)
    patients = [p for p, ok in zip(pairs.patients, scored, strict=True) if ok]
    return Figure.of(mean_interval(scores[scored], patients))
