"""Feature spaces in which an audit compares cases: who is how much like whom, and where a case lies."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.audit.volumes import CaseSet, Sets
from diffaug.errors import DiffaugError
from diffaug.evaluation.alignment import (
    aligned_correlations,
    correlations,
    correlations_over_views,
    registered_correlations,
)
from diffaug.evaluation.embedding import MIRRORED, Embedder, embed, embed_mirrored, embed_shifted
from diffaug.evaluation.memorisation import Search
from diffaug.progress import Progress, Task

Matrix = NDArray[np.float64]

# Voxels that a volume is averaged to for raw intensities, at most, and cases that are read at once.
MOST_POOLED = 4096
BATCH = 16
# Averaged voxels by which volumes are shifted over each other at most.
REACH = 2
# Training cases of a search whose volumes are also turned and stretched.
CANDIDATES = 2
# Correlation of intensities above which two scans are one.
SAME = 0.9999
# Correlations of fewer numbers are 0 or 1.
FEWEST_FEATURES = 3
# What a search among mirror images is called.
MIRROR = ", mirrored"

_OfVolumes = Callable[[Tensor], Tensor]


class NamedSearch(NamedTuple):
    """A search for copies: a word for files, words for readers, and similarities."""

    name: str
    title: str
    similarities: Search


@dataclass(frozen=True)
class Space:
    """One feature space.

    Similarities are Pearson's correlations, 1 for equal features, of the rows with the columns.

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
        balance_to_training: similarities of synthetic cases, of an encoder by one that has seen training and
            held-out cases alike, of intensities at the best shift.
        balance_to_held_out: the same, to held-out cases.
        searches: for copies; by the largest similarity of shifted cases, and in a search of its own of
            mirrored ones, of which an encoder sees few and takes many for the same training cases. Raw
            intensities alone are decisive: of an encoder's matches far beyond all held-out ones some were no
            copies.
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
    balance_to_training: Matrix
    balance_to_held_out: Matrix
    searches: list[NamedSearch]


def encoder_space(model: Embedder, balanced: Embedder, sets: Sets, progress: Progress) -> Space:
    """The contrastive encoder's space.

    Args:
        model: trained on the training cases, so that held-out and synthetic ones are as new to it.
        balanced: trained on training and held-out cases alike.
    """
    name, title = "encoder", "contrastive encoder"
    device = next(model.parameters()).device
    views = {"": embed_shifted, MIRROR: embed_mirrored}

    def run(function: Callable[[Embedder, Tensor], Tensor], network: Embedder) -> _OfVolumes:
        return lambda volumes: function(network, volumes.to(device)).cpu()

    total = 2 * sum(map(len, sets)) + len(views) * (len(sets.synthetic) + len(sets.held_out))
    with progress.task(f"features: {title}", total=total) as task:
        features = [_gather(run(embed, model), cases, task) for cases in sets]
        searches = [
            NamedSearch(
                name + suffix,
                title + suffix,
                Search(
                    _most_alike(run(view, model), features[1], sets.synthetic, task),
                    _most_alike(run(view, model), features[1], sets.held_out, task),
                    decisive=False,
                ),
            )
            for suffix, view in views.items()
        ]
        space = _space(name, title, features, searches)
        synthetic, training, held_out = (_gather(run(embed, balanced), cases, task) for cases in sets)
    return replace(
        space,
        balance_to_training=_correlations(synthetic, training),
        balance_to_held_out=_correlations(synthetic, held_out),
    )


def intensity_space(sets: Sets, hints: Sequence[NamedSearch], progress: Progress) -> Space:
    """Standardised intensities of volumes averaged to at most 4096 voxels.

    Whose scan a case is nearest to, and whether it is a copy, is judged at the best of all shifts of up to
    two of these voxels: where in the volume a structure lies says nothing of whose it is. For copies the two
    training cases that are most alike then, and the two that are by the search of `hints` for the same
    mirroring, are also turned and stretched.

    Args:
        hints: the searches of another space.
    """
    name, title = "intensities", "raw intensities"
    views: dict[str, Sequence[tuple[int, ...]]] = {"": [()], MIRROR: MIRRORED}
    total = sum(map(len, sets)) + len(views) * (len(sets.synthetic) + len(sets.held_out))
    with progress.task(f"features: {title}", total=total) as task:
        volumes = [_gather(_pool_to(_pooled_shape(cases)), cases, task) for cases in sets]
        synthetic, training, held_out = volumes
        searches = []
        for (suffix, flips), hint in zip(views.items(), hints, strict=True):
            found = Search(
                _most_alike_intensities(synthetic, training, flips, hint.similarities.synthetic, task),
                _most_alike_intensities(held_out, training, flips, hint.similarities.held_out, task),
            )
            searches.append(NamedSearch(name + suffix, title + suffix, found))
        to_training, to_held_out = (aligned_correlations(synthetic, cases, REACH) for cases in volumes[1:])
    return replace(
        _space(name, title, [cases.flatten(1) for cases in volumes], searches),
        balance_to_training=_numbers(to_training),
        balance_to_held_out=_numbers(to_held_out),
    )


def _most_alike_intensities(
    cases: Tensor, training: Tensor, flips: Sequence[tuple[int, ...]], hinted: Matrix, task: Task
) -> Matrix:
    """Similarities `(N, M)` of averaged volumes to training ones."""
    by_flip = torch.stack([aligned_correlations(cases.flip(axes), training, REACH) for axes in flips])
    found, flip = by_flip.max(0)
    count = min(CANDIDATES, len(training))
    candidates = torch.cat([found.topk(count, 1).indices, torch.from_numpy(hinted).topk(count, 1).indices], 1)
    for rows in torch.arange(len(cases)).split(BATCH):
        columns = candidates[rows].flatten()
        repeated = rows.repeat_interleave(candidates.shape[1])
        # A single case has no axis of cases.
        pairs = zip(repeated.tolist(), flip[repeated, columns].tolist(), strict=True)
        mine = torch.stack([cases[row].flip([axis - 1 for axis in flips[which]]) for row, which in pairs])
        moved = registered_correlations(mine, training[columns])
        found[repeated, columns] = torch.maximum(found[repeated, columns], moved)
        task.advance(len(rows))
    return _numbers(found)


def twins(sets: Sets) -> list[tuple[str, str]]:
    """Names of held-out and training cases that are one scan, as it is or mirrored."""
    pool = _pool_to(_pooled_shape(sets.training))
    held_out, training = (
        torch.cat([pool(volumes) for volumes in _batches(cases)]) for cases in (sets.held_out, sets.training)
    )
    found = [correlations(held_out.flip(axes).flatten(1), training.flatten(1)) for axes in [(), *MIRRORED]]
    same = torch.stack(found).amax(0) > SAME
    return [
        (sets.held_out.names[row], sets.training.names[column]) for row, column in same.nonzero().tolist()
    ]


def _pooled_shape(cases: CaseSet) -> tuple[int, int, int]:
    shape = cases.images.shape[2:]
    scale = min(1.0, (MOST_POOLED / np.prod(shape)) ** (1 / 3))
    i, j, k = (max(1, int(n * scale)) for n in shape)
    return i, j, k


def _pool_to(shape: tuple[int, int, int]) -> _OfVolumes:
    return lambda volumes: F.adaptive_avg_pool3d(volumes, shape)


def network_space(name: str, network: nn.Module, sets: Sets, progress: Progress) -> Space:
    """A user's network that maps standardised volumes to features `(B, D)`."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def run(volumes: Tensor) -> Tensor:
        return network(volumes.to(device)).flatten(1).float().cpu()

    title = f"{name} with your weights"
    with progress.task(f"features: {title}", total=sum(map(len, sets))) as task:
        return _plain_space("network", title, [_gather(run, cases, task) for cases in sets])


def _gather(function: _OfVolumes, cases: CaseSet, task: Task) -> Tensor:
    """A function of standardised volumes, of all cases."""
    found = []
    for volumes in _batches(cases):
        found.append(function(volumes))
        task.advance(len(volumes))
    return torch.cat(found)


def _most_alike(views: _OfVolumes, training: Tensor, cases: CaseSet, task: Task) -> Matrix:
    """Largest similarity of the views `(B, M, D)` of each case to each training case, by features."""
    found = _gather(lambda volumes: correlations_over_views(views(volumes), training), cases, task)
    return _numbers(found)


def _batches(cases: CaseSet) -> Iterator[Tensor]:
    for start in range(0, len(cases), BATCH):
        yield cases.batch(range(start, min(start + BATCH, len(cases))))


def read_features(file: Path, cases: Sequence[str]) -> dict[str, Matrix]:
    """Features of each case in a user's table, a CSV with a column `case` and one for each of at least three
    features.

    Raises:
        DiffaugError: names the file, and what is wrong with it or which of the cases it lacks.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = [row for row in csv.reader(lines) if any(map(str.strip, row))]
        names = [row[0].strip() for row in rows[1:]]
        table = np.array([[float(value) for value in row[1:]] for row in rows[1:]])
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DiffaugError(f"{file} cannot be read as a table of case and features: {error}") from error
    if not rows or rows[0][0].strip() != "case" or table.ndim != 2 or table.shape[1] < FEWEST_FEATURES:
        raise DiffaugError(
            f"{file} must have the columns case, and one for each of at least {FEWEST_FEATURES} features"
        )
    if not np.isfinite(table).all():
        raise DiffaugError(f"{file} has features that are no finite numbers: leave these out")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DiffaugError(f"{file} names the case {twice} twice: give each case a name of its own")
    if len(set(cases)) < len(cases):
        twice = next(name for name in cases if cases.count(name) > 1)
        raise DiffaugError(
            f"two sets have a case {twice}, and {file} can have one row of that name: rename the cases of one"
        )
    found = dict(zip(names, table, strict=True))
    lacking = [name for name in cases if name not in found]
    if lacking:
        raise DiffaugError(f"{file} has no features of {len(lacking)} cases, such as {lacking[0]}: add them")
    return found


def matrix_space(file: Path, sets: Sets) -> Space:
    """The space of a user's table (`read_features`), standardised by the training cases."""
    features = read_features(file, [name for s in sets for name in s.names])
    own = np.stack([features[name] for name in sets.training.names])
    deviation = own.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    parts = [
        torch.from_numpy((np.stack([features[name] for name in s.names]) - own.mean(0)) / deviation).float()
        for s in sets
    ]
    return _plain_space("features", f"your features ({file.name})", parts)


def _plain_space(name: str, title: str, features: Sequence[Tensor]) -> Space:
    """A space whose one search is by the features themselves."""
    synthetic, training, held_out = features
    found = Search(_correlations(synthetic, training), _correlations(held_out, training), decisive=False)
    return _space(name, title, features, [NamedSearch(name, title, found)])


def _space(name: str, title: str, features: Sequence[Tensor], searches: list[NamedSearch]) -> Space:
    """A space from the features `(N, D)` of the three sets."""
    synthetic, training, held_out = features
    to_training, to_held_out = _correlations(synthetic, training), _correlations(synthetic, held_out)
    return Space(
        name,
        title,
        _numbers(synthetic),
        _numbers(training),
        _numbers(held_out),
        to_training,
        to_held_out,
        _correlations(held_out, training),
        _correlations(training, training),
        to_training,
        to_held_out,
        searches,
    )


def _correlations(rows: Tensor, columns: Tensor) -> Matrix:
    return _numbers(correlations(rows, columns))


def _numbers(values: Tensor) -> Matrix:
    return values.double().numpy()
