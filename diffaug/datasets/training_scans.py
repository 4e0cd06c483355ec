"""Which scans trained a generator: salted hashes that stay with its owner."""

import hashlib
import secrets
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import CardError, DiffaugError
from diffaug.files import PRIVATE, read_json
from diffaug.progress import Progress
from diffaug.zoo import folder_of

FILE = "training_scans.json"


def record_training_scans(cases: Sequence[CaseFiles], progress: Progress) -> dict[str, object]:
    """Salted hashes of the scans that train a generator: a sidecar that stays with its owner.

    A hash is over the decoded voxels (float32 values and shape), so a renamed or recompressed copy is still
    recognised, and by a second one in RAS order a reoriented copy; the salt keeps others from testing whether
    a scan that they hold was used.
    """
    salt = secrets.token_hex(16)
    hashes = _hashes(cases, salt, progress)
    return {
        "salt": salt,
        "hash": "blake2b-128 of salt, shape and float32 voxels",
        "scans": {name: stored for name, (stored, _) in hashes.items()},
        "canonical": {name: canonical for name, (_, canonical) in hashes.items()},
    }


def check_training_scans(
    file: Path, training: Sequence[CaseFiles], held_out: Sequence[CaseFiles], progress: Progress
) -> None:
    """Refuse sets that are not what a generator was, and was not, trained on.

    Args:
        file: what `record_training_scans` gave, kept by the fit.
        training: cases that are said to have trained the generator.
        held_out: cases that are said not to have.

    Raises:
        DiffaugError: the file is damaged, a training case did not train the generator or one that did is
            missing, or a held-out case did.
    """
    salt, known = _read(file)
    given, others = (
        {name: stored for name, (stored, _) in _hashes(cases, salt, progress).items()}
        for cases in (training, held_out)
    )
    strangers = [name for name, value in given.items() if value not in known]
    seen = [name for name, value in others.items() if value in known]
    missing = len(set(read_json(file)["scans"].values()) - set(given.values()))
    problems = [
        (len(strangers), f"of the training cases did not train it, such as {strangers[:1]}"),
        (missing, "scans that trained it are not among the training cases"),
        (len(seen), f"of the held-out cases trained it, such as {seen[:1]}"),
    ]
    found = [f"{count} {words}" for count, words in problems if count]
    if found:
        raise DiffaugError(
            f"by {file} these are not the generator's sets: {'; '.join(found)}. Give the dataset and split "
            "of the fit, or leave --card out"
        )


def training_scans_of(generator: str) -> Path | None:
    """The record that came with a generator, by its name or folder: beside the card of a bundled one, in
    `private` of a fitted one; None where it is not there."""
    try:
        folder = folder_of(generator)
    except CardError:
        return None
    files = [folder / FILE, folder / PRIVATE / FILE]
    return next((file for file in files if file.is_file()), None)


def trained_by(file: Path, cases: Mapping[str, Sequence[Path]], progress: Progress) -> list[str]:
    """The cases whose scans are among those that trained a generator, renamed or recompressed ones included.

    Args:
        file: what `record_training_scans` gave.
        cases: name -> image files.

    Raises:
        DiffaugError: the file is damaged, or a scan cannot be read.
    """
    salt, known = _read(file)
    return recognised(cases, salt, known, progress)


def recognised(
    cases: Mapping[str, Sequence[Path]], salt: str, known: Set[str], progress: Progress
) -> list[str]:
    """The cases of whose salted hashes, as stored and in RAS order, one is among known ones."""
    files = [CaseFiles(name, tuple(images), None, name) for name, images in cases.items()]
    return sorted(name for name, values in _hashes(files, salt, progress).items() if known & set(values))


def _read(file: Path) -> tuple[str, set[str]]:
    """Salt and hashes of a record."""
    record = read_json(file)
    try:
        salt, known = str(record["salt"]), set(record["scans"].values())
        # Records of earlier versions have no hashes in RAS order.
        known |= set(record.get("canonical", {}).values())
        bytes.fromhex(salt)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DiffaugError(f"{file} is no record of training scans: put back the one of the fit") from error
    return salt, known


def scan_hashes(cases: Sequence[CaseFiles], salt: str) -> dict[str, tuple[str, str]]:
    """Hashes of each case's voxels, as stored and in RAS order; the salt is of hexadecimal digits."""
    return _hashes(cases, salt, Progress(quiet=True))


def _hashes(cases: Sequence[CaseFiles], salt: str, progress: Progress) -> dict[str, tuple[str, str]]:
    """Hashes of the voxels as they are stored, and in RAS order."""
    hashes = {}
    with progress.task("hashing scans", total=len(cases)) as task:
        for case in cases:
            loaded = load_case(case)
            canonical = canonical_voxels(loaded.image, loaded.affine)
            hashes[case.name] = voxel_hash(loaded.image, salt), voxel_hash(canonical, salt)
            task.advance()
    return hashes


def canonical_voxels(image: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """`(C, I, J, K)` with the axes in the order and directions nearest to R, A and S."""
    order = nib.orientations.io_orientation(affine)
    turned: NDArray[Any] = nib.orientations.apply_orientation(np.moveaxis(image, 0, -1), order)
    return np.moveaxis(turned, -1, 0)


def voxel_hash(image: NDArray[np.float32], salt: str) -> str:
    """Salted hash of decoded voxels `(C, I, J, K)`."""
    digest = hashlib.blake2b(bytes.fromhex(salt), digest_size=16)
    digest.update(np.asarray(image.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(image, dtype="<f4").tobytes())
    return digest.hexdigest()
