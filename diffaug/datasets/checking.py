"""Checking a dataset before training: every file is opened, and all problems are told at once."""

from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np

from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import (
    CaseFiles,
    Volume,
    affine_mismatch,
    geometry_fault,
    label_array,
    read_volume,
    shape_mismatch,
    stack_channels,
)
from diffaug.errors import DatasetError


def check_dataset(dataset: Dataset, on_case: Callable[[str], None] | None = None) -> None:
    """Open every file of a dataset and look for whatever would spoil a training.

    Looked for: missing, unpaired and damaged files, case names used twice, volumes that are not 3D, numbers
    of channels, shapes and affines that do not agree, voxel sizes that are not positive, NaN and infinities,
    constant images, label ids that the dataset does not name, and label maps that are all empty.

    Args:
        dataset: as `read_dataset` gives it.
        on_case: called with each case's name once it is checked.

    Raises:
        DatasetError: listing all problems, each with the file, the value found and what to do.
    """
    problems = [
        f"{stray} belongs to no case: name it like the file it goes with, or remove it"
        for stray in dataset.strays
    ]
    for name, count in Counter(case.name for case in dataset.cases).items():
        if count > 1:
            files = ", ".join(str(case.images[0]) for case in dataset.cases if case.name == name)
            problems.append(f"{count} cases have the name {name} ({files}): rename their files")
    label_maps = foreground = 0
    for case in dataset.cases:
        found, ids = _check_case(case, dataset)
        problems += found
        label_maps += ids is not None
        foreground += bool(ids and ids - {0})
        if on_case is not None:
            on_case(case.name)
    if label_maps and not foreground:
        problems.append(
            f"{dataset.root}: none of the {label_maps} readable label maps holds a label other than 0: give "
            "the true ones, or leave them out to train without labels"
        )
    if problems:
        raise DatasetError(problems)


def _check_case(case: CaseFiles, dataset: Dataset) -> tuple[list[str], set[int] | None]:
    """A case's problems, and the label ids that it holds (None where there is no readable label map)."""
    problems: list[str] = []
    volumes: dict[Path, Volume] = {}
    for file in chain(case.images, () if case.label is None else (case.label,)):
        try:
            volumes[file] = read_volume(file)
        except DatasetError as error:
            problems += error.problems
            continue
        if fault := geometry_fault(volumes[file]):
            problems.append(f"{file} {fault}")
    problems += _affine_problems(volumes)
    images = {file: volumes[file].array for file in case.images if file in volumes}
    for file, array in images.items():
        problems += _voxel_problems(file, array)
    try:
        image = stack_channels(list(images.values()), list(images)) if images else None
    except DatasetError as error:
        problems += error.problems
        image = None
    if image is not None and len(images) == len(case.images) and len(image) != len(dataset.channels):
        problems.append(
            f"{case.images[0]}: the case has {len(image)} channels, the dataset {len(dataset.channels)} "
            f"({', '.join(dataset.channels)}): give each case all of them"
        )
    if case.label is None or case.label not in volumes:
        return problems, None
    try:
        label = label_array(volumes[case.label].array, case.label)
    except DatasetError as error:
        return problems + error.problems, None
    if image is not None and label.shape[1:] != image.shape[1:]:
        problems.append(shape_mismatch(case.label, label.shape[1:], case.images[0], image.shape[1:]))
    ids, counts = (found.tolist() for found in np.unique(label, return_counts=True))
    voxels = [
        f"{number} ({count} voxels)"
        for number, count in zip(ids, counts, strict=True)
        if number not in dataset.labels
    ]
    if voxels:
        named = ", ".join(f"{number} {name}" for number, name in dataset.labels.items())
        problems.append(
            f"{case.label} holds labels that the dataset does not name, {', '.join(voxels)}; it has {named}: "
            "correct the file, or name them in dataset.json"
        )
    return problems, set(ids)


def _voxel_problems(file: Path, array: np.ndarray) -> list[str]:
    """Problems of an image file's voxels, (I, J, K) or (I, J, K, C)."""
    if array.ndim >= 3 and min(array.shape[:3]) < 2:
        return [f"{file} has the shape {array.shape}: a volume of several slices is needed"]
    problems = []
    for index, volume in enumerate(np.moveaxis(array, 3, 0) if array.ndim == 4 else [array]):
        with np.errstate(over="ignore"):
            values = volume.astype(np.float32)
        where = f"{file} (channel {index})" if array.ndim == 4 else str(file)
        broken = values.size - int(np.isfinite(values).sum())
        if broken:
            problems.append(f"{where} holds {broken} voxels that are NaN or infinite: replace them")
        elif values.min() == values.max():
            problems.append(
                f"{where} is {values.flat[0]:g} everywhere: take the case out or find the true image"
            )
    return problems


def _affine_problems(volumes: dict[Path, Volume]) -> list[str]:
    """Files of a case that do not lie where its first one does, of those with a usable affine."""
    usable = [(file, volume.affine) for file, volume in volumes.items() if geometry_fault(volume) is None]
    mismatches = (affine_mismatch(file, affine, *usable[0]) for file, affine in usable[1:])
    return [problem for problem in mismatches if problem]
