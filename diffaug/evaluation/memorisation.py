"""Did a generator copy the cases that it was fitted to? Statistics of distances and similarities.

Matrices hold distances (small is alike) or similarities (large is alike) of every case of one set to every
case of another. Two scans of one patient count as one where patients are given.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from diffaug.errors import DiffaugError
from diffaug.evaluation.statistics import Interval, cluster_index

# Of the training cases' best matches in an independent set: above it a match is a suspected copy.
TAU_PERCENTILE = 95.0

Matrix = NDArray[np.float64]


def copy_threshold(training_to_validation: ArrayLike, percentile: float = TAU_PERCENTILE) -> float:
    """Tau of Dar et al. (arXiv 2402.01054): that percentile of each training case's best similarity to an
    independent validation case. By construction `100 - percentile` % of the training cases exceed it."""
    return float(np.percentile(_matrix(training_to_validation).max(1), percentile))


class Copies(NamedTuple):
    """Suspected copies at one threshold.

    Attributes:
        memorised: training cases whose best synthetic match exceeds it (N_mem).
        copies: synthetic cases whose best training match exceeds it (N_copies).
        training: number of training cases.
        synthetic: number of synthetic cases.
    """

    memorised: int
    copies: int
    training: int
    synthetic: int


def count_copies(training_to_synthetic: ArrayLike, threshold: float) -> Copies:
    """N_mem and N_copies of Dar et al. from similarities `(training, synthetic)`."""
    found = _matrix(training_to_synthetic) > threshold
    return Copies(int(found.any(1).sum()), int(found.any(0).sum()), *found.shape)


def memorised_share(
    training_to_candidates: ArrayLike, threshold: float, count: int, *, draws: int = 200, seed: int = 0
) -> float:
    """Share of the training cases with a match above the threshold among `count` random candidates.

    The best of many matches is better than the best of few: shares are only comparable, with one another and
    with the 5 % that the threshold is made for, at equal numbers of candidates.
    """
    found = _matrix(training_to_candidates) > threshold
    total = found.shape[1]
    if count > total:
        raise DiffaugError(f"{count} candidates cannot be drawn from {total}")
    rng = np.random.default_rng(seed)
    return float(
        np.mean([found[:, rng.choice(total, count, replace=False)].any(1).mean() for _ in range(draws)])
    )


def authenticity(
    synthetic_to_training: ArrayLike, training_to_training: ArrayLike, patients: Sequence[Hashable]
) -> NDArray[np.bool_]:
    """Whether each synthetic case is farther from its nearest training case than that one is from the nearest
    of another patient (Alaa et al. 2022).

    Args:
        synthetic_to_training: distances `(synthetic, training)`.
        training_to_training: distances `(training, training)`.
        patients: of the training cases.
    """
    nearest = _matrix(synthetic_to_training)
    index = nearest.argmin(1)
    own = _nearest_of_another(_matrix(training_to_training), patients)
    authentic: NDArray[np.bool_] = nearest.min(1) > own[index]
    return authentic


def neighbour_ratios(to_training: ArrayLike, patients: Sequence[Hashable]) -> Matrix:
    """Distance of each query to its nearest training patient over that to the second nearest one, 0 to 1; it
    is near 0 where the query is much like one patient alone."""
    distances = _matrix(to_training)
    index = cluster_index(patients)
    if index.max() < 1:
        raise DiffaugError("a ratio of distances needs training cases of at least two patients")
    by_patient = np.stack([distances[:, index == patient].min(1) for patient in range(index.max() + 1)], 1)
    first, second = np.partition(by_patient, 1, axis=1)[:, :2].T
    ratios: Matrix = np.divide(first, second, out=np.ones_like(first), where=second > 0)
    return ratios


def membership_auc(
    training_to_synthetic: ArrayLike,
    held_out_to_synthetic: ArrayLike,
    training_patients: Sequence[Hashable],
    held_out_patients: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """How well the distance to the nearest synthetic case tells training from held-out cases.

    Area under the curve of an attacker who calls near cases members: 0.5 is guessing, 1 certainty. The
    percentile interval draws patients of both sets.
    """
    sides = [
        (-_matrix(distances).min(1), cluster_index(patients))
        for distances, patients in (
            (training_to_synthetic, training_patients),
            (held_out_to_synthetic, held_out_patients),
        )
    ]

    def auc(members: Matrix, others: Matrix) -> float:
        ranks = stats.rankdata(np.concatenate([members, others]))[: len(members)].sum()
        return float((ranks - len(members) * (len(members) + 1) / 2) / (len(members) * len(others)))

    rng = np.random.default_rng(seed)
    areas = []
    for _ in range(resamples):
        drawn = []
        for scores, index in sides:
            count = index.max() + 1
            drawn.append(
                np.concatenate([scores[index == patient] for patient in rng.integers(count, size=count)])
            )
        areas.append(auc(*drawn))
    low, high = np.quantile(areas, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(auc(sides[0][0], sides[1][0]), float(low), float(high))


def correlations(first: ArrayLike, second: ArrayLike) -> Matrix:
    """Pearson correlation of every row of one matrix `(N, D)` with every row of another `(M, D)`: `(N, M)`; 0
    with a constant row."""
    rows = []
    for features in (first, second):
        centred = np.asarray(features, dtype=np.float64)
        centred = centred - centred.mean(1, keepdims=True)
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        rows.append(np.divide(centred, norms, out=np.zeros_like(centred), where=norms > 0))
    product: Matrix = rows[0] @ rows[1].T
    return product


def _nearest_of_another(distances: Matrix, patients: Sequence[Hashable]) -> Matrix:
    """Distance of each case to the nearest one of another patient."""
    index = cluster_index(patients)
    if index.max() < 1:
        raise DiffaugError("distances between patients need training cases of at least two patients")
    others = np.where(index[:, None] == index[None, :], np.inf, distances)
    nearest: Matrix = others.min(1)
    return nearest


def _matrix(values: ArrayLike) -> Matrix:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DiffaugError(f"a matrix of all pairs is needed, got the shape {matrix.shape}")
    return matrix
