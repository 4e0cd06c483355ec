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
from diffaug.evaluation.alignment import aligned_correlations, standard_rows
from diffaug.evaluation.embedding import MIRRORED, Embedder, embed, embed_mirrored, embed_shifted
from diffaug.evaluation.memorisation import Search
from diffaug.progress import Progress, Task

Matrix = NDArray[np.float64]

# Voxels that a volume is averaged to for raw intensities, at most, and cases that are read at once.
MOST_POOLED = 4096
BATCH = 16
# Averaged voxels by which volumes are shifted over each other at most.
REACH = 2
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
        balance_to_training: similarities of synthetic cases by features that have seen training and held-out
            cases alike.
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


def encoder_space(model: Embedder, sets: Sets, progress: Progress, balanced: Embedder | None = None) -> Space:
    """The contrastive encoder's space.

    Args:
        model: trained on the training cases, so that held-out and synthetic ones are as new to it.
        balanced: trained on training and held-out cases alike; `model` itself unless given.
    """
    name, title = "encoder", "contrastive encoder"
    device = next(model.parameters()).device
    views = {"": embed_shifted, MIRROR: embed_mirrored}

    def run(function: Callable[[Embedder, Tensor], Tensor], network: Embedder) -> _OfVolumes:
        return lambda volumes: function(network, volumes.to(device)).cpu()

    passes = 1 if balanced is None else 2
    total = passes * sum(map(len, sets)) + len(views) * (len(sets.synthetic) + len(sets.held_out))
    with progress.task(f"features: {title}", total=total) as task:
        features = [_gather(run(embed, model), cases, task) for cases in sets]
        training = standard_rows(features[1])
        searches = [
            NamedSearch(
                name + suffix,
                title + suffix,
                Search(
                    _most_alike(run(view, model), training, sets.synthetic, task),
                    _most_alike(run(view, model), training, sets.held_out, task),
                    decisive=False,
                ),
            )
            for suffix, view in views.items()
        ]
        space = _space(name, title, features, searches)
        if balanced is None:
            return space
        synthetic, training, held_out = (_gather(run(embed, balanced), cases, task) for cases in sets)
    return replace(
        space,
        balance_to_training=_correlations(synthetic, training),
        balance_to_held_out=_correlations(synthetic, held_out),
    )


def intensity_space(sets: Sets, progress: Progress) -> Space:
    """Standardised intensities of volumes averaged to at most 4096 voxels; copies are looked for at the best
    of all shifts of up to two of these voxels."""
    name, title = "intensities", "raw intensities"
    shape = sets.training.images.shape[2:]
    scale = min(1.0, (MOST_POOLED / np.prod(shape)) ** (1 / 3))
    i, j, k = (max(1, int(n * scale)) for n in shape)
    views: dict[str, Sequence[tuple[int, ...]]] = {"": [()], MIRROR: MIRRORED}
    total = sum(map(len, sets)) + 2 * sum(map(len, views.values()))
    with progress.task(f"features: {title}", total=total) as task:
        volumes = [_gather(lambda v: F.adaptive_avg_pool3d(v, (i, j, k)), cases, task) for cases in sets]
        synthetic, training, held_out = volumes

        def most_alike(cases: Tensor, flips: Sequence[tuple[int, ...]]) -> Matrix:
            found = torch.full((len(cases), len(training)), -1.0)
            for axes in flips:
                found = torch.maximum(found, aligned_correlations(cases.flip(axes), training, REACH))
                task.advance()
            return _numbers(found)

        searches = [
            NamedSearch(
                name + suffix,
                title + suffix,
                Search(most_alike(synthetic, flips), most_alike(held_out, flips)),
            )
            for suffix, flips in views.items()
        ]
    return _space(name, title, [cases.flatten(1) for cases in volumes], searches)


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
    return torch.cat([function(volumes) for volumes in _batches(cases, task)])


def _most_alike(views: _OfVolumes, training: Tensor, cases: CaseSet, task: Task) -> Matrix:
    """Largest similarity of the views `(B, M, D)` of each case to each training case, whose features are
    standard rows."""
    found = [(standard_rows(views(volumes)) @ training.T).amax(1) for volumes in _batches(cases, task)]
    return _numbers(torch.cat(found).clamp(-1, 1))


def _batches(cases: CaseSet, task: Task) -> Iterator[Tensor]:
    for start in range(0, len(cases), BATCH):
        rows = range(start, min(start + BATCH, len(cases)))
        yield cases.batch(rows)
        task.advance(len(rows))


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
    """Correlations of features; rounding does not take them beyond 1."""
    return _numbers((standard_rows(rows) @ standard_rows(columns).T).clamp(-1, 1))


def _numbers(values: Tensor) -> Matrix:
    return values.double().numpy()
