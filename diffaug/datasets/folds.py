"""Folds for a cross-validation in which nothing validates that a generator or a patient gave away."""

from collections.abc import Mapping, Set

import numpy as np

from diffaug.datasets.reading import Dataset
from diffaug.errors import DiffaugError

Fold = dict[str, list[str]]


def make_folds(
    dataset: Dataset,
    count: int,
    *,
    seed: int = 0,
    train_only: Set[str] = frozenset(),
    made_from: Mapping[str, str | None] | None = None,
) -> list[Fold]:
    """Folds as nnU-Net's `splits_final.json` has them: the cases of each under "train" and "val".

    Every patient validates in one fold, with all of their cases, except those who may only train.

    Args:
        dataset: real and synthetic cases together; where it names patients, they stay together.
        count: number of folds, at least 2.
        seed: of the order of patients.
        train_only: cases that never validate, such as those that trained a generator; nor do other cases of
            their patients.
        made_from: synthetic case -> the real case that it was made from, or None. They never validate; one
            with a source trains only where its source's patient does.

    Raises:
        DiffaugError: cases that the dataset does not have, or fewer patients than folds who may validate.
    """
    made_from = made_from or {}
    patient_of = {case.name: case.patient for case in dataset.cases}
    named = set(train_only) | set(made_from) | {source for source in made_from.values() if source}
    if unknown := sorted(named - set(patient_of)):
        raise DiffaugError(f"{dataset.root} has no case {unknown[0]} ({len(unknown)} such names were given)")
    if count < 2:
        raise DiffaugError(f"at least 2 folds are needed, got {count}")
    real = [name for name in patient_of if name not in made_from]
    fixed = {patient_of[name] for name in train_only if name not in made_from}
    free = sorted({patient_of[name] for name in real} - fixed)
    if len(free) < count:
        raise DiffaugError(
            f"{len(free)} patients of {dataset.root} may validate, too few for {count} folds: the others "
            "trained the generator. Ask for fewer folds, or fit a generator to fewer cases"
        )
    order = np.random.default_rng(seed).permutation(free).tolist()
    folds = []
    for number in range(count):
        held_out = set(order[number::count])
        validation = [name for name in real if patient_of[name] in held_out]
        training = [name for name in real if patient_of[name] not in held_out]
        for name, source in made_from.items():
            if source is None or patient_of[source] not in held_out:
                training.append(name)
        folds.append({"train": sorted(training), "val": sorted(validation)})
    return folds
