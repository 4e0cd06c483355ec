"""Intervals and comparisons for clustered cases: two scans of one patient are not two observations."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from diffaug.errors import DiffaugError


class Interval(NamedTuple):
    """A figure and the interval in which it lies with the stated confidence."""

    value: float
    low: float
    high: float


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Sum of `numerators` over sum of `denominators`, with a bootstrap interval that draws whole clusters.

    Args:
        numerators: one number per case.
        denominators: one number per case, paired with the numerators.
        clusters: the cluster (patient) of each case; at least two different ones.
        level: confidence, between 0 and 1.
        resamples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        The ratio and its bias-corrected and accelerated interval (Efron 1987).

    Raises:
        DiffaugError: for lengths that differ or fewer than two clusters.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    index = cluster_index(clusters)
    if not top.shape == bottom.shape == index.shape:
        raise DiffaugError(
            f"{top.shape} numerators, {bottom.shape} denominators, {index.shape} clusters: one each"
        )
    if index.max() < 1:
        raise DiffaugError("an interval over clusters needs at least two of them")
    tops, bottoms = np.bincount(index, top), np.bincount(index, bottom)
    value = float(tops.sum() / bottoms.sum())
    if np.allclose(tops, value * bottoms, rtol=1e-9, atol=0):
        return Interval(value, value, value)
    interval = stats.bootstrap(
        (tops, bottoms),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        confidence_level=level,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(interval.low), float(interval.high))


def mean_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Mean over cases, with a bootstrap interval that draws whole clusters; see `ratio_interval`."""
    values = np.asarray(values, float)
    return ratio_interval(values, np.ones_like(values), clusters, level=level, resamples=resamples, seed=seed)


def ks_statistic(first: ArrayLike, second: ArrayLike) -> float:
    """Largest distance between the distribution functions of two samples, 0 to 1 (Kolmogorov and Smirnov)."""
    return float(
        stats.ks_2samp(np.asarray(first, float), np.asarray(second, float), method="asymp").statistic
    )


def ks_null(
    real: ArrayLike,
    clusters: Sequence[Hashable],
    count: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """What `ks_statistic` of `count` samples against the real cases would be, had both one distribution.

    Both sides are drawn from the real cases: the real side by whole clusters, the other side case by case.

    Args:
        real: one number per real case.
        clusters: the cluster (patient) of each case.
        count: number of samples on the other side.
        level: share of the null distribution inside the interval, between 0 and 1.
        resamples: draws from the null distribution.
        seed: of the draws.

    Returns:
        The median and the interval of the null distribution.
    """
    values, index = np.asarray(real, float), cluster_index(clusters)
    members = [values[index == cluster] for cluster in range(index.max() + 1)]
    rng = np.random.default_rng(seed)
    null = [
        ks_statistic(
            np.concatenate([members[cluster] for cluster in rng.integers(len(members), size=len(members))]),
            rng.choice(values, count),
        )
        for _ in range(resamples)
    ]
    low, middle, high = np.quantile(null, [0.5 - level / 2, 0.5, 0.5 + level / 2])
    return Interval(float(middle), float(low), float(high))


def nearer_share(to_first: ArrayLike, to_second: ArrayLike) -> float:
    """Share of queries whose nearest neighbour lies in the first of two reference sets of equal size.

    Args:
        to_first: distances `(queries, first set)`.
        to_second: distances `(queries, second set)`.

    Returns:
        0 to 1; 0.5 where the queries prefer neither set. A tie counts as half.
    """
    first, second = np.asarray(to_first).min(1), np.asarray(to_second).min(1)
    return float(((first < second) + 0.5 * (first == second)).mean())


def nearer_share_interval(
    to_first: ArrayLike,
    to_second: ArrayLike,
    first_clusters: Sequence[Hashable],
    second_clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`nearer_share` with a percentile bootstrap interval over the clusters of both sets and the queries.

    Args:
        to_first: distances `(queries, first set)`.
        to_second: distances `(queries, second set)`.
        first_clusters: the cluster (patient) of each member of the first set.
        second_clusters: the cluster of each member of the second set.
        level: confidence, between 0 and 1.
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    sides = [
        (np.asarray(distances, float), cluster_index(clusters))
        for distances, clusters in ((to_first, first_clusters), (to_second, second_clusters))
    ]
    queries = len(sides[0][0])
    shares = []
    for _ in range(resamples):
        rows = rng.integers(queries, size=queries)
        drawn = []
        for distances, index in sides:
            clusters = index.max() + 1
            drawn.append(distances[:, np.isin(index, rng.integers(clusters, size=clusters))][rows])
        shares.append(nearer_share(*drawn))
    low, high = np.quantile(shares, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(nearer_share(to_first, to_second), float(low), float(high))


def cluster_index(clusters: Sequence[Hashable]) -> NDArray[np.intp]:
    """Clusters numbered from 0 in order of appearance, one number per case."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.intp)


def half(items: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """A random half, rounded down, of items that count as one each.

    The spread of a figure over such halves is that of the figure itself over new collections of as many items
    (delete-half jackknife, Shao and Wu 1989). Unlike the bootstrap it takes nobody twice, which matters
    wherever a case is compared with its neighbours.
    """
    return rng.permutation(items)[: len(items) // 2]


def around(value: float, halves: ArrayLike, level: float = 0.95) -> Interval:
    """A figure with the normal interval that the standard deviation of its half-samples gives."""
    reach = float(stats.norm.ppf(0.5 + level / 2) * np.std(np.asarray(halves, float), ddof=1))
    return Interval(value, value - reach, value + reach)


class Grouped(NamedTuple):
    """Sums and numbers of known values, `(seeds, clusters)`."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]

    def means(self, seeds: NDArray[np.float64], clusters: NDArray[np.float64]) -> NDArray[np.float64]:
        """Means `(resamples,)` where seeds and clusters count so often, `(resamples, n)` each."""
        top = ((seeds @ self.sums) * clusters).sum(1)
        return top / ((seeds @ self.counts) * clusters).sum(1)


def grouped(values: ArrayLike, clusters: Sequence[Hashable]) -> Grouped:
    """Group figures `(seeds, cases)`, NaN where there is none, by the cluster of the cases."""
    values = np.asarray(values, float)
    index = cluster_index(clusters)
    member = (index[:, None] == np.arange(index.max() + 1)).astype(float)
    return Grouped(np.nan_to_num(values) @ member, np.isfinite(values) @ member)


def hierarchical_interval(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Mean over seeds and cases, with an interval over draws of seeds and of clusters.

    The interval has the shape that the bootstrap gives it, and the width that few seeds ask for: percentiles
    of three to five seeds are too narrow by far. That width is the standard error of two-way clustered means
    (Cameron, Gelbach and Miller 2011) times t with Satterthwaite's degrees of freedom.

    Args:
        values: `(seeds, cases)`, NaN where there is none. Of a single seed, the interval is over clusters.
        clusters: the cluster (patient) of each case.
    """
    groups = grouped(values, clusters)
    value = float(groups.sums.sum() / groups.counts.sum())
    rng = np.random.default_rng(seed)
    seeds, patients = (_draws(rng, count, resamples) for count in groups.sums.shape)
    with np.errstate(invalid="ignore"):
        means = groups.means(seeds, patients)
    low, high = np.nanquantile(means, [0.5 - level / 2, 0.5 + level / 2])
    if high <= low:
        return Interval(value, value, value)
    error, freedom = _two_way_error(groups, value)
    widening = 2 * stats.t.ppf(0.5 + level / 2, freedom) * error / (high - low)
    return Interval(value, float(value - widening * (value - low)), float(value + widening * (high - value)))


def _two_way_error(groups: Grouped, value: float) -> tuple[float, float]:
    """Standard error of a mean over seeds and clusters, and its degrees of freedom."""
    parts = (groups.sums - value * groups.counts) / groups.counts.sum()
    variances, freedoms = [], []
    for axis in (0, 1):
        count = parts.shape[axis]
        if count > 1:
            variances.append(count / (count - 1) * float((parts.sum(1 - axis) ** 2).sum()))
            freedoms.append(count - 1)
    shared = float((parts**2).sum()) if len(variances) == 2 else 0.0
    total = max(sum(variances) - shared, *variances)
    freedom = sum(variances) ** 2 / sum(v**2 / n for v, n in zip(variances, freedoms, strict=True))
    return total**0.5, float(freedom)


def gap_interval(
    gains: ArrayLike,
    gaps: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Mean gain as a share of the mean gap, with Fieller's interval (1954): all shares r for which the
    `hierarchical_interval` of gain - r gap holds 0.

    So it agrees with the interval of the gain on whether there is one, and allows for gain and gap having the
    same comparator.

    Args:
        gains: `(seeds, cases)`, what an arm has more than its comparator.
        gaps: of the same seeds and cases, what the ceiling has more than it.
        clusters: the cluster (patient) of each case.

    Raises:
        DiffaugError: the interval of the gap does not lie above 0, and no share of it can be told.
    """
    gain, gap = np.asarray(gains, float), np.asarray(gaps, float)

    def beyond(share: float) -> Interval:
        return hierarchical_interval(
            gain - share * gap, clusters, level=level, resamples=resamples, seed=seed
        )

    if hierarchical_interval(gap, clusters, level=level, resamples=resamples, seed=seed).low <= 0:
        raise DiffaugError("the ceiling is not above the comparator: no share of the gap can be told")
    value = float(np.nanmean(gain) / np.nanmean(gap))
    low, high = value - 1, value + 1
    while beyond(low).low <= 0:
        low -= value - low
    while beyond(high).high >= 0:
        high += high - value
    return Interval(
        value,
        float(optimize.brentq(lambda share: beyond(share).low, low, value, xtol=1e-4)),
        float(optimize.brentq(lambda share: beyond(share).high, value, high, xtol=1e-4)),
    )


def signed_rank(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """p of Wilcoxon's signed-rank test, two-sided, on the means over seeds and cases of each cluster."""
    groups = grouped(values, clusters)
    means = groups.sums.sum(0) / groups.counts.sum(0)
    means = means[np.isfinite(means)]
    return 1.0 if not means.any() else float(stats.wilcoxon(means).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number (Holm 1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def _draws(rng: np.random.Generator, count: int, resamples: int) -> NDArray[np.float64]:
    """How often each of `count` things is drawn in `count` draws with replacement, `(resamples, count)`."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)
