"""Do synthetic cases lie nearer to the training cases than to equal cases that were held out?"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffaug.errors import DiffaugError
from diffaug.evaluation.statistics import Interval, around, cluster_index, half, nearer_share

# Random training subsets that a share is averaged over, in the estimate and in each half-sample.
SUBSETS, SUBSETS_OF_A_HALF = 200, 8
HALF_SAMPLES = 500


class Balance(NamedTuple):
    """Share of the queries nearer to training cases than to as many held-out ones: 0.5 where a generator has
    memorised nothing.

    Where it makes nothing but copies it is 0.5 + m / 2n, for m held-out cases and n training cases: the
    subset holds the original of that many.

    Attributes:
        share: mean over random training subsets of the held-out set's size, with its interval over patients.
        cases: cases on each side, on average.
    """

    share: Interval
    cases: float


def balance(
    to_training: ArrayLike,
    to_held_out: ArrayLike,
    training_patients: Sequence[Hashable],
    held_out_patients: Sequence[Hashable],
    *,
    level: float = 0.95,
    half_samples: int = HALF_SAMPLES,
    seed: int = 0,
) -> Balance:
    """The balance test, with an interval over patients and queries.

    The interval comes from random halves of the training patients, the held-out patients and the queries
    (`diffaug.evaluation.statistics.half`).

    Args:
        to_training: distances `(queries, training cases)`.
        to_held_out: distances `(queries, held-out cases)`.
        training_patients: of the training cases.
        held_out_patients: of the held-out cases.
        level: confidence of the interval, between 0 and 1.
        half_samples: number of random halves.
        seed: of the draws.

    Raises:
        DiffaugError: fewer than four patients on a side.
    """
    training, held_out = _Side(to_training, training_patients), _Side(to_held_out, held_out_patients)
    if len(training.distances) != len(held_out.distances):
        raise DiffaugError(
            f"distances of {len(training.distances)} queries to training and of {len(held_out.distances)} to "
            "held-out cases: they must be of the same queries"
        )
    if min(len(training.patients), len(held_out.patients)) < 4:
        raise DiffaugError(
            f"{len(training.patients)} training and {len(held_out.patients)} held-out patients: a balance "
            "with an interval needs at least four of each"
        )
    rng = np.random.default_rng(seed)
    every = np.arange(len(training.distances))

    def share(
        first: NDArray[np.intp], second: NDArray[np.intp], queries: NDArray[np.intp], subsets: int
    ) -> tuple[float, float]:
        """Mean share, and cases on each side, over random subsets of the larger side."""
        count = min(len(first), len(second))
        found, cases = [], []
        for _ in range(subsets):
            a, b = (s.cases(rng.permutation(p)[:count]) for s, p in ((training, first), (held_out, second)))
            few = min(len(a), len(b))
            a, b = rng.permutation(a)[:few], rng.permutation(b)[:few]
            found.append(
                nearer_share(training.distances[np.ix_(queries, a)], held_out.distances[np.ix_(queries, b)])
            )
            cases.append(few)
        return float(np.mean(found)), float(np.mean(cases))

    value, cases = share(training.patients, held_out.patients, every, SUBSETS)
    halves = []
    for _ in range(half_samples):
        first, second, queries = (half(items, rng) for items in (training.patients, held_out.patients, every))
        halves.append(share(first, second, queries, SUBSETS_OF_A_HALF)[0])
    _, low, high = around(value, halves, level)
    return Balance(Interval(value, max(0.0, low), min(1.0, high)), cases)


class _Side:
    """Distances of all queries to one set, and its cases by patient."""

    def __init__(self, distances: ArrayLike, patients: Sequence[Hashable]) -> None:
        self.distances = np.asarray(distances, dtype=np.float64)
        self._index = cluster_index(patients)
        if self.distances.ndim != 2 or self.distances.shape[1] != len(self._index):
            raise DiffaugError(f"distances {self.distances.shape} do not fit {len(self._index)} patients")
        self.patients = np.unique(self._index)

    def cases(self, patients: NDArray[np.intp]) -> NDArray[np.intp]:
        """The cases of some patients."""
        return np.flatnonzero(np.isin(self._index, patients))
