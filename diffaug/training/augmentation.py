"""Augmentation that respects anatomy: small rigid moves and scalings, mild gamma; mirrors only where the
user says so."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from diffaug.generators.grid import Outside


class AugmentationConfig(BaseModel):
    """Ranges of the augmentation; every draw is uniform in plus or minus the value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotation: float = Field(default=8.0, ge=0, description="degrees about each axis")
    scaling: float = Field(default=0.05, ge=0, lt=0.5, description="relative, isotropic")
    stretching: float = Field(
        default=0.02, ge=0, lt=0.5, description="relative, per axis, on top of the scaling"
    )
    shift: float = Field(default=2.0, ge=0, description="grid voxels along each axis")
    gamma: float = Field(default=0.1, ge=0, description="natural logarithm of the exponent")
    mirror_axes: tuple[int, ...] = Field(
        default=(), description="grid axes that are mirrored half of the time"
    )

    @property
    def margin(self) -> int:
        """Voxels of context beyond the grid that keep most of the moved volume real rather than mirrored."""
        return 4

    def reach(self, shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int, int]:
        """Voxels beyond a grid, on each axis, that the largest moves bring into it."""
        half = (np.array(shape) - 1) / 2
        corners = np.array(list(product((-1, 1), repeat=3))) * half * np.exp(self.scaling + self.stretching)
        moved = [
            abs(corners @ _in_voxels(rotation_matrix(np.array(signs) * self.rotation), spacing).T).max(axis=0)
            for signs in product((-1, 1), repeat=3)
        ]
        i, j, k = np.ceil(np.max(moved, axis=0) - half + self.shift).astype(int).tolist()
        return i, j, k


def rotation_matrix(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation about the first, second and third axis in turn."""
    a, b, c = np.deg2rad(degrees)
    first = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    second = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    third = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return third @ second @ first


def _in_voxels(matrix: NDArray[np.float64], spacing: Sequence[float]) -> NDArray[np.float64]:
    """A rotation in mm, of voxel indices: by voxels it would shear a body whose voxels are no cubes."""
    sizes = np.array(spacing)
    return matrix * sizes / sizes[:, None]


class Augmenter:
    """Draws moved and recoloured grid volumes from canvases (grid plus margin, network units).

    Images are interpolated by cubic splines: linear interpolation would blur two thirds of the training
    volumes and the generator would learn that blur. So are the shares of each label, of which the largest
    wins: linear ones round corners off and lose 0.9 % of a hippocampus, cubic ones 0.2 %.

    Args:
        outside: what lies beyond a canvas: its mirror image, or background (-1).
    """

    def __init__(
        self,
        config: AugmentationConfig,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
        outside: Outside = "mirror",
        threads: int = 2,
    ) -> None:
        self.config = config
        self.shape = shape
        self.spacing = spacing
        self.mode = "mirror" if outside == "mirror" else "constant"
        self.pool = ThreadPoolExecutor(threads)

    def draw(
        self, image: NDArray[np.float32], label: NDArray[np.uint8] | None, seed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """One augmented case: image `(C, *canvas)` in [-clip, clip], label indices `(*canvas)`; to the
        grid's shape."""
        config, rng = self.config, np.random.default_rng(seed)
        matrix = _in_voxels(rotation_matrix(rng.uniform(-1, 1, 3) * config.rotation), self.spacing)
        scales = np.exp(rng.uniform(-1, 1) * config.scaling + rng.uniform(-1, 1, 3) * config.stretching)
        mirrors = np.array(
            [-1.0 if a in config.mirror_axes and rng.random() < 0.5 else 1.0 for a in range(3)]
        )
        matrix = matrix @ np.diag(scales * mirrors)
        centre = (np.array(image.shape[1:]) - 1) / 2 + rng.uniform(-1, 1, 3) * config.shift
        offset = centre - matrix @ ((np.array(self.shape) - 1) / 2)
        gamma = np.exp(rng.uniform(-1, 1) * config.gamma)

        moved = np.stack(
            [
                ndimage.affine_transform(c, matrix, offset, self.shape, order=3, mode=self.mode, cval=-1.0)
                for c in image
            ]
        )
        # Splines overshoot.
        lowest = image.min() if self.mode == "mirror" else min(image.min(), -1.0)
        moved = np.clip(moved, lowest, image.max())
        base = np.clip((moved + 1) / 2, 0, None) ** gamma * 2 - 1
        moved = np.where(moved > -1, base, moved).astype(np.float32)
        if label is None:
            return moved, None
        shares = [
            ndimage.affine_transform(
                (label == v).astype(np.float32), matrix, offset, self.shape, order=3, mode="constant"
            )
            for v in range(1, int(label.max()) + 1)
        ]
        background = 1 - np.sum(shares, axis=0) if shares else np.ones(self.shape, np.float32)
        return moved, np.argmax([background, *shares], axis=0).astype(np.uint8)

    def draw_batch(
        self, cases: list[tuple[NDArray[np.float32], NDArray[np.uint8] | None]], seeds: list[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Augment several cases at once; a case without a label gets background everywhere."""
        drawn = list(self.pool.map(lambda case, seed: self.draw(case[0], case[1], seed), cases, seeds))
        images = np.stack([image for image, _ in drawn])
        empty = np.zeros(self.shape, np.uint8)
        labels = np.stack([empty if label is None else label for _, label in drawn])
        return images, labels
