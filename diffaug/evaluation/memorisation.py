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
# Share of honest sets of cases in which any search finds more than chance explains.
LEVEL = 0.05
# Of the distance from similarity 1 that the best match of all held-out cases has: nearer is a clear copy.
CLEAR = 1 / 3

Matrix = NDArray[np.float64]


class Memorised(NamedTuple):
    """N_mem of Dar et al. over the number of training cases.

    Attributes:
        threshold: tau, mean over splits of the held-out cases.
        share: of the training cases whose best synthetic match exceeds it.
        null: the same with held-out cases, as many, in the place of synthetic ones.
        cases: synthetic and held-out cases that were compared with each training case.
    """

    threshold: float
    share: float
    null: float
    cases: int


def memorised_share(
    training_to_synthetic: ArrayLike,
    training_to_held_out: ArrayLike,
    held_out_patients: Sequence[Hashable],
    *,
    percentile: float = TAU_PERCENTILE,
    splits: int = 100,
    seed: int = 0,
) -> Memorised:
    """Share of the training cases that have a match among the synthetic ones (Dar et al., arXiv 2402.01054).

    Tau is that percentile of each training case's best similarity to an independent real case. The best of
    many matches is better than the best of few, so sizes are made equal: random halves of the held-out
    patients give tau, the other halves the null, and as many synthetic cases are drawn.

    Args:
        training_to_synthetic: similarities `(training, synthetic)`.
        training_to_held_out: similarities `(training, held-out)`.
        held_out_patients: of the held-out cases.
        percentile: 0 to 100.
        splits: random halves that all figures are averaged over.
        seed: of the draws.

    Raises:
        DiffaugError: fewer than two held-out patients.
    """
    synthetic, held_out = _matrix(training_to_synthetic), _matrix(training_to_held_out)
    index = cluster_index(held_out_patients)
    patients = int(index.max()) + 1
    if patients < 2:
        raise DiffaugError("a threshold and its null rate need held-out cases of at least two patients")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        chosen = np.isin(index, rng.permutation(patients)[: patients // 2])
        sides = [rng.permutation(np.flatnonzero(side)) for side in (chosen, ~chosen)]
        count = min(len(sides[0]), len(sides[1]), synthetic.shape[1])
        first, second = (held_out[:, side[:count]].max(1) for side in sides)
        drawn = synthetic[:, rng.permutation(synthetic.shape[1])[:count]].max(1)
        tau = np.percentile(first, percentile)
        found.append((tau, (drawn > tau).mean(), (second > tau).mean(), count))
    tau, share, null, count = np.mean(found, axis=0)
    return Memorised(float(tau), float(share), float(null), round(float(count)))


class Search(NamedTuple):
    """Similarities to look for copies in: `(synthetic, training)`, and `(held-out, training)` for comparison;
    at most 1. Of a search that is not `decisive` no match is a clear copy, however large."""

    synthetic: Matrix
    held_out: Matrix
    decisive: bool = True


class Found(NamedTuple):
    """What one search found.

    Attributes:
        threshold: similarity to the nearest training case above which a case is a suspected copy.
        clear: the one above which it is a clear copy, or None where the search is not decisive.
        suspected: which synthetic cases are suspected `(synthetic,)`.
        clearly: which are clear copies.
        expected: share of suspected cases among independent real ones, such as held-out ones are.
        most: share that chance explains: more are found in 5 % of honest cases, by any search of all.
    """

    threshold: float
    clear: float | None
    suspected: NDArray[np.bool_]
    clearly: NDArray[np.bool_]
    expected: float
    most: float


class Copies(NamedTuple):
    """N_copies of Dar et al., beside what chance explains.

    Attributes:
        searches: what each search found.
        suspected: synthetic cases that any search suspects `(synthetic,)`.
        clearly: those that any search finds clearly.
    """

    searches: list[Found]
    suspected: NDArray[np.bool_]
    clearly: NDArray[np.bool_]


def find_copies(
    searches: Sequence[Search], held_out_patients: Sequence[Hashable], *, percentile: float = TAU_PERCENTILE
) -> Copies:
    """Synthetic cases that are more like a training case than real cases of other patients are.

    The threshold of each search is the k-th largest of the held-out patients' best training matches, k chosen
    for that percentile (the largest where there are few). An honest generator's cases are exchangeable with
    those of held-out patients: k of n + 1 exceed the threshold on average, and of N cases a beta-binomial
    number, whatever the distribution of similarities. A match of a decisive search is clear where it is three
    times as near to similarity 1 as the nearest of any held-out case.

    Args:
        searches: at least one; all of the same cases.
        held_out_patients: of the held-out cases.
        percentile: 0 to 100.

    Raises:
        DiffaugError: fewer than two held-out patients.
    """
    index = cluster_index(held_out_patients)
    if index.max() < 1:
        raise DiffaugError("a threshold and its null rate need held-out cases of at least two patients")
    found = [_search(search, index, percentile, LEVEL / len(searches)) for search in searches]
    return Copies(
        found,
        np.any([one.suspected for one in found], axis=0),
        np.any([one.clearly for one in found], axis=0),
    )


def _search(search: Search, patients: NDArray[np.intp], percentile: float, level: float) -> Found:
    best, real = (_matrix(similarities).max(1) for similarities in (search.synthetic, search.held_out))
    by_patient = np.sort([real[patients == patient].max() for patient in range(patients.max() + 1)])
    count = len(by_patient)
    # Less a rounding error, so that 5 % of 20 are one.
    rank = max(1, int((1 - percentile / 100) * (count + 1) + 1e-9))
    threshold = float(by_patient[-rank])
    most = stats.betabinom(len(best), rank, count + 1 - rank).ppf(1 - level)
    clear = float(1 - CLEAR * (1 - by_patient[-1])) if search.decisive else None
    return Found(
        threshold,
        clear,
        best > threshold,
        np.zeros_like(best, dtype=bool) if clear is None else best > clear,
        rank / (count + 1),
        float(most) / len(best),
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
