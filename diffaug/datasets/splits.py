"""Who the patients are, and which cases train, validate and test: the files beside a dataset."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffaug.errors import DiffaugError
from diffaug.files import read_json

SUBSETS = ("train", "validation", "test")


def read_patients(file: Path, cases: Sequence[str], problems: list[str]) -> dict[str, str]:
    """Case -> patient of a CSV with these two columns; cases that the dataset does not have are left out."""
    patient_of: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines, skipinitialspace=True)
            columns = rows.fieldnames or []
            table = [(row.get("case") or "", row.get("patient") or "") for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{file} cannot be read as a CSV table: {error}")
        return {}
    if not {"case", "patient"} <= set(columns):
        problems.append(f"{file} has the columns {', '.join(columns) or '(none)'}: give it case,patient")
        return {}
    for case, patient in table:
        case, patient = case.strip(), patient.strip()
        if patient_of.setdefault(case, patient) != patient:
            problems.append(
                f"{file}: case {case} has the patients {patient_of[case]!r} and {patient!r}: keep one"
            )
    lacking = [case for case in cases if not patient_of.get(case)]
    if lacking:
        problems.append(f"{file} gives no patient for {_listed(lacking)}: add a line for each")
    return {case: patient_of[case] for case in cases if patient_of.get(case)}


def read_split(
    file: Path, cases: Sequence[str], patient_of: Mapping[str, str], problems: list[str]
) -> dict[str, tuple[str, ...]] | None:
    """The cases of each subset; a case or a patient in two of them is a problem."""
    try:
        given = read_json(file)
    except DiffaugError as error:
        problems.append(str(error))
        return None
    if isinstance(given, list) and given and isinstance(given[0], dict):
        given = {"train": given[0].get("train"), "validation": given[0].get("val")}
    valid = isinstance(given, dict) and set(given) <= set(SUBSETS) and all(map(_is_names, given.values()))
    if not valid:
        wanted = ", ".join(SUBSETS)
        problems.append(
            f"{file} must hold lists of case names under {wanted}, or be nnU-Net's splits_final.json"
        )
        return None
    subsets = {subset: tuple(given.get(subset, ())) for subset in SUBSETS}
    if not subsets["train"]:
        problems.append(f'{file} has no case under "train"')

    homes: dict[str, list[str]] = defaultdict(list)
    for subset, names in subsets.items():
        for name in names:
            homes[name].append(subset)
        unknown = sorted(set(names) - set(cases))
        if unknown:
            problems.append(
                f"{file}: {subset} names {_listed(unknown)} not in the dataset: correct or remove"
            )
    for name, where in homes.items():
        if len(where) > 1:
            problems.append(f"{file}: case {name} is listed twice, under {' and '.join(where)}: keep one")
    seen: dict[str, dict[str, str]] = defaultdict(dict)
    for name, where in homes.items():
        if name in patient_of:
            seen[patient_of[name]].setdefault(where[0], name)
    for patient, by_subset in seen.items():
        if len(by_subset) > 1:
            places = " and ".join(f"{subset} ({name})" for subset, name in by_subset.items())
            problems.append(
                f"{file}: patient {patient} is in {places}, a leak: keep a patient's cases together"
            )
    return subsets


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _listed(names: Sequence[str]) -> str:
    """Names for a message, all of them."""
    return f"{len(names)} case{'s' if len(names) > 1 else ''} ({', '.join(names)})"
