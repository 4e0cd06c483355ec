"""The real cases that a dataset is painted or varied from: found, hashed, read and cropped."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from diffaug.datasets.manifest import SourceCase, SourceRecord, Verb
from diffaug.datasets.reading import ENDINGS, Dataset, read_dataset
from diffaug.datasets.volumes import (
    LARGEST_LABEL,
    CaseFiles,
    geometry_fault,
    label_array,
    load_case,
    read_volume,
)
from diffaug.errors import DatasetError, LabelError
from diffaug.files import sha256_file
from diffaug.generators.cases import MOST_CUT
from diffaug.generators.generator import Generator
from diffaug.generators.grid import Box, Grid, place
from diffaug.generators.intensity import IntensityMap, fit_intensity_map


class Source(NamedTuple):
    """A real case to paint (only its label) or vary; `files` by their path in the source folder."""

    case: CaseFiles
    patient: str | None
    files: dict[str, Path]


class RealCase(NamedTuple):
    """A source in memory, cropped to what the generator's grid covers.

    Attributes:
        image: (C, I, J, K) float32, or None where only the label is used.
        intensity: the image's intensity map, of the whole scan.
        label: (1, I, J, K) int16, ids of the generator, or of the source where the generator knows none.
        affine: (4, 4), RAS+ mm, of the cropped voxels.
        box: half-open bounds of the crop in the source's voxels.
        cut: voxels of the label outside the crop.
    """

    image: np.ndarray | None
    intensity: IntensityMap | None
    label: np.ndarray
    affine: np.ndarray
    box: Box
    cut: int


@dataclass(frozen=True)
class Sources:
    """The sources that the cases use, in order; `dataset` holds just these, for `vary`."""

    cases: list[Source] = field(default_factory=list)
    dataset: Dataset | None = None
    record: SourceRecord | None = None


def find_sources(
    verb: Verb,
    folder: Path | str | None,
    count: int,
    channels: Sequence[str],
    *,
    with_labels: bool = False,
) -> Sources:
    """The sources of `count` cases, identified by their hashes; their voxels are not yet looked at.

    `with_labels` records the source's vocabulary, too, for label maps that are copied.
    """
    if folder is None:
        return Sources()
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise DatasetError([f"{folder} is not a folder: give the folder of the source"])
    if verb == "paint":
        dataset = _dataset_of(folder)
        # Only the label map is used; a dataset knows its case by the image's name.
        found = (
            [replace(case, images=()) for case in dataset.cases if case.label and case.label.parent == folder]
            if dataset
            else _label_maps(folder)
        )
    else:
        dataset = read_dataset(folder)
        found = list(dataset.cases)
    # Held-out cases of a dataset with a split stay out of what is trained on.
    subset: Literal["train"] | None = "train" if dataset and dataset.split else None
    if dataset and dataset.split:
        found = [case for case in found if case.name in dataset.split["train"]]
    if not found:
        raise DatasetError([f"{folder} has no case {'of the training split' if subset else 'to use'}"])
    found = found[:count]
    if verb == "vary" and dataset is not None:
        _check_labelled(dataset, found, channels)
    patient_of = (
        {case.name: case.patient for case in dataset.cases} if dataset and dataset.patients_given else {}
    )
    cases = [Source(case, patient_of.get(case.name), _files_of(case, folder)) for case in found]
    missing = [path for source in cases for path in source.files.values() if not path.is_file()]
    if missing:
        raise DatasetError([f"{path} is missing: put it there, or take the case out" for path in missing])
    record = SourceRecord(
        name=dataset.name if dataset else folder.name,
        licence=dataset.licence if dataset else None,
        reference=dataset.reference if dataset else None,
        subset=subset,
        labels=dataset.labels if dataset and with_labels else {},
        cases={
            source.case.name: SourceCase(
                patient=source.patient, files={name: sha256_file(path) for name, path in source.files.items()}
            )
            for source in cases
        },
    )
    if verb == "paint" or dataset is None:
        return Sources(cases, record=record)
    return Sources(cases, replace(dataset, cases=tuple(found), strays=()), record)


def _label_maps(folder: Path) -> list[CaseFiles]:
    """The label maps in a folder, as cases without an image."""
    files = sorted(
        path for path in folder.iterdir() if path.name.endswith(ENDINGS) and not path.name.startswith(".")
    )
    if not files:
        inside = [name for name in ("labelsTr", "labels") if (folder / name).is_dir()]
        hint = f"; is {folder / inside[0]} meant?" if inside else ""
        raise DatasetError([f"{folder} holds no label map ({' or '.join(ENDINGS)}){hint}"])
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_name[path.name.removesuffix(".gz").removesuffix(".nii")].append(path)
    problems = [
        f"{' and '.join(map(str, paths))} have the same name: keep one"
        for paths in by_name.values()
        if len(paths) > 1
    ]
    if problems:
        raise DatasetError(problems)
    return [CaseFiles(name, (), path, name) for name, (path,) in by_name.items()]


def _dataset_of(labels: Path) -> Dataset | None:
    """The dataset that a folder of label maps belongs to, where the folder above it describes one.

    Raises:
        DatasetError: the dataset cannot be read, or it has a split that says nothing of these label maps, so
            that held-out ones could be among them.
    """
    root = labels.parent
    if not any((root / name).is_file() for name in ("dataset.json", "splits.json")):
        return None
    dataset = read_dataset(root)
    if any(case.label and case.label.parent == labels for case in dataset.cases):
        return dataset
    if dataset.split is not None:
        raise DatasetError(
            [
                f"{labels} holds no label map of the cases that the split of {root} names: give the folder "
                "of its training label maps, or copy these out of the dataset if they may be used"
            ]
        )
    return None


def _check_labelled(dataset: Dataset, cases: Sequence[CaseFiles], channels: Sequence[str]) -> None:
    problems = [
        f"{dataset.root}: case {case.name} has no label map: add it, or take the case out"
        for case in cases
        if case.label is None
    ]
    if len(dataset.channels) != len(channels):
        problems.append(
            f"{dataset.root} has the channels {', '.join(dataset.channels)}, the generator "
            f"{', '.join(channels)}: give a dataset with these"
        )
    if problems:
        raise DatasetError(problems)


def _files_of(case: CaseFiles, root: Path) -> dict[str, Path]:
    """A case's files by their path in the folder `root`, or by name where they lie elsewhere."""
    paths = [*case.images, *([case.label] if case.label else [])]
    return {
        path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name: path for path in paths
    }


def read_source(source: Source, generator: Generator, label_mapping: Mapping[int, int]) -> RealCase:
    """A source, cropped to what the generator's grid covers around its label.

    Raises:
        DatasetError: a file cannot be used, or its label does not show what the generator makes.
        LabelError: ids that the generator does not know.
    """
    if source.case.images:
        image, label, affine = load_case(source.case)
    else:
        path = source.case.label
        assert path is not None
        volume = read_volume(path)
        if fault := geometry_fault(volume):
            raise DatasetError([f"{path} {fault}"])
        image, label, affine = None, label_array(volume.array, path), volume.affine
    assert label is not None
    if generator.knows_labels:
        try:
            # The vocabulary says what is wrong with ids; a row of them is enough for that.
            generator.vocabulary.indices(
                torch.from_numpy(np.unique(label))[None, None, None, None], label_mapping
            )
        except LabelError as error:
            raise LabelError(f"{source.case.label}: {error}") from error
        label = renumber(label, label_mapping)
    foreground = label[0] != 0
    total = int(foreground.sum())
    if not total:
        raise DatasetError([f"{source.case.label} shows no structure: take the case out"])
    whole = ((0, foreground.shape[0]), (0, foreground.shape[1]), (0, foreground.shape[2]))
    box = whole if generator.card.windowed else covered_box(generator.grid, foreground, affine)
    part = tuple(slice(start, stop) for start, stop in box)
    cut = total - int(foreground[part].sum())
    if cut > MOST_CUT * total:
        size = " x ".join(
            f"{s * v:.0f}" for s, v in zip(generator.grid.shape, generator.grid.spacing, strict=True)
        )
        raise DatasetError(
            [
                f"{source.case.label}: {cut} of the label's {total} voxels lie outside the {size} mm that "
                f"{generator.name} makes: keep one structure of that size, or take the case out"
            ]
        )
    corner = affine.copy()
    corner[:3, 3] = affine[:3] @ [*(start for start, _ in box), 1]
    return RealCase(
        None if image is None else np.ascontiguousarray(image[:, *part]),
        None if image is None else fit_intensity_map(torch.from_numpy(image), generator.card.intensity),
        np.ascontiguousarray(label[:, *part]),
        corner,
        box,
        cut,
    )


def covered_box(grid: Grid, foreground: np.ndarray, affine: np.ndarray) -> Box:
    """The half-open voxel bounds of what `grid` covers of a volume when it lies around `foreground`.

    Args:
        foreground: (I, J, K) bool, not empty.
        affine: (4, 4), RAS+ mm.
    """
    box = [(0, size) for size in foreground.shape]
    while True:
        part = torch.from_numpy(np.ascontiguousarray(foreground[tuple(slice(a, b) for a, b in box)]))
        placement = place(grid, part.shape, affine, foreground=part)
        smaller = list(box)
        for axis, flip, (start, stop), size in zip(
            placement.axes, placement.flips, placement.window(), placement.source_shape, strict=True
        ):
            low = size - stop if flip else start
            smaller[axis] = (box[axis][0] + low, box[axis][0] + low + stop - start)
        if smaller == box:
            return box[0], box[1], box[2]
        # Once more: what is left may by now lie half a voxel differently on the grid.
        box = smaller


def renumber(label: np.ndarray, mapping: Mapping[int, int]) -> np.ndarray:
    """A label map with the ids that `mapping` names replaced, all at once; int16."""
    table = np.arange(LARGEST_LABEL + 1, dtype=np.int16)
    for old, new in mapping.items():
        table[old] = new
    return table[label]
