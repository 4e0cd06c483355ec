"""Do synthetic cases lie nearer to the training cases than to equal cases that were held out?"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffaug.errors import DiffaugError
from diffaug.evaluation.statistics import Interval, around, cluster_index, nearer_share

# Random training subsets that a share is averaged over, in the estimate and after each exchange of patients.
SUBSETS, SUBSETS_OF_AN_EXCHANGE = 200, 16
EXCHANGES = 500


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
    exchanges: int = EXCHANGES,
    seed: int = 0,
) -> Balance:
    """The balance test, with an interval over patients.

    The interval is as wide as the share varies when patients are exchanged between the two sides at random,
    as they could have been before the generator was trained. So it holds 0.5 where a permutation test finds
    nothing. Of 120 simulated audits with 92 training and 39 held-out patients it covered the truth in 95 %
    without copies, in 92 to 98 % with 30 or 80 % of them; one of random halves (Shao and Wu 1989) was a
    quarter wider and covered it in 96 to 100 %.

    Args:
        to_training: distances `(queries, training cases)`.
        to_held_out: distances `(queries, held-out cases)`.
        training_patients: of the training cases.
        held_out_patients: of the held-out cases.
        level: confidence of the interval, between 0 and 1.
        exchanges: number of random exchanges.
        seed: of the draws.

    Raises:
        DiffaugError: fewer than four patients on a side.
    """
    training, held_out = (
        _checked(distances, patients)
        for distances, patients in ((to_training, training_patients), (to_held_out, held_out_patients))
    )
    if len(training.distances) != len(held_out.distances):
        raise DiffaugError(
            f"distances of {len(training.distances)} queries to training and of {len(held_out.distances)} to "
            "held-out cases: they must be of the same queries"
        )
    members, others = training.patients, held_out.patients
    if min(members, others) < 4:
        raise DiffaugError(
            f"{members} training and {others} held-out patients: a balance with an interval needs at least "
            "four of each"
        )
    rng = np.random.default_rng(seed)
    distances = np.concatenate([training.distances, held_out.distances], axis=1)
    patients = np.concatenate([training.numbers, members + held_out.numbers])

    def share(order: NDArray[np.intp], subsets: int) -> tuple[float, float]:
        """Mean share, and cases on each side, over random subsets of the larger side; the first patients of
        the order are the training patients."""
        count = min(members, others)
        found, cases = [], []
        for _ in range(subsets):
            a, b = (
                rng.permutation(np.flatnonzero(np.isin(patients, rng.permutation(side)[:count])))
                for side in (order[:members], order[members:])
            )
            few = min(len(a), len(b))
            found.append(nearer_share(distances[:, a[:few]], distances[:, b[:few]]))
            cases.append(few)
        return float(np.mean(found)), float(np.mean(cases))

    everyone = np.arange(members + others)
    value, cases = share(everyone, SUBSETS)
    exchanged = [share(rng.permutation(everyone), SUBSETS_OF_AN_EXCHANGE)[0] for _ in range(exchanges)]
    _, low, high = around(value, exchanged, level)
    return Balance(Interval(value, max(0.0, low), min(1.0, high)), cases)


class _Side(NamedTuple):
    """Distances of all queries to one set, and the patients of its cases, numbered from 0."""

    distances: NDArray[np.float64]
    numbers: NDArray[np.intp]
    patients: int


def _checked(distances: ArrayLike, patients: Sequence[Hashable]) -> _Side:
    matrix, numbers = np.asarray(distances, dtype=np.float64), cluster_index(patients)
    if matrix.ndim != 2 or matrix.shape[1] != len(numbers) or not len(numbers):
        raise DiffaugError(f"distances {matrix.shape} do not fit {len(numbers)} patients")
    return _Side(matrix, numbers, int(numbers.max()) + 1)
