"""A guard against leaks: scans that validate or test must not have trained the generator."""

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from diffaug.datasets.training_scans import trained_by, training_scans_of
from diffaug.errors import LeakError
from diffaug.operations.sources import GeneratorLike, card_of, reference
from diffaug.progress import Progress

Leaks = Literal["refuse", "warn"]
# An image file, or the files of the channels of one case.
ScanLike = str | PathLike[str] | Sequence[str | PathLike[str]]


def check_held_out(
    scans: Sequence[ScanLike],
    generator: GeneratorLike,
    *,
    training_scans: Path | str | None = None,
    leaks: Leaks = "refuse",
) -> list[str]:
    """Look among held-out scans for those that trained a generator.

    Scans are recognised by their decoded voxels, whatever the file is called. All of them are read, which
    takes as long as loading them once. `Bank.check_held_out` looks for those that a bank varies.

    Args:
        scans: image files (NIfTI) that validate or test, one for each case or a list of its channels' files;
            no label maps.
        generator: whose training scans are looked for; a fit keeps their hashes in `private`.
        training_scans: the file of these hashes, where it is not in the generator's folder.
        leaks: what to do where there are some: "refuse" or "warn".

    Returns:
        The names of the first files of the scans that were recognised.

    Raises:
        LeakError: some were, and `leaks` is "refuse".
        DatasetError: a scan cannot be read.
    """
    cases = held_out_cases(scans, leaks)
    name = reference(generator)
    channels = len(card_of(generator).channels)
    for first, files in cases.items():
        if len(files) not in (1, channels):
            raise ValueError(
                f"{len(files)} files were given for the held-out scan {first}, {name} has {channels} "
                "channel(s): give image files alone, no label maps"
            )
    record = Path(training_scans) if training_scans else training_scans_of(name)
    if record is None:
        warnings.warn(
            f"{name} has no record of the scans that trained it: whether held-out scans are among them "
            "is unknown. Give training_scans=..., which its fit left in private",
            stacklevel=3,
        )
        return []
    seen = trained_by(record, cases, Progress(quiet=True))
    return report_leaks(seen, len(cases), f"trained {name}", leaks)


def held_out_cases(scans: Sequence[ScanLike], leaks: Leaks) -> dict[str, list[Path]]:
    """The files of each held-out scan, by the name of the first.

    Raises:
        ValueError: there are none, or something else was given; `leaks` is not one of its values.
    """
    if leaks not in get_args(Leaks):
        raise ValueError(f"leaks must be 'refuse' or 'warn', got {leaks!r}")
    given = [scans] if isinstance(scans, str | PathLike) else list(scans)
    if not given:
        raise ValueError("no held-out scans were given: leave held_out out, or name files that are there")
    return {str(files[0]): files for files in map(_files, given)}


def report_leaks(seen: Sequence[str], total: int, what: str, leaks: Leaks) -> list[str]:
    """Refuse, or warn of, scans that were recognised among `total` held-out ones; gives them back.

    Args:
        what: what they did already, such as "trained hippocampus-mr".

    Raises:
        LeakError: there are some, and `leaks` is "refuse".
    """
    if seen:
        message = (
            f"{len(seen)} of {total} held-out scans are known already, such as {seen[0]}: they {what}, and "
            "scores on them say too much. Hold others out (`diffaug splits` writes folds), or pass "
            'leaks="warn"'
        )
        if leaks == "refuse":
            raise LeakError(message)
        warnings.warn(message, stacklevel=4)
    return list(seen)


def _files(scan: ScanLike) -> list[Path]:
    if isinstance(scan, str | PathLike):
        return [Path(scan)]
    if not isinstance(scan, list | tuple) or not all(isinstance(file, str | PathLike) for file in scan):
        raise ValueError(
            "held-out scans are image files, or for each case the list of its channels' files; got "
            f"{type(scan).__name__}: {str(scan)[:80]}"
        )
    return [Path(file) for file in scan]
