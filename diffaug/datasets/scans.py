"""Single scans in NIfTI files: read as a generator's verbs take them, and written again as they lay there."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy

from diffaug.datasets.volumes import (
    affine_mismatch,
    geometry_fault,
    label_array,
    read_volume,
    shape_mismatch,
    stack_channels,
)
from diffaug.errors import DatasetError

# What torch computes with; voxels of other types are read as float64.
_TENSOR_TYPES = {"uint8", "int8", "int16", "int32", "int64", "float32", "float64"}
# The fields of a header that say where the voxels lie.
_PLACE = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """An image and the files that hold it.

    Attributes:
        files: one per channel, or one that holds all of them.
        image: (C, I, J, K) in the units that the headers' scaling gives.
        affine: (4, 4) float64, voxel indices to RAS+ mm.
    """

    files: tuple[Path, ...]
    image: np.ndarray
    affine: np.ndarray

    def with_voxels(self, image: np.ndarray) -> list[bytes]:
        """The files with other voxels, not compressed.

        Headers, extensions, types and scaling stay as they are, and so do the stored values of the voxels
        that are equal in `image` and in this scan.

        Args:
            image: like this scan's, shape, type and units alike.
        """
        contents, start = [], 0
        for file in self.files:
            shape = _voxels(file).shape
            count = shape[3] if len(shape) == 4 else 1
            part = image[start : start + count]
            changed = part != self.image[start : start + count]
            contents.append(_with_voxels(file, part, changed))
            start += count
        return contents


def read_scan(files: Sequence[Path]) -> Scan:
    """Read an image.

    Args:
        files: one per channel, or a single one with the channels on its fourth axis.

    Raises:
        DatasetError: a file is damaged, does not match the first one, or holds NaN or infinite values.
    """
    volumes = [read_volume(file) for file in files]
    if faults := [
        f"{f} {fault}" for f, v in zip(files, volumes, strict=True) if (fault := geometry_fault(v))
    ]:
        raise DatasetError(faults)
    common = np.result_type(*(volume.array for volume in volumes))
    image = stack_channels(
        [volume.array for volume in volumes],
        files,
        dtype=common.newbyteorder("=") if common.name in _TENSOR_TYPES else np.float64,
    )
    affine = volumes[0].affine
    problems = [
        problem
        for file, volume in zip(files, volumes, strict=True)
        if (problem := affine_mismatch(file, volume.affine, files[0], affine))
    ]
    for file, volume in zip(files, volumes, strict=True):
        if broken := volume.array.size - int(np.isfinite(volume.array).sum()):
            problems.append(f"{file} holds {broken} voxels that are NaN or infinite: replace them")
    if problems:
        raise DatasetError(problems)
    return Scan(tuple(files), image, affine)


def read_label(file: Path) -> Scan:
    """Read a label map, as a scan of int16 ids.

    Raises:
        DatasetError: the file is damaged, or holds what is no label id.
    """
    volume = read_volume(file)
    if fault := geometry_fault(volume):
        raise DatasetError([f"{file} {fault}"])
    return Scan((file,), label_array(volume.array, file), volume.affine)


def read_label_of(scan: Scan, file: Path) -> np.ndarray:
    """Read a label map `(1, I, J, K)`, int16, that lies on a scan's voxels.

    Raises:
        DatasetError: as for `read_label`, or it has another shape or affine.
    """
    label = read_label(file)
    _require_same_voxels(scan, file, label.image.shape[1:], label.affine)
    return label.image


def read_mask_of(scan: Scan, file: Path) -> np.ndarray:
    """Read a mask that lies on a scan's voxels: bool `(1, I, J, K)`, where the file does not hold 0.

    Raises:
        DatasetError: the file is damaged, holds several volumes, NaN or infinite values, or has another shape
            or affine.
    """
    volume = read_volume(file)
    if fault := geometry_fault(volume):
        raise DatasetError([f"{file} {fault}"])
    array = volume.array[..., 0] if volume.array.ndim == 4 and volume.array.shape[3] == 1 else volume.array
    if array.ndim != 3:
        raise DatasetError([f"{file} has the shape {array.shape}: a mask has three axes"])
    _require_same_voxels(scan, file, array.shape, volume.affine)
    if broken := array.size - int(np.isfinite(array).sum()):
        raise DatasetError([f"{file} holds {broken} voxels that are NaN or infinite: replace them"])
    return array[None] != 0


def _require_same_voxels(scan: Scan, file: Path, shape: Sequence[int], affine: np.ndarray) -> None:
    wanted = scan.image.shape[1:]
    if tuple(shape) != wanted:
        raise DatasetError([shape_mismatch(file, shape, scan.files[0], wanted)])
    if problem := affine_mismatch(file, affine, scan.files[0], scan.affine):
        raise DatasetError([problem])


def nifti_beside(file: Path, array: np.ndarray, description: str) -> bytes:
    """A new NIfTI file, not compressed, whose voxels lie exactly where those of `file` do.

    Args:
        array: `(I, J, K)` or `(I, J, K, C)` of a type that NIfTI has.
        description: for the header, at most 79 characters.
    """
    old: Any = nib.load(file).header
    header = type(old)(endianness="<")
    for field in _PLACE:
        header[field] = old[field]
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_slope_inter(1, 0)
    header["descrip"] = description.encode("ascii", "replace")[:79]
    header["magic"] = old["magic"]
    no_extension = bytes(4)
    header["vox_offset"] = len(header.binaryblock) + len(no_extension)
    return header.binaryblock + no_extension + array.astype(header.get_data_dtype()).tobytes(order="F")


def _voxels(file: Path) -> ArrayProxy:
    """A file's voxels, not read yet."""
    image: Any = nib.load(file)
    return image.dataobj


def _with_voxels(file: Path, volumes: np.ndarray, changed: np.ndarray) -> bytes:
    """A file's bytes up to its voxels, and the voxels, of which those in `changed` are taken from `volumes`;
    both `(c, I, J, K)`."""
    proxy = _voxels(file)
    stored = np.array(proxy.get_unscaled())
    where = np.moveaxis(changed, 0, 3).reshape(stored.shape)
    values = np.moveaxis(volumes, 0, 3).reshape(stored.shape)[where]
    if (proxy.slope, proxy.inter) != (1, 0):
        values = (values - proxy.inter) / proxy.slope
    if stored.dtype.kind in "iu":
        limits = np.iinfo(stored.dtype)
        values = (np.rint(values) if values.dtype.kind == "f" else values).clip(limits.min, limits.max)
    stored[where] = values
    with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
        head = stream.read(proxy.offset)
    return head + stored.tobytes(order="F")
