"""Distances between two sets of feature vectors: how true to life, and how varied, are synthetic cases?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist, pdist

from diffaug.errors import DiffaugError

# More components than this have too few cases each for a covariance of a few hundred cases.
MOST_COMPONENTS = 16
NEIGHBOURS = 5

Features = NDArray[np.float64]


class Components(NamedTuple):
    """Principal components of reference features `(N, D)`.

    Attributes:
        mean: `(D,)`.
        axes: orthonormal rows `(components, D)`, the largest variance first.
        explained: share of the variance that they have together, 0 to 1.
    """

    mean: Features
    axes: Features
    explained: float

    def project(self, features: ArrayLike) -> Features:
        """Coordinates `(N, components)` of features `(N, D)`."""
        projected: Features = (_matrix(features) - self.mean) @ self.axes.T
        return projected


def principal_components(reference: ArrayLike, most: int = MOST_COMPONENTS) -> Components:
    """The first `most` principal components of the reference features, fewer where there are fewer cases."""
    features = _matrix(reference)
    mean = features.mean(0)
    _, spread, axes = np.linalg.svd(features - mean, full_matrices=False)
    count = min(most, len(features) - 1, features.shape[1])
    total = float((spread**2).sum())
    return Components(mean, axes[:count], float((spread[:count] ** 2).sum()) / total if total else 1.0)


def frechet_distance(first: ArrayLike, second: ArrayLike) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of two sets `(N, D)`.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)` (Dowson and Landau 1982).
    """
    a, b = _matrix(first), _matrix(second)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    crossed = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(max(0.0, shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * crossed))


def median_distance(reference: ArrayLike) -> float:
    """Median Euclidean distance between two cases of `(N, D)`: the bandwidth of `mmd`."""
    return float(np.median(pdist(_matrix(reference))))


def mmd(first: ArrayLike, second: ArrayLike, bandwidth: float) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012) with a Gaussian kernel
    `exp(-d^2 / (2 bandwidth^2))`; about 0, of either sign, for two sets `(N, D)` of one distribution."""
    a, b = _matrix(first), _matrix(second)
    if bandwidth <= 0:
        raise DiffaugError(f"the bandwidth of a kernel must be above 0, got {bandwidth}")

    def kernel(x: Features, y: Features) -> Features:
        similar: Features = np.exp(-0.5 * cdist(x, y, "sqeuclidean") / bandwidth**2)
        return similar

    def within(x: Features) -> float:
        return float((kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


class Manifold(NamedTuple):
    """Overlap of two distributions; each is 1 where both are one.

    Attributes:
        precision: share of synthetic cases within a real neighbourhood (Kynkaanniemi et al. 2019).
        recall: share of real cases within a synthetic neighbourhood.
        density: real neighbourhoods that a synthetic case lies in, over k (Naeem et al. 2020); may exceed 1.
        coverage: share of real cases with a synthetic one within their neighbourhood.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_overlap(real: ArrayLike, synthetic: ArrayLike, neighbours: int = NEIGHBOURS) -> Manifold:
    """Precision, recall, density and coverage of two sets `(N, D)`; a case's neighbourhood is the ball that
    reaches its `neighbours`-th nearest fellow."""
    x, y = _matrix(real), _matrix(synthetic)
    for name, features in (("real", x), ("synthetic", y)):
        if len(features) <= neighbours:
            raise DiffaugError(f"{len(features)} {name} cases have no {neighbours} neighbours each")
    reach_x, reach_y = (np.partition(cdist(f, f), neighbours, axis=1)[:, neighbours] for f in (x, y))
    distances = cdist(x, y)
    in_real, in_synthetic = distances <= reach_x[:, None], distances <= reach_y[None, :]
    return Manifold(
        precision=float(in_real.any(0).mean()),
        recall=float(in_synthetic.any(1).mean()),
        density=float(in_real.sum(0).mean() / neighbours),
        coverage=float((distances.min(1) <= reach_x).mean()),
    )


def _matrix(features: ArrayLike) -> Features:
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise DiffaugError(f"features must be a matrix of at least 2 cases, got the shape {matrix.shape}")
    return matrix
