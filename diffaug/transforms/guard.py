"""A guard against leaks: scans that validate or test must not have trained the generator, nor fill a bank."""

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

from diffaug.datasets.training_scans import recognised, trained_by, training_scans_of
from diffaug.errors import LeakError
from diffaug.progress import Progress
from diffaug.transforms.bank import Bank
from diffaug.transforms.sources import GeneratorLike, reference

Leaks = Literal["refuse", "warn"]
# An image file, or the files of the channels of one case.
ScanLike = str | PathLike[str] | Sequence[str | PathLike[str]]


def check_held_out(
    scans: Sequence[ScanLike],
    *,
    generator: GeneratorLike | None = None,
    training_scans: Path | str | None = None,
    bank: Path | str | None = None,
    leaks: Leaks = "refuse",
) -> list[str]:
    """Look among held-out scans for those that trained a generator, or that a bank varies.

    Scans are recognised by their decoded voxels, whatever the file is called. All of them are read, which
    takes as long as loading them once.

    Args:
        scans: NIfTI files that validate or test, one for each case or a list of its channels' files.
        generator: whose training scans are looked for; a fit keeps their hashes in `private`.
        training_scans: the file of these hashes, where it is not in the generator's folder.
        bank: folder of a bank whose cases are looked for.
        leaks: what to do where there are some: "refuse" or "warn".

    Returns:
        The names of the first files of the scans that were recognised.

    Raises:
        LeakError: some were, and `leaks` is "refuse".
        DatasetError: a scan cannot be read.
    """
    cases = {str(files[0]): files for files in map(_files, scans)}
    found: dict[str, str] = {}
    if generator is not None:
        name = reference(generator)
        record = Path(training_scans) if training_scans else training_scans_of(name)
        if record is None:
            warnings.warn(
                f"{name} has no record of the scans that trained it: whether held-out scans are among them "
                "is unknown. Give training_scans=..., which its fit left in private",
                stacklevel=3,
            )
        else:
            seen = trained_by(record, cases, Progress(quiet=True))
            found |= dict.fromkeys(seen, f"trained {name}")
    if bank is not None:
        opened = Bank(bank)
        known = {case.voxels for case in opened.cases.values()}
        seen = recognised(cases, opened.salt, known, Progress(quiet=True))
        found |= dict.fromkeys(seen, f"fill {opened.folder}")
    if found:
        first = next(iter(found))
        message = (
            f"{len(found)} of {len(cases)} held-out scans are known already, such as {first}: they "
            f"{found[first]}, and scores on them say too much. Hold others out (`diffaug splits` writes "
            'folds), or pass leaks="warn"'
        )
        if leaks == "refuse":
            raise LeakError(message)
        warnings.warn(message, stacklevel=3)
    return list(found)


def _files(scan: ScanLike) -> list[Path]:
    if isinstance(scan, str | PathLike):
        return [Path(scan)]
    return [Path(file) for file in scan]
