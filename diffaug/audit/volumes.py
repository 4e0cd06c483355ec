"""The cases of an audit on one grid: standardised images on disk, and a row of measures for each."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from diffaug.datasets.manifest import MANIFEST, read_manifest
from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles, LoadedCase, load_case, ras_geometry
from diffaug.errors import DatasetError, DiffaugError
from diffaug.evaluation.segmenter import standardise
from diffaug.files import atomic_paths, read_json, sha256_file
from diffaug.generators.grid import Grid, place
from diffaug.progress import Progress

ORIENTATION = ("R", "A", "S")
# Sides of the grid are multiples of this, as the encoder and the segmenter halve them three times.
MULTIPLE = 8
# A grid of more voxels is made coarser: memory and time of an audit then depend on the number of cases alone.
MOST_VOXELS = 64**3
# Levels of a case's intensity distribution, in standard deviations of the volume.
LEVELS = np.linspace(0, 1, 33)
# Version of what is kept on disk.
FORMAT = 1


@dataclass(frozen=True)
class CaseSet:
    """Cases on the audit's grid.

    Attributes:
        names: of the cases.
        patients: whom each shows.
        images: standardised volumes `(N, C, *grid.shape)`, float16, mapped from disk.
        intensities: quantiles of the standardised volumes at `LEVELS`, `(N, C, 33)`.
        consistency: mean correlation of neighbouring slices along each axis of the grid, `(N, 3)`.
        label_volumes: label's name -> volumes in mm^3 `(N,)`, NaN for a case without a label map.
        files: SHA-256 of all files of the cases, names of labels and the grid: equal sets have equal ones.
    """

    names: tuple[str, ...]
    patients: tuple[str, ...]
    images: NDArray[np.float16]
    intensities: NDArray[np.float64]
    consistency: NDArray[np.float64]
    label_volumes: dict[str, NDArray[np.float64]]
    files: str

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, rows: Sequence[int]) -> torch.Tensor:
        """Standardised volumes `(B, C, I, J, K)`, float32."""
        return torch.from_numpy(np.asarray(self.images[list(rows)], dtype=np.float32))


class Sets(NamedTuple):
    """The three sets of an audit."""

    synthetic: CaseSet
    training: CaseSet
    held_out: CaseSet


def audit_grid(synthetic: Dataset) -> Grid:
    """The grid on which cases are compared: that of the generator where a manifest names it, else of the
    median synthetic volume; sides of multiples of 8, coarser where it would have too many voxels."""
    manifest = synthetic.root / MANIFEST
    if manifest.is_file():
        own = read_manifest(manifest).settings.generator.grid
        orientation, spacing, shape, outside = own.orientation, own.spacing, own.shape, own.outside
    else:
        orientation, outside = ORIENTATION, "mirror"
        spacing, shape = _median_geometry([case.images[0] for case in synthetic.cases])
    factor = max(1.0, (np.prod(shape) / MOST_VOXELS) ** (1 / 3))
    while True:
        i, j, k = (MULTIPLE * max(1, ceil(n / factor / MULTIPLE)) for n in shape)
        # Sides are rounded up, those of flat volumes by much.
        if factor == 1 or i * j * k <= 1.2 * MOST_VOXELS:
            a, b, c = (float(s * factor) for s in spacing)
            return Grid(orientation, (a, b, c), (i, j, k), outside)
        factor *= 1.05


def _median_geometry(
    files: Sequence[Path],
) -> tuple[tuple[float, float, float], tuple[int, int, int]]:
    """Median spacing (mm) and shape of volumes in RAS order, from their headers."""
    spacings, shapes = zip(*map(ras_geometry, files), strict=True)
    a, b, c = np.median(spacings, axis=0).tolist()
    i, j, k = np.median(shapes, axis=0).round().astype(int).tolist()
    return (a, b, c), (i, j, k)


def collect(
    dataset: Dataset, cases: Sequence[CaseFiles], grid: Grid, folder: Path, progress: Progress, title: str
) -> CaseSet:
    """Bring cases onto the grid, a case at a time, and keep them in `folder`; what is there is used again.

    The cases of a set are in the order of their names, whatever order they are given in.

    Raises:
        DatasetError: a file cannot be read.
        DiffaugError: a volume cannot be placed on the grid; names the file.
    """
    cases = sorted(cases, key=lambda case: case.name)
    digest = _digest(dataset, cases, grid)
    files = [folder / f"{digest[:16]}.npy", folder / f"{digest[:16]}.json"]
    if not all(file.exists() for file in files):
        names = {number: name for number, name in dataset.labels.items() if number != 0}
        with atomic_paths(files) as temporaries:
            _write(cases, names, len(dataset.channels), grid, temporaries, progress, title)
    images, rows = np.load(files[0], mmap_mode="r"), read_json(files[1])
    return CaseSet(
        names=tuple(case.name for case in cases),
        patients=tuple(case.patient for case in cases),
        images=images,
        intensities=np.array(rows["intensities"]),
        consistency=np.array(rows["consistency"], dtype=float),
        label_volumes={name: np.array(v, dtype=float) for name, v in rows["label_volumes"].items()},
        files=digest,
    )


def _digest(dataset: Dataset, cases: Sequence[CaseFiles], grid: Grid) -> str:
    found = hashlib.sha256(f"{FORMAT} {grid} {sorted(dataset.labels.items())}".encode())
    for case in cases:
        for file in (*case.images, *([case.label] if case.label else [])):
            if not file.is_file():
                raise DatasetError([f"{file} is missing: put it there, or take the case out of the dataset"])
            found.update(f"{case.name} {sha256_file(file)}\n".encode())
    return found.hexdigest()


def _write(
    cases: Sequence[CaseFiles],
    labels: dict[int, str],
    channels: int,
    grid: Grid,
    paths: list[Path],
    progress: Progress,
    title: str,
) -> None:
    images = open_memmap(paths[0], mode="w+", dtype=np.float16, shape=(len(cases), channels, *grid.shape))
    intensities, consistency = [], []
    volumes: dict[str, list[float]] = {name: [] for name in labels.values()}
    with progress.task(title, total=len(cases)) as task:
        for n, case in enumerate(cases):
            loaded = load_case(case)
            if len(loaded.image) != channels:
                raise DatasetError(
                    [f"{case.images[0]} has {len(loaded.image)} channels, the dataset {channels}: mend it"]
                )
            volume = case_on_grid(case, loaded, grid)
            if not np.isfinite(volume).all():
                raise DatasetError([f"{case.images[0]} holds NaN or infinity: replace these voxels"])
            images[n] = volume
            intensities.append([np.quantile(channel, LEVELS).tolist() for channel in volume])
            consistency.append([_neighbour_correlation(volume, axis) for axis in range(3)])
            voxel = abs(float(np.linalg.det(loaded.affine[:3, :3])))
            for number, name in labels.items():
                missing = loaded.label is None
                volumes[name].append(
                    float("nan") if missing else float(np.sum(loaded.label == number) * voxel)
                )
            task.advance()
    images.flush()
    rows = {"intensities": intensities, "consistency": consistency, "label_volumes": volumes}
    paths[1].write_text(json.dumps(rows), encoding="utf-8")


def on_grid(
    image: NDArray[np.float32], label: NDArray[np.integer] | None, affine: NDArray[np.float64], grid: Grid
) -> NDArray[np.float32]:
    """An image `(C, I, J, K)` standardised on the grid `(C, *grid.shape)`; of a larger scan what lies around
    its label `(I, J, K)`."""
    volume = torch.from_numpy(image)
    foreground = None if label is None else torch.from_numpy(label > 0)
    placement = place(grid, volume.shape[1:], affine, foreground=foreground)
    low, high = volume.amin((1, 2, 3), keepdim=True), volume.amax((1, 2, 3), keepdim=True)

    def prepare(part: torch.Tensor) -> torch.Tensor:
        """From -1, which lies beyond a scan's end where the grid shows background there, to 1."""
        return 2 * (part.float() - low) / (high - low).clamp_min(1e-12) - 1

    return standardise(placement.image_to_grid(volume[None], prepare))[0].numpy()


def case_on_grid(case: CaseFiles, loaded: LoadedCase, grid: Grid) -> NDArray[np.float32]:
    """`on_grid` for a case that was read; errors name its file."""
    label = None if loaded.label is None else loaded.label[0]
    try:
        return on_grid(loaded.image, label, loaded.affine, grid)
    except DiffaugError as error:
        raise DiffaugError(
            f"{case.images[0]} cannot be compared on a grid of {grid.shape} voxels: {error}. Or take the "
            "case out of the dataset"
        ) from error


def _neighbour_correlation(volume: NDArray[np.float32], axis: int) -> float:
    """Mean Pearson correlation of neighbouring slices of `(C, I, J, K)` along a spatial axis; 0 where slices
    are constant."""
    slices = np.moveaxis(volume, 1 + axis, 1).reshape(len(volume), volume.shape[1 + axis], -1)
    slices = slices - slices.mean(2, keepdims=True)
    norms = np.linalg.norm(slices, axis=2)
    products = (slices[:, 1:] * slices[:, :-1]).sum(2)
    sizes = norms[:, 1:] * norms[:, :-1]
    # What float32 leaves of a constant slice.
    least = 1e-8 * slices.shape[2]
    return float(np.divide(products, sizes, out=np.zeros_like(products), where=sizes > least).mean())
