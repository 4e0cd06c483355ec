"""Which cases fit weights, and which measure them."""

from dataclasses import dataclass

import numpy as np

from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DiffaugError

# Share of the patients that is held out where no split file says which.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Subsets:
    """The cases that fit weights and those that measure them."""

    train: tuple[CaseFiles, ...]
    validation: tuple[CaseFiles, ...]
    counts: dict[str, int]
    patients: dict[str, int] | None


def split_cases(dataset: Dataset, seed: int) -> Subsets:
    """The dataset's own split, or one by patient: a tenth of the patients, at least one, is held out."""
    by_name = {case.name: case for case in dataset.cases}
    if dataset.split is not None:
        names = {subset: list(found) for subset, found in dataset.split.items() if found}
    else:
        patients = sorted({case.patient for case in dataset.cases})
        if len(patients) < 2:
            raise DiffaugError(
                f"{dataset.root} has {len(patients)} patient(s); fitting needs at least 2, one to validate on"
            )
        order = np.random.default_rng(seed).permutation(len(patients))
        held = {patients[n] for n in order[: max(1, round(HELD_OUT * len(patients)))]}
        names = {
            "train": [c.name for c in dataset.cases if c.patient not in held],
            "validation": [c.name for c in dataset.cases if c.patient in held],
        }
    if not names.get("validation"):
        raise DiffaugError(
            f'the split of {dataset.root} has no validation cases; add some under "validation"'
        )
    counts = {subset: len(found) for subset, found in names.items()}
    patients_of = {subset: len({by_name[n].patient for n in found}) for subset, found in names.items()}
    return Subsets(
        tuple(by_name[n] for n in names["train"]),
        tuple(by_name[n] for n in names["validation"]),
        counts,
        patients_of if dataset.patients_given else None,
    )
