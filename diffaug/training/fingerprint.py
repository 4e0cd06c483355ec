"""The fingerprint of a dataset: what the plan is made from."""

from collections.abc import Sequence

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles, LoadedCase, load_case
from diffaug.files import sha256_file
from diffaug.generators.intensity import trim_padding
from diffaug.progress import Progress

ORIENTATION = ("R", "A", "S")


class Fingerprint(BaseModel):
    """Shapes, spacings, intensities and labels of the training cases; axes in the grid's orientation (RAS).

    Lists have one entry per axis or per channel. Intensities are medians over the cases of each one's 0.5 and
    99.5 percentiles (low, high) and of its least and greatest value without constant padding (min, max); the
    percentiles of label volumes are over cases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cases: int
    labelled_cases: int
    spacing_median: list[float]
    shape_median: list[int]
    shape_largest: list[int]
    label_box_largest_mm: list[float] | None
    label_volumes_mm3: dict[int, list[float]]
    intensity_low: list[float]
    intensity_high: list[float]
    intensity_min: list[float]
    intensity_max: list[float]


def take_fingerprint(dataset: Dataset, names: Sequence[str], progress: Progress) -> Fingerprint:
    """Read the named cases once and summarise them."""
    cases = [case for case in dataset.cases if case.name in set(names)]
    shapes, spacings, lows, highs, ends = [], [], [], [], []
    boxes: list[NDArray[np.float64]] = []
    volumes: dict[int, list[float]] = {v: [] for v in dataset.labels if v != 0}
    with progress.task("fingerprint", total=len(cases)) as task:
        for case in cases:
            loaded = load_case(case)
            axes = _axes(loaded.affine)
            spacing = nib.affines.voxel_sizes(loaded.affine)[axes]
            shapes.append([loaded.image.shape[1 + a] for a in axes])
            spacings.append(spacing)
            lows.append(np.percentile(loaded.image, 0.5, axis=(1, 2, 3)))
            highs.append(np.percentile(loaded.image, 99.5, axis=(1, 2, 3)))
            scans = [trim_padding(channel) for channel in loaded.image]
            ends.append([(scan.min(), scan.max()) for scan in scans])
            if loaded.label is not None:
                _add_label(loaded, axes, spacing, boxes, volumes)
            task.advance()
    least, greatest = np.median(ends, axis=0).T
    return Fingerprint(
        cases=len(cases),
        labelled_cases=sum(case.label is not None for case in cases),
        spacing_median=[float(v) for v in np.median(spacings, axis=0)],
        shape_median=[int(v) for v in np.median(shapes, axis=0)],
        shape_largest=[int(v) for v in np.max(shapes, axis=0)],
        label_box_largest_mm=[float(v) for v in np.max(boxes, axis=0)] if boxes else None,
        label_volumes_mm3={
            v: [float(p) for p in np.percentile(found, [0, 5, 50, 95, 100])]
            for v, found in volumes.items()
            if found
        },
        intensity_low=[float(v) for v in np.median(lows, axis=0)],
        intensity_high=[float(v) for v in np.median(highs, axis=0)],
        intensity_min=[float(v) for v in least],
        intensity_max=[float(v) for v in greatest],
    )


def _axes(affine: NDArray[np.float64]) -> list[int]:
    """The source axis that each axis of the grid's orientation comes from."""
    source = nib.orientations.io_orientation(affine)
    transform = nib.orientations.ornt_transform(source, nib.orientations.axcodes2ornt(ORIENTATION))
    return [int(a) for a in np.argsort(transform[:, 0])]


def _add_label(
    loaded: LoadedCase,
    axes: list[int],
    spacing: NDArray[np.float64],
    boxes: list[NDArray[np.float64]],
    volumes: dict[int, list[float]],
) -> None:
    assert loaded.label is not None
    label = loaded.label[0].transpose(axes)
    found = np.argwhere(label != 0)
    if len(found):
        boxes.append((found.max(axis=0) - found.min(axis=0) + 1) * spacing)
    for value, collected in volumes.items():
        collected.append(float((label == value).sum() * np.prod(spacing)))


def file_hashes(cases: Sequence[CaseFiles]) -> dict[str, list[str]]:
    """SHA-256 of all files of the cases: whether a dataset changed between two sessions. Times would not do:
    a copy of the dataset on another disk has others."""
    return {
        case.name: [sha256_file(file) for file in (*case.images, *([case.label] if case.label else []))]
        for case in cases
    }
