"""Banks: variations of a dataset's cases, made ahead of training and drawn from it at memory-map speed.

    BANK/bank.json            what was asked for
    BANK/cases/NAME.json      one case: its files, where it lies, and the parameters of each variation
    BANK/cases/NAME.npy       the images `(K, C, I, J, K)`, dtype and voxels as the case's
    BANK/cases/NAME.label.npy the label maps `(K, 1, I, J, K)`, where the operation moves these

A case counts as made once its JSON is there, which is written last. A bank holds real scans' shapes and, in
the residual, their noise: it stays where the scans are.
"""

import hashlib
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from torch import Tensor

from diffaug.datasets.training_scans import recognised, voxel_hash
from diffaug.errors import DatasetError, DiffaugError
from diffaug.files import sha256_file
from diffaug.operations.case import Case, Parameters
from diffaug.operations.guard import Leaks, ScanLike, check_held_out, held_out_cases, report_leaks
from diffaug.progress import Progress

T = TypeVar("T", bound=BaseModel)
# A name makes a file name: no path may hide in one that is read from a bank.
CaseName = Annotated[str, StringConstraints(pattern=r"^[^/\\]+$")]

SETTINGS = "bank.json"
CASES = "cases"
# Voxels of a channel by which an image is compared at every draw.
SAMPLED = 4096
# Files that stay mapped in a process: to open one takes half of a draw's time.
MAPPED = 256


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BankSettings(_Part):
    """What was asked for; equal settings on one machine give equal bytes.

    Attributes:
        generator: name; weights: hash; licence: of the weights and what they make.
        operation: "variation", "inpainting" or "repaint", and `ranges` its own arguments.
        dataset: name of the dataset, and `licence` and `reference` as it states them.
        cases: names, of training cases alone where the dataset has a split.
        per_case: variations of each.
    """

    format: Literal[1] = 1
    generator: str
    weights: str
    generator_licence: str
    operation: Literal["variation", "inpainting", "repaint"]
    ranges: dict[str, Any]
    dataset: str
    licence: str | None
    reference: str | None
    cases: list[CaseName]
    per_case: int
    seed: int


class BankCase(_Part):
    """One case of a bank.

    Attributes:
        name: in the dataset.
        patient: whom it shows.
        files: names of its image files, by which transforms find it.
        voxels: salted hash of its decoded voxels, by which the scan is recognised; canonical: in RAS order;
            sample: of some of them, which is quick to compare.
        shape: `(C, I, J, K)`; affine: `(4, 4)`, voxel to world, mm, RAS+.
        parameters: of each variation, see `diffaug.operations`.
    """

    name: CaseName
    patient: str
    files: list[str]
    voxels: str
    canonical: str
    sample: str
    shape: tuple[int, int, int, int]
    affine: list[list[float]]
    parameters: list[Parameters]


class Bank:
    """A finished bank, read.

    Raises:
        DiffaugError: when used, for a folder that holds no bank, an unfinished or a damaged one.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()

    @cached_property
    def settings(self) -> BankSettings:
        """What was asked for."""
        return read_settings(self.folder)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the settings: the bank's identity in records."""
        return sha256_file(self.folder / SETTINGS)

    @property
    def salt(self) -> str:
        """Of the hashes of voxels: others cannot test by them whether they hold one of the scans."""
        return salt_of(self.settings)

    @cached_property
    def cases(self) -> dict[str, BankCase]:
        """All cases by name."""
        missing = [name for name in self.settings.cases if not (case_file(self.folder, name)).is_file()]
        if missing:
            raise DiffaugError(
                f"{self.folder} is not finished: {len(missing)} of {len(self.settings.cases)} cases are "
                f"missing, such as {missing[0]}; run the same `diffaug bank build` again, it goes on"
            )
        return {name: read_case(case_file(self.folder, name)) for name in self.settings.cases}

    @cached_property
    def _by_file(self) -> dict[str, str]:
        return {file: name for name, case in self.cases.items() for file in case.files}

    @property
    def generator(self) -> str:
        """The generator as the parameters name it: a bundled name, or a folder."""
        return str(next(iter(self.cases.values())).parameters[0]["generator"])

    @property
    def moves_label(self) -> bool:
        """Whether label maps come out of it, too."""
        return self.settings.operation == "repaint"

    def find(self, case_or_file: str) -> BankCase:
        """A case by its name, or by the name of one of its image files.

        Raises:
            DatasetError: there is none.
        """
        file = Path(case_or_file).name
        name = case_or_file if case_or_file in self.cases else self._by_file.get(file)
        if name is None:
            raise DatasetError(
                [
                    f"{self.folder} holds no variations of {case_or_file}; it was built for "
                    f"{len(self.cases)} cases of {self.settings.dataset}, such as {next(iter(self.cases))}"
                ]
            )
        return self.cases[name]

    def check(self, case: BankCase, images: Sequence[NDArray[Any]], name: str) -> None:
        """Refuse images that are not those which were varied, by a sample of their voxels.

        Args:
            images: that together are the channels of the case, each `(c, I, J, K)`.
            name: for the message.

        Raises:
            DiffaugError: they have been changed since they were read, or the file is another scan.
        """
        if sample_hash(images, self.salt) != case.sample:
            raise DiffaugError(
                f"{name} is not the scan of which {self.folder} holds variations ({case.name}): draw before "
                "anything changes the image, its units or its label map; and if the file has changed, build "
                "the bank anew"
            )

    def check_held_out(self, scans: Sequence[ScanLike], *, leaks: Leaks = "refuse") -> list[str]:
        """Look among held-out scans for those that the bank varies, or that trained its generator: see
        `diffaug.operations.check_held_out`."""
        trained = check_held_out(scans, self.generator, leaks=leaks)
        cases = held_out_cases(scans, leaks)
        known = {value for case in self.cases.values() for value in (case.voxels, case.canonical)}
        varied = recognised(cases, self.salt, known, Progress(quiet=True))
        return list(dict.fromkeys(trained + report_leaks(varied, len(cases), f"fill {self.folder}", leaks)))

    def draw(self, case: BankCase, entry: int) -> Case:
        """A copy of one variation: image `(C, I, J, K)`, and label map `(1, I, J, K)` or None."""
        image = self._read(f"{case.name}.npy", entry)
        label = self._read(f"{case.name}.label.npy", entry) if self.moves_label else None
        return Case(image, label)

    def _read(self, name: str, entry: int) -> Tensor:
        file = self.folder / CASES / name
        try:
            return torch.from_numpy(np.array(_mapped(file)[entry]))
        except (OSError, ValueError, IndexError) as error:
            raise DiffaugError(
                f"{file} cannot be read ({error}): remove it and its .json, and run the same `diffaug bank "
                "build` again"
            ) from error


@lru_cache(maxsize=MAPPED)
def _mapped(file: Path) -> NDArray[Any]:
    mapped: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return mapped


@cache
def _open(folder: str) -> Bank:
    return Bank(folder)


def open_bank(folder: Path | str) -> Bank:
    """A bank by its folder; its records are read once per process."""
    return _open(str(Path(folder).absolute()))


def sample_hash(images: Sequence[NDArray[Any]], salt: str) -> str:
    """Salted hash of about 4096 voxels of each channel, evenly spread.

    Of all voxels of 135 x 189 x 155 it would take 13 ms, and a draw 4 ms.
    """
    channels = [channel.reshape(-1) for image in images for channel in image]
    # Odd, so that not all voxels lie in the same columns.
    step = max(1, len(channels[0]) // SAMPLED) | 1
    return voxel_hash(np.stack([channel[::step] for channel in channels]).astype(np.float32), salt)


def salt_of(settings: BankSettings) -> str:
    """Hexadecimal digits that depend on the settings alone, so that equal builds have equal bytes."""
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:32]


def case_file(folder: Path, name: str) -> Path:
    """Where the record of a case lies."""
    return folder / CASES / f"{name}.json"


def read_settings(folder: Path) -> BankSettings:
    """What a bank was asked for.

    Raises:
        DiffaugError: there is no bank, or a damaged one.
    """
    return _read(folder / SETTINGS, BankSettings)


def read_case(file: Path) -> BankCase:
    """The record of one case.

    Raises:
        DiffaugError: it is missing or damaged.
    """
    return _read(file, BankCase)


def _read(file: Path, kind: type[T]) -> T:
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DiffaugError(f"{file} cannot be read: {error}; is {file.parent} a bank?") from error
    except ValidationError as error:
        raise DiffaugError(f"{file} is no part of a bank, or damaged: {error.errors()[0]['msg']}") from error
