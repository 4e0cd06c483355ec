"""Fidelity and diversity: synthetic cases beside training cases, both compared with held-out ones.

Every figure is a mean over draws of equally many synthetic, training and held-out cases, since distances
between small sets are larger than between large ones; training and held-out cases are drawn by patient.
Intervals are those of half-samples (`diffaug.evaluation.statistics.half`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffaug.audit.volumes import CaseSet, Sets
from diffaug.evaluation.distributions import (
    MOST_COMPONENTS,
    NEIGHBOURS,
    frechet_distance,
    manifold_overlap,
    median_distance,
    mmd,
    principal_components,
)
from diffaug.evaluation.statistics import Interval, around, cluster_index, half, ks_statistic
from diffaug.evaluation.structure import ms_ssim
from diffaug.progress import Progress

DRAWS, HALF_SAMPLES = 50, 100
# Cases of a draw, at most: times and memory grow with their square.
MOST_CASES = 500
# Figures that are shares, as are Kolmogorov and Smirnov's distances.
BOUNDED = ("precision", "recall", "coverage")
# Cases of a draw for each principal component, and for each neighbour that a neighbourhood reaches to.
CASES_PER_COMPONENT = CASES_PER_NEIGHBOUR = 4
# Pairs of volumes whose similarity is measured, at most.
MOST_PAIRS = 60
# Windows of the structural similarity, and the smallest side that its scales fit into.
KERNEL, SCALES = 7, 3

Rows = NDArray[np.intp]
# Figures of synthetic against held-out rows, by name.
Compare = Callable[[Rows, Rows], Mapping[str, float]]


class Comparison(NamedTuple):
    """One figure of synthetic cases against held-out ones, and of training cases against the same."""

    synthetic: Interval
    real: Interval


def compare_features(
    synthetic: NDArray[np.float64],
    training: NDArray[np.float64],
    held_out: NDArray[np.float64],
    sets: Sets,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Frechet distance, MMD, precision, recall, density and coverage in at most 16 principal components.

    The components are those of a random half of the training patients, whose features `(N, D)` they fit
    better than any others; the training cases that are compared are of the other half.
    """
    index = cluster_index(sets.training.patients)
    basis = half(np.unique(index), np.random.default_rng(seed))
    fewest = min(len(set(s.patients)) for s in (sets.synthetic, sets.held_out))
    fewest = min(fewest, len(set(sets.training.patients)) - len(basis))
    most = min(MOST_COMPONENTS, max(2, fewest // CASES_PER_COMPONENT))
    components = principal_components(training[np.isin(index, basis)], most)
    values = {
        "synthetic": components.project(synthetic),
        "training": components.project(training),
        "held_out": components.project(held_out),
    }
    # Distances in standard deviations of the training cases' leading component.
    scale = float(values["training"][:, 0].std()) or 1.0
    values = {name: v / scale for name, v in values.items()}
    bandwidth = median_distance(values["training"]) or 1.0

    def figures(queries: NDArray[np.float64], real: NDArray[np.float64]) -> dict[str, float]:
        neighbours = min(NEIGHBOURS, max(1, min(len(real), len(queries)) // CASES_PER_NEIGHBOUR))
        overlap = manifold_overlap(real, queries, neighbours)
        return {
            "frechet_distance": frechet_distance(queries, real),
            "mmd": mmd(queries, real, bandwidth),
            **overlap._asdict(),
        }

    return _compare(
        sets,
        lambda rows, real: figures(values["synthetic"][rows], values["held_out"][real]),
        lambda rows, real: figures(values["training"][rows], values["held_out"][real]),
        seed,
        left_out=basis,
    )


def compare_measures(sets: Sets, labels: Sequence[str], seed: int = 0) -> dict[str, Comparison]:
    """Distances of the distributions of intensities, slice consistency and label volumes.

    `intensities` is the Wasserstein distance, in standard deviations of a volume, of the mean quantile
    functions of all channels; `roughness` the ratio of the median change between neighbouring slices, 1 minus
    their correlation; the others are Kolmogorov and Smirnov's distances.
    """

    def figures(queries: CaseSet) -> Compare:
        def of(rows: Rows, real: Rows) -> dict[str, float]:
            difference = queries.intensities[rows].mean(0) - sets.held_out.intensities[real].mean(0)
            found = {"intensities": float(np.abs(difference).mean())}
            change, expected = (
                np.median(1 - c) for c in (queries.consistency[rows], sets.held_out.consistency[real])
            )
            found["roughness"] = float(change / max(expected, 1e-9))
            for axis, name in enumerate("ijk"):
                found[f"slice_consistency_{name}"] = ks_statistic(
                    queries.consistency[rows, axis], sets.held_out.consistency[real, axis]
                )
            for label in labels:
                volumes = [
                    v[np.isfinite(v)]
                    for v in (queries.label_volumes[label][rows], sets.held_out.label_volumes[label][real])
                ]
                found[f"volume_{label}"] = ks_statistic(*volumes) if all(map(len, volumes)) else float("nan")
            return found

        return of

    return _compare(sets, figures(sets.synthetic), figures(sets.training), seed)


def _compare(
    sets: Sets, synthetic: Compare, real: Compare, seed: int, left_out: Rows | None = None
) -> dict[str, Comparison]:
    """Means over draws, and half-samples for their intervals; see the module. Training patients `left_out`
    are not drawn."""
    rng = np.random.default_rng(seed)
    indices = [cluster_index(s.patients) for s in (sets.synthetic, sets.training, sets.held_out)]
    everyone = [np.unique(index) for index in indices]
    if left_out is not None:
        everyone[1] = np.setdiff1d(everyone[1], left_out)

    def draw(patients: Sequence[Rows]) -> tuple[Mapping[str, float], Mapping[str, float]]:
        rows = [
            rng.permutation(np.flatnonzero(np.isin(index, some)))
            for index, some in zip(indices, patients, strict=True)
        ]
        count = min(MOST_CASES, *map(len, rows))
        s, t, h = (r[:count] for r in rows)
        return synthetic(s, h), real(t, h)

    def spread(patients: Sequence[Rows]) -> list[Rows]:
        """Equally many patients of all sets, by chance."""
        count = min(map(len, patients))
        return [rng.permutation(p)[:count] for p in patients]

    whole = [draw(spread(everyone)) for _ in range(DRAWS)]
    halves = [draw(spread([half(p, rng) for p in everyone])) for _ in range(HALF_SAMPLES)]

    def interval(name: str, side: int) -> Interval:
        # A draw without a single labelled case has no volumes to compare.
        values, spreads = (
            np.array([v for d in draws if np.isfinite(v := d[side][name])]) for draws in (whole, halves)
        )
        value, low, high = around(float(values.mean()), spreads)
        if name in BOUNDED or name.startswith(("slice_consistency", "volume_")):
            low, high = max(0.0, low), min(1.0, high)
        return Interval(value, low, high)

    return {name: Comparison(interval(name, 0), interval(name, 1)) for name in whole[0][0]}


class Similarity(NamedTuple):
    """Mean MS-SSIM of pairs of different patients, with its interval over pairs: the smaller, the more
    varied.

    Attributes:
        synthetic: pairs of synthetic cases.
        real: pairs of training cases.
        scales: of the similarity.
        kernel: its window's voxels.
        pairs: number of pairs of each kind.
    """

    synthetic: Interval
    real: Interval
    scales: int
    kernel: int
    pairs: int


def compare_pairs(sets: Sets, progress: Progress, seed: int = 0) -> Similarity:
    """MS-SSIM within the synthetic and within the training cases; pairs share no case."""
    side = min(sets.synthetic.images.shape[2:])
    scales = next((n for n in range(SCALES, 1, -1) if KERNEL * 2 ** (n - 1) <= side), 1)
    kernel = min(KERNEL, side - 1 + side % 2)
    rng = np.random.default_rng(seed)
    chosen = []
    for cases in (sets.synthetic, sets.training):
        index = cluster_index(cases.patients)
        # One case of each patient, so that no pair shows one patient twice.
        singles = [int(rng.choice(np.flatnonzero(index == patient))) for patient in np.unique(index)]
        chosen.append(rng.permutation(singles))
    count = min(MOST_PAIRS, *(len(rows) // 2 for rows in chosen))
    found = []
    with progress.task("similarity of pairs", total=2 * count) as task:
        for cases, rows in zip((sets.synthetic, sets.training), chosen, strict=True):
            values = []
            for a, b in rows[: 2 * count].reshape(-1, 2):
                first, second = cases.batch([a]), cases.batch([b])
                values.append(
                    float(
                        ms_ssim(first, second, data_range=_range(first, second), scales=scales, kernel=kernel)
                    )
                )
                task.advance()
            error = 1.96 * float(np.std(values, ddof=1)) / np.sqrt(count) if count > 1 else float("nan")
            mean = float(np.mean(values))
            found.append(Interval(mean, mean - error, mean + error))
    return Similarity(found[0], found[1], scales, kernel, count)


def _range(first: torch.Tensor, second: torch.Tensor) -> float:
    """Difference of the largest and smallest value of a pair."""
    both = torch.stack([first, second])
    return float(both.max() - both.min()) or 1.0
