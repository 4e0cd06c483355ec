"""Feature spaces in which an audit compares cases: who is how much like whom, and where a case lies."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.audit.fidelity import Sets
from diffaug.errors import DiffaugError
from diffaug.evaluation.embedding import MIRRORED, Embedder, embed, embed_mirrored
from diffaug.progress import Progress, Task

Matrix = NDArray[np.float64]

# Voxels that a volume is averaged to for raw intensities, at most, and cases that are read at once.
MOST_POOLED = 4096
BATCH = 16
# Places of sets in `Sets`.
SYNTHETIC, HELD_OUT = 0, 2


@dataclass(frozen=True)
class Space:
    """One feature space.

    Similarities are Pearson's correlations, 1 for equal features, of the rows with the columns. Those of
    mirror images, the largest over the seven of the row, serve to find mirrored copies alone: an encoder sees
    few mirror images, and takes many of them for the same few cases.

    Attributes:
        name: a word for files.
        title: for readers.
        synthetic: features `(N, D)`.
        training: features.
        held_out: features.
        synthetic_to_training: similarities.
        synthetic_to_held_out: similarities.
        held_out_to_training: similarities.
        training_to_training: similarities.
        mirrored_synthetic_to_training: similarities of mirror images, or None.
        mirrored_held_out_to_training: similarities of mirror images, or None.
    """

    name: str
    title: str
    synthetic: Matrix
    training: Matrix
    held_out: Matrix
    synthetic_to_training: Matrix
    synthetic_to_held_out: Matrix
    held_out_to_training: Matrix
    training_to_training: Matrix
    mirrored_synthetic_to_training: Matrix | None
    mirrored_held_out_to_training: Matrix | None


def encoder_space(model: Embedder, sets: Sets, progress: Progress) -> Space:
    """The contrastive encoder's space."""
    device = next(model.parameters()).device
    return _volume_space(
        "encoder",
        "contrastive encoder",
        sets,
        lambda volumes: embed(model, volumes.to(device)).cpu(),
        lambda volumes: embed_mirrored(model, volumes.to(device)).cpu(),
        progress,
    )


def intensity_space(sets: Sets, progress: Progress) -> Space:
    """Standardised intensities of volumes averaged to at most 4096 voxels."""
    shape = sets.training.images.shape[2:]
    scale = min(1.0, (MOST_POOLED / np.prod(shape)) ** (1 / 3))
    i, j, k = (max(1, int(n * scale)) for n in shape)
    pooled = i, j, k

    def mirrored(volumes: Tensor) -> Tensor:
        small = F.adaptive_avg_pool3d(volumes, pooled)
        return torch.stack([small.flip(axes).flatten(1) for axes in MIRRORED], 1)

    return _volume_space(
        "intensities",
        "raw intensities",
        sets,
        lambda volumes: F.adaptive_avg_pool3d(volumes, pooled).flatten(1),
        mirrored,
        progress,
    )


def network_space(name: str, network: nn.Module, sets: Sets, progress: Progress) -> Space:
    """A user's network that maps standardised volumes to features `(B, D)`."""

    @torch.no_grad()
    def features(volumes: Tensor) -> Tensor:
        return network(volumes).flatten(1).float()

    return _volume_space("network", f"{name} with your weights", sets, features, None, progress)


def _volume_space(
    name: str,
    title: str,
    sets: Sets,
    features: Callable[[Tensor], Tensor],
    mirrored: Callable[[Tensor], Tensor] | None,
    progress: Progress,
) -> Space:
    """A space of functions of standardised volumes."""
    total = sum(map(len, sets)) + (0 if mirrored is None else len(sets.synthetic) + len(sets.held_out))
    with progress.task(f"features: {title}", total=total) as task:
        return _space(
            name,
            title,
            sets,
            lambda number, rows: features(sets[number].batch(rows)),
            None if mirrored is None else lambda number, rows: mirrored(sets[number].batch(rows)),
            task,
        )


def matrix_space(file: Path, sets: Sets, progress: Progress) -> Space:
    """Features of all cases that a user brings: a CSV with a column `case` and one for each feature.

    Features are standardised by the training cases.

    Raises:
        DiffaugError: names the file, and what it lacks.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines))
        names = [row[0].strip() for row in rows[1:]]
        table = np.array([[float(value) for value in row[1:]] for row in rows[1:]])
    except (OSError, UnicodeDecodeError, ValueError, IndexError, csv.Error) as error:
        raise DiffaugError(f"{file} cannot be read as a table of case and features: {error}") from error
    if not rows or rows[0][0].strip() != "case" or table.ndim != 2 or not table.size:
        raise DiffaugError(f"{file} must have the columns case, and one for each feature")
    if not np.isfinite(table).all():
        raise DiffaugError(f"{file} has features that are no finite numbers: leave these out")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DiffaugError(f"{file} names the case {twice} twice: give each case a name of its own")
    index = {name: n for n, name in enumerate(names)}
    lacking = [name for s in sets for name in s.names if name not in index]
    if lacking:
        raise DiffaugError(f"{file} has no features of {len(lacking)} cases, such as {lacking[0]}: add them")
    mean, deviation = (
        f(table[[index[name] for name in sets.training.names]], axis=0) for f in (np.mean, np.std)
    )
    table = (table - mean) / np.where(deviation > 0, deviation, 1)
    parts = [torch.from_numpy(table[[index[name] for name in s.names]]).float() for s in sets]
    with progress.task("features", total=sum(map(len, sets))) as task:
        return _space(
            "features",
            f"your features ({file.name})",
            sets,
            lambda number, rows: parts[number][rows],
            None,
            task,
        )


# Features of some cases of a set, given by its number in `Sets`.
_Features = Callable[[int, Sequence[int]], Tensor]


def _space(
    name: str, title: str, sets: Sets, features: _Features, mirrored: _Features | None, task: Task
) -> Space:
    """A space from features `(B, D)` and those of mirror images `(B, M, D)`, a batch at a time."""

    def batches(number: int) -> Iterator[list[int]]:
        for start in range(0, len(sets[number]), BATCH):
            rows = list(range(start, min(start + BATCH, len(sets[number]))))
            yield rows
            task.advance(len(rows))

    synthetic, training, held_out = (
        torch.cat([features(number, rows) for rows in batches(number)]) for number in range(len(sets))
    )
    standard = _standard(training)

    def of_mirrored(number: int) -> Matrix | None:
        if mirrored is None:
            return None
        largest = [(_standard(mirrored(number, rows)) @ standard.T).amax(1) for rows in batches(number)]
        return _numbers(torch.cat(largest))

    return Space(
        name,
        title,
        _numbers(synthetic),
        _numbers(training),
        _numbers(held_out),
        _numbers(_standard(synthetic) @ standard.T),
        _numbers(_standard(synthetic) @ _standard(held_out).T),
        _numbers(_standard(held_out) @ standard.T),
        _numbers(standard @ standard.T),
        of_mirrored(SYNTHETIC),
        of_mirrored(HELD_OUT),
    )


def _standard(features: Tensor) -> Tensor:
    """Rows of zero mean and unit length, whose products are correlations."""
    centred = features.float() - features.float().mean(-1, keepdim=True)
    return F.normalize(centred, dim=-1)


def _numbers(values: Tensor) -> Matrix:
    return values.double().numpy()
