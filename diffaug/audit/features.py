"""Feature spaces in which an audit compares cases: who is how much like whom, and where a case lies."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from diffaug.evaluation.embedding import MIRRORED, SHIFTED, Embedder, embed, embed_mirrored, embed_shifted
from diffaug.evaluation.memorisation import Search
from diffaug.progress import Progress, Task

Matrix = NDArray[np.float64]

# Voxels that a volume is averaged to for raw intensities, at most, and cases that are read at once.
MOST_POOLED = 4096
BATCH = 16
# Places of sets in `Sets`.
SYNTHETIC, HELD_OUT = 0, 2
# Correlations of fewer numbers are 0 or 1.
FEWEST_FEATURES = 3
# What a search among mirror images is called.
MIRROR = ", mirrored"

# Features of volumes `(B, C, I, J, K)`; of some cases of a set, given by its number in `Sets`.
_OfVolumes = Callable[[Tensor], Tensor]
_OfRows = Callable[[int, Sequence[int]], Tensor]


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
            mirrored ones, of which an encoder sees few and takes many for the same training cases.
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
    device = next(model.parameters()).device

    def on_device(function: Callable[[Embedder, Tensor], Tensor]) -> _OfVolumes:
        return lambda volumes: function(model, volumes.to(device)).cpu()

    views = {"": on_device(embed_shifted), MIRROR: on_device(embed_mirrored)}
    space = _volume_space("encoder", "contrastive encoder", sets, on_device(embed), views, progress)
    if balanced is None:
        return space
    synthetic, training, held_out = (_embedded(balanced, cases, device) for cases in sets)
    return replace(
        space,
        balance_to_training=_correlations(synthetic, training),
        balance_to_held_out=_correlations(synthetic, held_out),
    )


def _embedded(model: Embedder, cases: CaseSet, device: torch.device) -> Tensor:
    """Embeddings of all cases, as standard rows."""
    starts = range(0, len(cases), BATCH)
    found = [
        embed(model, cases.batch(range(start, min(start + BATCH, len(cases)))).to(device)) for start in starts
    ]
    return _standard(torch.cat(found).cpu())


def intensity_space(sets: Sets, progress: Progress) -> Space:
    """Standardised intensities of volumes averaged to at most 4096 voxels."""
    shape = sets.training.images.shape[2:]
    scale = min(1.0, (MOST_POOLED / np.prod(shape)) ** (1 / 3))
    i, j, k = (max(1, int(n * scale)) for n in shape)

    def pooled(volumes: Tensor) -> Tensor:
        return F.adaptive_avg_pool3d(volumes, (i, j, k)).flatten(1)

    views: dict[str, _OfVolumes] = {
        "": lambda v: torch.stack([pooled(v.roll(shift, (2, 3, 4))) for shift in SHIFTED], 1),
        MIRROR: lambda v: torch.stack([pooled(v.flip(axes)) for axes in MIRRORED], 1),
    }
    return _volume_space("intensities", "raw intensities", sets, pooled, views, progress)


def network_space(name: str, network: nn.Module, sets: Sets, progress: Progress) -> Space:
    """A user's network that maps standardised volumes to features `(B, D)`."""

    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def features(volumes: Tensor) -> Tensor:
        return network(volumes.to(device)).flatten(1).float().cpu()

    title = f"{name} with your weights"
    return _volume_space("network", title, sets, features, {"": lambda v: features(v)[:, None]}, progress)


def _volume_space(
    name: str,
    title: str,
    sets: Sets,
    features: _OfVolumes,
    views: Mapping[str, _OfVolumes],
    progress: Progress,
) -> Space:
    """A space of functions of standardised volumes."""

    def of_rows(function: _OfVolumes) -> _OfRows:
        return lambda number, rows: function(sets[number].batch(rows))

    total = sum(map(len, sets)) + len(views) * (len(sets.synthetic) + len(sets.held_out))
    with progress.task(f"features: {title}", total=total) as task:
        rowwise = {name: of_rows(function) for name, function in views.items()}
        return _space(name, title, sets, of_rows(features), rowwise, task)


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


def matrix_space(file: Path, sets: Sets, progress: Progress) -> Space:
    """The space of a user's table (`read_features`), standardised by the training cases."""
    features = read_features(file, [name for s in sets for name in s.names])
    own = np.stack([features[name] for name in sets.training.names])
    deviation = own.std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    parts = [
        torch.from_numpy((np.stack([features[name] for name in s.names]) - own.mean(0)) / deviation).float()
        for s in sets
    ]
    total = 2 * sum(map(len, sets)) - len(sets.training)
    with progress.task("features", total=total) as task:
        return _space(
            "features",
            f"your features ({file.name})",
            sets,
            lambda number, rows: parts[number][rows],
            {"": lambda number, rows: parts[number][rows][:, None]},
            task,
        )


def _space(
    name: str, title: str, sets: Sets, features: _OfRows, views: Mapping[str, _OfRows], task: Task
) -> Space:
    """A space from features `(B, D)` and the views `(B, M, D)` of each search, a batch at a time."""

    def batches(number: int) -> Iterator[list[int]]:
        for start in range(0, len(sets[number]), BATCH):
            rows = list(range(start, min(start + BATCH, len(sets[number]))))
            yield rows
            task.advance(len(rows))

    synthetic, training, held_out = (
        torch.cat([features(number, rows) for rows in batches(number)]) for number in range(len(sets))
    )
    standard = _standard(training)

    def largest(view: _OfRows, number: int) -> Matrix:
        found = [(_standard(view(number, rows)) @ standard.T).amax(1) for rows in batches(number)]
        return _numbers(torch.cat(found).clamp(-1, 1))

    to_training = _correlations(_standard(synthetic), standard)
    to_held_out = _correlations(_standard(synthetic), _standard(held_out))
    return Space(
        name,
        title,
        _numbers(synthetic),
        _numbers(training),
        _numbers(held_out),
        to_training,
        to_held_out,
        _correlations(_standard(held_out), standard),
        _correlations(standard, standard),
        to_training,
        to_held_out,
        [
            NamedSearch(
                name + suffix, title + suffix, Search(largest(view, SYNTHETIC), largest(view, HELD_OUT))
            )
            for suffix, view in views.items()
        ],
    )


def _standard(features: Tensor) -> Tensor:
    """Rows of zero mean and unit length, whose products are correlations."""
    centred = features.float() - features.float().mean(-1, keepdim=True)
    return F.normalize(centred, dim=-1)


def _numbers(values: Tensor) -> Matrix:
    return values.double().numpy()


def _correlations(rows: Tensor, columns: Tensor) -> Matrix:
    """Products of standard rows; rounding does not take them beyond 1."""
    return _numbers((rows @ columns.T).clamp(-1, 1))
