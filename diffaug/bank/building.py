"""Making a bank: the variations of every case of a dataset, on the cases' own grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap

from diffaug.bank.bank import (
    CASES,
    SETTINGS,
    BankCase,
    BankSettings,
    case_file,
    read_case,
    read_settings,
    salt_of,
    sample_hash,
)
from diffaug.datasets.reading import Dataset
from diffaug.datasets.scans import read_label_of, read_scan
from diffaug.datasets.training_scans import canonical_voxels, voxel_hash
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DiffaugError
from diffaug.files import atomic_paths, atomic_write_json
from diffaug.generators.seeds import case_seed
from diffaug.operations import Case, Inpainting, Operation, Repaint, Variation, apply_to_cases
from diffaug.operations.sources import resolve
from diffaug.progress import Progress

OPERATIONS: dict[str, type[Operation]] = {
    "variation": Variation,
    "inpainting": Inpainting,
    "repaint": Repaint,
}


class Built(NamedTuple):
    """Numbers of cases: made by this call, and found from before."""

    made: int
    kept: int


def build_bank(
    operation: Operation,
    dataset: Dataset,
    output: Path,
    *,
    per_case: int = 8,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Built:
    """Make a bank, or finish one that was interrupted.

    Of a dataset with a split only training cases are varied. Variation k of a case depends on nothing but
    its scan, its name, k and the settings.

    Args:
        operation: what is drawn from, and its generator.
        dataset: with label maps, unless the operation allows that labels drift.
        output: new, empty, or what an earlier call with the same settings left.
        per_case: variations of each case, at least 1.
        seed: at least 0.
        device: such as "cpu" or "cuda".
        progress: where to show it; default: nowhere.

    Raises:
        DiffaugError: the output holds another bank, or a case cannot be varied (names it).
    """
    progress = progress or Progress(quiet=True)
    if per_case < 1:
        raise DiffaugError(f"per_case must be at least 1, got {per_case}")
    output = output.absolute()
    cases = dataset.training_cases
    settings = _settings(operation, dataset, cases, per_case, seed)
    _check_cases(operation, dataset, cases)
    if operation.card.labels and not operation.allow_label_drift:
        operation.check_labels(dataset.labels, dataset.root)
    if (output / SETTINGS).exists():
        old, new = (s.model_dump(mode="json") for s in (read_settings(output), settings))
        if changed := [name for name in new if new[name] != old[name]]:
            raise DiffaugError(
                f"{output} holds a bank of other settings ({', '.join(changed)}): give another output"
            )
    elif output.exists() and any(output.iterdir()):
        raise DiffaugError(f"{output} is not empty and holds no bank: give another output")
    else:
        atomic_write_json(output / SETTINGS, settings.model_dump(mode="json"))
    generator = resolve(operation.source)
    if device != "cpu":
        generator.to(device)
    made = 0
    with progress.task("bank", total=len(cases)) as task:
        for case in cases:
            if not _is_made(output, case, settings):
                _make(operation, case, output, settings)
                made += 1
            task.advance()
    return Built(made, len(cases) - made)


def _settings(
    operation: Operation, dataset: Dataset, cases: Sequence[CaseFiles], per_case: int, seed: int
) -> BankSettings:
    name = next(name for name, kind in OPERATIONS.items() if type(operation) is kind)
    return BankSettings(
        generator=operation.card.name,
        weights=operation.card.weights_hash,
        generator_licence=operation.card.licence,
        operation=name,
        ranges=operation.ranges(),
        dataset=dataset.name,
        licence=dataset.licence,
        reference=dataset.reference,
        cases=[case.name for case in cases],
        per_case=per_case,
        seed=seed,
    )


def _check_cases(operation: Operation, dataset: Dataset, cases: Sequence[CaseFiles]) -> None:
    """What can be known without reading a scan."""
    if not cases:
        raise DiffaugError(f"{dataset.root} has no training case to vary")
    unlabelled = [case.name for case in cases if case.label is None]
    if unlabelled and not operation.allow_label_drift:
        raise DiffaugError(
            f"{len(unlabelled)} cases of {dataset.root} have no label map, such as {unlabelled[0]}, and "
            "would not keep their anatomy: leave them out, or pass allow_label_drift"
        )
    files = [file.name for case in cases for file in case.images]
    if len(set(files)) < len(files):
        twice = next(name for name in files if files.count(name) > 1)
        raise DiffaugError(f"{dataset.root} has several files named {twice}, by which a bank finds its cases")


def _is_made(output: Path, case: CaseFiles, settings: BankSettings) -> bool:
    """Whether an earlier call made a case, of the scan that is there now."""
    file = case_file(output, case.name)
    if not file.exists():
        return False
    scan = read_scan(case.images).image.astype(np.float32)
    return read_case(file).voxels == voxel_hash(scan, salt_of(settings))


def _make(operation: Operation, case: CaseFiles, output: Path, settings: BankSettings) -> None:
    """All variations of one case; its record comes last."""
    per_case, seed, salt = settings.per_case, settings.seed, salt_of(settings)
    scan = read_scan(case.images)
    use_label = case.label is not None and bool(operation.card.labels)
    label = torch.from_numpy(read_label_of(scan, case.label)) if use_label and case.label else None
    image = torch.from_numpy(scan.image)
    own = int.from_bytes(case.name.encode(), "big") % 2**63
    parameters = [operation.parameters(case_seed(seed, case_seed(own, k)) % 2**31) for k in range(per_case)]
    generator = resolve(operation.source)
    paths = [output / CASES / f"{case.name}.npy"]
    if operation.moves_label:
        paths.append(output / CASES / f"{case.name}.label.npy")
    with atomic_paths(paths) as temporaries:
        arrays: list[Any] = [open_memmap(temporaries[0], "w+", image.numpy().dtype, (per_case, *image.shape))]
        if operation.moves_label:
            arrays.append(open_memmap(temporaries[1], "w+", np.int16, (per_case, 1, *image.shape[1:])))
        for k, drawn in enumerate(parameters):
            try:
                (made,) = apply_to_cases(generator, [drawn], [Case(image, label)], scan.affine)
            except DiffaugError as error:
                raise DiffaugError(f"{case.images[0]}: {error}") from error
            arrays[0][k] = made.image.numpy()
            if operation.moves_label and made.label is not None:
                arrays[1][k] = made.label.numpy()
        for array in arrays:
            array.flush()
    voxels = scan.image.astype(np.float32)
    record = BankCase(
        name=case.name,
        patient=case.patient,
        files=[file.name for file in case.images],
        voxels=voxel_hash(voxels, salt),
        canonical=voxel_hash(canonical_voxels(voxels, scan.affine), salt),
        sample=sample_hash([scan.image], salt),
        shape=tuple(image.shape),
        affine=scan.affine.tolist(),
        parameters=parameters,
    )
    atomic_write_json(case_file(output, case.name), record.model_dump(mode="json"))
