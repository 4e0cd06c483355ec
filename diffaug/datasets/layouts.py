"""The layouts in which a dataset is built: file names, voxels and `dataset.json`."""

import gzip
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np

from diffaug.errors import DiffaugError

LayoutName = Literal["nnunet", "decathlon"]
# Of zlib's levels on 40 scans of Task04_Hippocampus as int16, 4 took 0.09 s, 6 took 0.32 s and 9 took 0.39 s,
# for 2.76, 2.80 and 2.80 MB.
COMPRESSION = 4
# What `dataset.json` names where there are no label maps: readers expect at least the background.
BACKGROUND = {0: "background"}
# nnU-Net's own numbers are low; 900 and above stay clear of the public datasets.
FIRST_NUMBER = 901

_NNUNET_NAME = re.compile(r"Dataset\d{3}_[A-Za-z0-9][A-Za-z0-9_.-]*")


class Layout(ABC):
    """Where the files of a case go, and what describes the dataset."""

    name: LayoutName

    @abstractmethod
    def check_folder(self, folder: Path) -> None:
        """Refuse a folder whose name the layout's readers would not accept.

        Raises:
            DiffaugError: with a name that would do.
        """

    @abstractmethod
    def written_ids(self, ids: Sequence[int]) -> dict[int, int]:
        """Generator's label id -> id in the dataset."""

    @abstractmethod
    def image_paths(self, case: str, channels: int) -> list[str]:
        """Paths of a case's image files, in the dataset."""

    def label_path(self, case: str) -> str:
        """Path of a case's label map, in the dataset."""
        return f"labelsTr/{case}.nii.gz"

    @abstractmethod
    def image_arrays(self, image: np.ndarray) -> list[np.ndarray]:
        """The arrays of the image files of `(C, I, J, K)`, in the order of their paths."""

    @abstractmethod
    def describe(
        self,
        *,
        name: str,
        description: str,
        licence: str,
        reference: str,
        channels: Sequence[str],
        labels: Mapping[int, str],
        cases: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The content of `dataset.json`; `labels` maps ids in the dataset to names, and is empty where there
        are no label maps."""


class NnunetLayout(Layout):
    """nnU-Net raw: one file per channel, labels numbered from 0 without a gap."""

    name: LayoutName = "nnunet"

    def check_folder(self, folder: Path) -> None:
        siblings = sorted(folder.parent.glob("Dataset[0-9][0-9][0-9]_*"))
        if not _NNUNET_NAME.fullmatch(folder.name):
            numbers = {path.name[7:10] for path in siblings}
            number = next(n for n in range(FIRST_NUMBER, FIRST_NUMBER + 1000) if str(n) not in numbers)
            words = re.findall(r"[A-Za-z0-9]+", re.sub(r"^Dataset\d*_?", "", folder.name))
            name = "".join(word[0].upper() + word[1:] for word in words) or "Synthetic"
            raise DiffaugError(
                f"nnU-Net reads folders named DatasetNNN_Name, not {folder.name!r}: give the output "
                f"{folder.parent / f'Dataset{number}_{name}'}, or choose the decathlon's layout"
            )
        for path in siblings:
            if path.name[:10] == folder.name[:10] and path.name != folder.name:
                raise DiffaugError(
                    f"nnU-Net tells datasets apart by their number, and {path} has the number of "
                    f"{folder.name}: give the output another one"
                )

    def written_ids(self, ids: Sequence[int]) -> dict[int, int]:
        return {number: index for index, number in enumerate(sorted(ids))}

    def image_paths(self, case: str, channels: int) -> list[str]:
        return [f"imagesTr/{case}_{index:04d}.nii.gz" for index in range(channels)]

    def image_arrays(self, image: np.ndarray) -> list[np.ndarray]:
        return list(image)

    def describe(
        self,
        *,
        name: str,
        description: str,
        licence: str,
        reference: str,
        channels: Sequence[str],
        labels: Mapping[int, str],
        cases: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {
            "name": name,
            "description": description,
            "licence": licence,
            "reference": reference,
            "channel_names": {str(index): channel for index, channel in enumerate(channels)},
            "labels": {label: number for number, label in _unique(labels or BACKGROUND).items()},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
            "diffaug": dict(provenance),
        }


class DecathlonLayout(Layout):
    """The Medical Segmentation Decathlon's: channels on the fourth axis of one file, cases listed by name."""

    name: LayoutName = "decathlon"

    def check_folder(self, folder: Path) -> None:
        """Its readers take any name."""

    def written_ids(self, ids: Sequence[int]) -> dict[int, int]:
        return {number: number for number in sorted(ids)}

    def image_paths(self, case: str, channels: int) -> list[str]:
        return [f"imagesTr/{case}.nii.gz"]

    def image_arrays(self, image: np.ndarray) -> list[np.ndarray]:
        return [image[0] if len(image) == 1 else np.moveaxis(image, 0, 3)]

    def describe(
        self,
        *,
        name: str,
        description: str,
        licence: str,
        reference: str,
        channels: Sequence[str],
        labels: Mapping[int, str],
        cases: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {
            "name": name,
            "description": description,
            "reference": reference,
            "licence": licence,
            "tensorImageSize": "3D" if len(channels) == 1 else "4D",
            "modality": {str(index): channel for index, channel in enumerate(channels)},
            "labels": {str(number): label for number, label in (labels or BACKGROUND).items()},
            "numTraining": len(cases),
            "numTest": 0,
            "training": [
                {"image": f"./{self.image_paths(case, len(channels))[0]}"}
                | ({"label": f"./{self.label_path(case)}"} if labels else {})
                for case in cases
            ],
            "test": [],
            "diffaug": dict(provenance),
        }


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (NnunetLayout(), DecathlonLayout())}


def _unique(labels: Mapping[int, str]) -> dict[int, str]:
    """Label names as nnU-Net takes them: 0 is "background", none comes twice or has a meaning of its own."""
    names = {number: "background" if number == 0 else name for number, name in labels.items()}
    taken = ["background", "ignore", *(name for number, name in names.items() if number)]
    return {
        number: f"{name} {number}" if number and taken.count(name) > 1 else name
        for number, name in names.items()
    }


def nifti_bytes(array: np.ndarray, affine: np.ndarray, description: str) -> bytes:
    """A compressed NIfTI-1 file: the same bytes whenever it is made; arguments as for `plain_nifti_bytes`."""
    return compressed(plain_nifti_bytes(array, affine, description))


def plain_nifti_bytes(array: np.ndarray, affine: np.ndarray, description: str) -> bytes:
    """A NIfTI-1 file, not compressed.

    Args:
        array: `(I, J, K)` or `(I, J, K, C)` of uint8, int16 or float32.
        affine: (4, 4), voxel indices to RAS+ mm, kept in the sform; in the qform too, unless it has shears.
        description: for the header, at most 79 characters.
    """
    stored = array.dtype.newbyteorder("<")
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(stored)
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner", strip_shears=True)
    if not np.allclose(header.get_qform(), affine, atol=1e-3):
        header["qform_code"] = 0
    header.set_slope_inter(1, 0)
    header["descrip"] = description.encode("ascii", "replace")[:79]
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    no_extension = bytes(4)
    return header.binaryblock + no_extension + array.astype(stored).tobytes(order="F")


def compressed(content: bytes) -> bytes:
    """A gzip file: the same bytes whenever it is made."""
    buffer = io.BytesIO()
    # Neither time nor file name in the gzip header.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=COMPRESSION) as file:
        file.write(content)
    return buffer.getvalue()
