"""Scans in memory: NIfTI files read to their end, joined into cases, their geometry looked at."""

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import DTypeLike

from diffaug.errors import DatasetError

LARGEST_LABEL = int(np.iinfo(np.int16).max)
# How far a stored label may be from a whole number: what scaling factors in float32 leave, and no more.
INTEGER_TOLERANCE = 1e-3
# The most that a byte of a gzip file can expand to (zlib's technical notes). A header that announces more is
# wrong, and found out before memory is set aside for it.
DEFLATE_RATIO = 1032
# How far the affines of a case's files may differ, relative to the smallest voxel side.
AFFINE_TOLERANCE = 1e-3

_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case.

    Attributes:
        name: unique within the dataset.
        images: one file per channel, in the order of the dataset's channels; or one file that holds them all.
        label: the label map, or None for a case without one.
        patient: whom the scan shows; the case's own name where no table says otherwise.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str


class LoadedCase(NamedTuple):
    """One case in memory, on its own grid and in its own units.

    Attributes:
        image: (C, I, J, K) float32, array axes as nibabel gives them.
        label: (1, I, J, K) int16 ids of the dataset's vocabulary, or None.
        affine: (4, 4) float64, voxel indices to RAS+ mm, of the first image file.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray


class Volume(NamedTuple):
    """What a NIfTI file holds.

    Attributes:
        array: the voxels with the header's scaling applied, in the order and number of axes that are stored.
        affine: (4, 4) float64, voxel indices to RAS+ mm.
        spacing: voxel size in mm as the header states it, where nibabel replaces what is not positive.
    """

    array: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, ...]


def load_case(case: CaseFiles) -> LoadedCase:
    """Read one case's voxels.

    Raises:
        DatasetError: a file is missing, damaged, of the wrong shape or without a usable voxel size, or a
            label is not a whole number.
    """
    volumes = [read_volume(file) for file in case.images]
    image = stack_channels([volume.array for volume in volumes], case.images)
    label = None if case.label is None else label_array(read_volume(case.label).array, case.label)
    if fault := geometry_fault(volumes[0]):
        raise DatasetError([f"{case.images[0]} {fault}"])
    if case.label is not None and label is not None and label.shape[1:] != image.shape[1:]:
        raise DatasetError([shape_mismatch(case.label, label.shape[1:], case.images[0], image.shape[1:])])
    return LoadedCase(image, label, volumes[0].affine)


def read_volume(file: Path) -> Volume:
    """Read a NIfTI file to its end, so that a damaged one shows.

    Args:
        file: NIfTI-1 or -2, compressed or not.

    Raises:
        DatasetError: the file is missing, no NIfTI file, cut short, damaged, or holds no real numbers.
    """
    if not file.is_file():
        raise DatasetError([f"{file} is missing: put it there, or take the case out of the dataset"])
    compressed = file.name.endswith(".gz")
    try:
        kind = type(nib.load(file))
        if not issubclass(kind, nib.Nifti1Image):
            raise ImageFileError(f"it is a {kind.__name__}")
        with gzip.open(file) if compressed else file.open("rb") as stream:
            stored = kind.header_class.from_fileobj(stream, check=False)
            spacing = tuple(float(size) for size in stored["pixdim"][1:4])
            stream.seek(0)
            image = kind.from_stream(stream)
            announced = math.prod(image.shape) * image.get_data_dtype().itemsize
            if announced > file.stat().st_size * (DEFLATE_RATIO if compressed else 1):
                raise EOFError(
                    f"its header announces {announced} bytes of voxels, more than the file can hold"
                )
            array = np.asanyarray(image.dataobj)
            while stream.read(1 << 20):  # the end of a compressed file verifies its checksum
                pass
    except _UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise DatasetError(
            [f"{file} cannot be read as NIfTI ({reason}): put an intact copy there"]
        ) from error
    if array.dtype.kind not in "iuf":
        raise DatasetError([f"{file} holds voxels of type {array.dtype}: convert them to real numbers"])
    return Volume(array, np.asarray(image.affine, dtype=np.float64), spacing)


def ras_geometry(file: Path) -> tuple[list[float], list[int]]:
    """Spacing (mm) and shape of a volume, its axes in RAS order, from its header alone.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        header: Any = nib.load(file)
    except (OSError, ImageFileError) as error:
        raise DatasetError([f"{file} cannot be read: {error}"]) from error
    axes = np.argsort(nib.orientations.io_orientation(header.affine)[:, 0])
    spacing: list[float] = nib.affines.voxel_sizes(header.affine)[axes].tolist()
    return spacing, [int(header.shape[axis]) for axis in axes]


def geometry_fault(volume: Volume) -> str | None:
    """What is wrong with a volume's voxel size or affine, to be put after the file's name, or None."""
    if not all(0 < size < np.inf for size in volume.spacing):
        sizes = " x ".join(f"{size:g}" for size in volume.spacing)
        return f"states a voxel size of {sizes} mm: correct pixdim in its header"
    axes = volume.affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(volume.affine).all() and lengths.all() and abs(np.linalg.det(axes / lengths)) > 1e-6):
        return f"has an affine that cannot be inverted, {volume.affine[:3].tolist()}: correct its header"
    return None


def shape_mismatch(file: Path, shape: Sequence[int], other: Path, wanted: Sequence[int]) -> str:
    """The message for two files of a case whose shapes differ."""
    return f"{file} has the shape {tuple(shape)}, {other} {tuple(wanted)}: resample them to one grid"


def affine_mismatch(file: Path, affine: np.ndarray, other: Path, wanted: np.ndarray) -> str | None:
    """The message for two files of a case that do not lie in the same place, or None where they do."""
    difference = np.abs(affine - wanted).max()
    if difference <= AFFINE_TOLERANCE * np.linalg.norm(wanted[:3, :3], axis=0).min():
        return None
    return (
        f"{file} lies elsewhere than {other}: their affines differ by {difference:.3g} mm, "
        f"{affine[:3].tolist()} against {wanted[:3].tolist()}: resample it, or correct its header"
    )


def stack_channels(
    arrays: Sequence[np.ndarray], files: Sequence[Path], dtype: DTypeLike = np.float32
) -> np.ndarray:
    """Join the files of an image.

    Args:
        arrays: one 3D volume per file, or a single 4D volume with the channels on its last axis.
        files: where they come from, for messages.
        dtype: of the result.

    Returns:
        (C, I, J, K) of `dtype`.

    Raises:
        DatasetError: listing the volumes that are not 3D, or whose shape differs from the first one's.
    """
    problems: list[str] = []
    first: tuple[Path, tuple[int, ...]] | None = None
    for array, file in zip(arrays, files, strict=True):
        if array.ndim not in (3, 4) or (array.ndim == 4 and len(arrays) > 1 and array.shape[3] != 1):
            problems.append(
                f"{file} has the shape {array.shape}: give a 3D volume, or one file for all channels"
            )
        elif first is None:
            first = file, array.shape[:3]
        elif array.shape[:3] != first[1]:
            problems.append(shape_mismatch(file, array.shape[:3], *first))
    if problems:
        raise DatasetError(problems)
    volumes = [array.reshape(*array.shape[:3], -1) for array in arrays]
    with np.errstate(over="ignore"):
        joined = np.concatenate(volumes, axis=3, dtype=dtype)
    return np.ascontiguousarray(np.moveaxis(joined, 3, 0))


def label_array(array: np.ndarray, file: Path) -> np.ndarray:
    """Turn stored voxels into a label map.

    Args:
        array: 3D, or 4D with a last axis of length 1; whole numbers of any type.
        file: where it comes from, for messages.

    Returns:
        (1, I, J, K) int16.

    Raises:
        DatasetError: it is not 3D, or a value is no whole number from 0 to 32767.
    """
    if array.ndim not in (3, 4) or array.shape[3:] not in ((), (1,)):
        raise DatasetError([f"{file} has the shape {array.shape}: a label map is one 3D volume"])
    volume = array.reshape(1, *array.shape[:3])
    ids = np.rint(volume) if volume.dtype.kind == "f" else volume
    right = (ids >= 0) & (ids <= LARGEST_LABEL)
    if volume.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            right &= np.abs(volume - ids) <= INTEGER_TOLERANCE
    if not right.all():
        value = volume[~right][0]
        raise DatasetError(
            [
                f"{file} holds {value:g} where labels are whole numbers from 0 to {LARGEST_LABEL}: is it a "
                "label map, and was it resampled with nearest neighbours?"
            ]
        )
    return ids.astype(np.int16)
