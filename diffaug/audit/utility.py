"""Utility: segmenters trained on synthetic cases and tested on real ones, and the reverse."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.audit.record import Figure, Utility
from diffaug.audit.segmenting import label_on_grid, write_segmenter
from diffaug.audit.volumes import case_on_grid
from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import DiffaugError
from diffaug.evaluation.overlap import dice
from diffaug.evaluation.segmenter import Segmenter, fit_segmenter, predict
from diffaug.evaluation.statistics import mean_interval
from diffaug.generators.grid import Grid
from diffaug.progress import Progress, Task

STEPS = 6000
# Cases that a segmenter is trained or tested on, at most: they lie in memory.
MOST_CASES = 500

Cases = tuple[Dataset, Sequence[CaseFiles]]


class _Pairs(NamedTuple):
    images: Tensor
    labels: Tensor
    patients: list[str]

    def to(self, device: str) -> "_Pairs":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def measure_utility(
    synthetic: Cases,
    training: Cases,
    held_out: Cases,
    grid: Grid,
    segmenter: Path,
    progress: Progress,
    *,
    steps: int = STEPS,
    device: str = "cpu",
) -> Utility:
    """Dice of the reference U-Net, trained on synthetic and on real cases, by label name.

    Args:
        segmenter: file to keep the one in that was trained on real cases.
        steps: of each training.
        device: such as "cpu" or "cuda".

    Raises:
        DiffaugError: the three sets have no label of one name.
    """
    names = check_labels(synthetic, training, held_out)
    made, real, others = (
        _read(*part, grid, names, progress).to(device) for part in (synthetic, training, held_out)
    )
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
    by_real = _scores(segmenters["real"], others)
    finite = by_real[np.isfinite(by_real)]
    write_segmenter(segmenters["real"], names, others.images.shape[1], grid, finite, segmenter)
    return Utility(
        trained_on_synthetic_tested_on_real=_mean(_scores(segmenters["synthetic"], others), others),
        trained_on_real_tested_on_real=_mean(by_real, others),
        trained_on_real_tested_on_synthetic=_mean(_scores(segmenters["real"], made), made),
        training_cases=len(made.images),
        steps=steps,
    )


def _labelled(cases: Sequence[CaseFiles]) -> list[CaseFiles]:
    return [case for case in cases if case.label is not None][:MOST_CASES]


def check_labels(synthetic: Cases, training: Cases, held_out: Cases) -> list[str]:
    """Names of the labels that all three sets have.

    Raises:
        DiffaugError: there are none, or a set has no label map.
    """
    for dataset, cases in (synthetic, training, held_out):
        if not _labelled(cases):
            raise DiffaugError(
                f"utility needs label maps, and no case that is used of {dataset.root} has one"
            )
    return _shared(synthetic[0], training[0], held_out[0])


def _shared(synthetic: Dataset, training: Dataset, held_out: Dataset) -> list[str]:
    """Names of the labels that all three datasets have."""
    names = [
        name
        for number, name in synthetic.labels.items()
        if number != 0 and all(name in other.labels.values() for other in (training, held_out))
    ]
    if not names:
        raise DiffaugError(
            "utility needs label maps with names that all three datasets share: the synthetic ones have "
            f"{', '.join(synthetic.labels.values()) or 'none'}, the training ones "
            f"{', '.join(training.labels.values()) or 'none'}"
        )
    return names


def _advance(task: Task, _: int, loss: float) -> None:
    task.advance(loss=loss)


def _read(
    dataset: Dataset, cases: Sequence[CaseFiles], grid: Grid, names: Sequence[str], progress: Progress
) -> _Pairs:
    """Labelled cases on the grid, labels numbered as in `names`, from 1."""
    numbers = tuple(next(n for n, own in dataset.labels.items() if own == name) for name in names)
    labelled = _labelled(cases)
    images, labels = [], []
    with progress.task(f"reading {dataset.name}", total=len(labelled)) as task:
        for case in labelled:
            loaded = load_case(case)
            assert loaded.label is not None
            labels.append(label_on_grid(loaded.label[0], loaded.affine, grid, numbers))
            images.append(torch.from_numpy(case_on_grid(case, loaded, grid)))
            task.advance()
    return _Pairs(torch.stack(images), torch.stack(labels), [case.patient for case in labelled])


def _scores(model: Segmenter, pairs: _Pairs) -> NDArray[np.float64]:
    """Mean Dice over labels of each case."""
    ids = tuple(range(1, int(pairs.labels.max()) + 1))
    scores: NDArray[np.float64] = (
        torch.nanmean(dice(predict(model, pairs.images), pairs.labels, ids), 1).cpu().numpy()
    )
    return scores


def _mean(scores: NDArray[np.float64], pairs: _Pairs) -> Figure:
    """Mean over cases, with an interval over patients."""
    # Without a structure in label and prediction there is no Dice.
    scored = np.isfinite(scores)
    patients = [patient for patient, ok in zip(pairs.patients, scored, strict=True) if ok]
    return Figure.of(mean_interval(scores[scored], patients))
