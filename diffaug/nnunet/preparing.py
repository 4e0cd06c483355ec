"""A bank as nnU-Net preprocesses it: each entry goes the way of its case through a configuration's plans."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from diffaug.bank.bank import Bank, BankCase
from diffaug.datasets.scans import read_scan
from diffaug.datasets.training_scans import trained_by, training_scans_of
from diffaug.errors import DiffaugError, ExtraError
from diffaug.files import read_json
from diffaug.nnunet.settings import FILE, BankChoice, OnlineChoice, bank_key, read_settings, write_settings
from diffaug.operations import Variation
from diffaug.progress import Progress

try:
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
except ImportError as error:
    raise ExtraError("nnU-Net", "nnunet") from error

# Endings of what nnU-Net keeps of a case; the last one is written last.
ENDINGS = (".b2nd", "_seg.b2nd", ".pkl")


class Prepared(NamedTuple):
    """Folder of the entries, file of the settings, numbers of entries that were preprocessed and that were
    there already; and the cases that trained the generator, None where that is unknown."""

    folder: Path
    settings: Path
    made: int
    kept: int
    trained_generator: list[str] | None


def prepare_bank(
    dataset: int | str,
    bank: Path | str,
    *,
    plans: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    probability: float = 0.5,
    training_scans: Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Preprocess a bank's entries for a configuration, and tell the trainer of them.

    The entries lie beside nnU-Net's own cases, each with its own foreground locations. A stopped call goes
    on.

    Args:
        dataset: id or name, such as 4 or "Dataset004_Hippocampus"; planned and preprocessed already.
        bank: built for the same raw dataset.
        plans, configuration: as for `nnUNetv2_train`.
        probability: that a trainer takes an entry instead of the case.
        training_scans: record of the scans that trained the generator, which a fit leaves in `private`; with
            it the trainer refuses to validate on them. Default: that of the bank's generator, if it is there.
        progress: where to show it; default: nowhere.

    Raises:
        DiffaugError: nnU-Net's folders or plans are missing, the bank is not of this dataset, or the plans'
            reader turns the axes.
    """
    progress = progress or Progress(quiet=True)
    raw, preprocessed = _folders(dataset)
    manager, setup = _plans(preprocessed, plans, configuration)
    description = read_json(raw / "dataset.json")
    opened = Bank(bank)
    files = get_filenames_of_train_images_and_targets(str(raw), description)
    if strangers := [name for name in opened.cases if name not in files]:
        raise DiffaugError(
            f"{opened.folder} holds {len(strangers)} cases that {raw} has not, such as {strangers[0]}: build "
            f"a bank with --data {raw}"
        )
    # Entries of another bank, or of plans that were changed, are others.
    identity = f"{opened.hash} {json.dumps([description, manager.plans, setup.configuration], default=str)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    target = preprocessed / f"diffaug_{plans}_{configuration}_{digest}"
    made = kept = 0
    with progress.task("preprocessing", total=len(opened.cases) * opened.settings.per_case) as task:
        for name, case in opened.cases.items():
            reader = manager.image_reader_writer_class()
            missing = [k for k in range(opened.settings.per_case) if not _is_made(target, name, k)]
            kept += opened.settings.per_case - len(missing)
            task.advance(opened.settings.per_case - len(missing))
            if not missing:
                continue
            images, label = files[name]["images"], files[name]["label"]
            data, properties = reader.read_images(images)
            seg = reader.read_seg(label)[0]
            _check_scan(case, opened, images, data, manager)
            for k in missing:
                entry = opened.draw(case, k)
                _save(
                    target,
                    f"{name}__{k}",
                    _turned(entry.image.numpy()),
                    seg if entry.label is None else _turned(entry.label.numpy()),
                    dict(properties),
                    (manager, setup, description),
                )
                made += 1
                task.advance()
    seen = None
    if record := training_scans or training_scans_of(opened.generator):
        scans = {name: [Path(file) for file in own["images"]] for name, own in files.items()}
        seen = trained_by(record, scans, progress)
    choice = BankChoice(
        folder=target.name,
        probability=probability,
        per_case=opened.settings.per_case,
        cases=list(opened.cases),
        bank=opened.hash,
        generator=opened.settings.generator,
        weights=opened.settings.weights,
        trained_generator=seen,
    )
    settings = read_settings(preprocessed)
    key = bank_key(plans, configuration)
    if (old := settings.banks.get(key)) is not None:
        choice = choice.model_copy(update={"leaks": old.leaks})
    write_settings(preprocessed, settings.model_copy(update={"banks": {**settings.banks, key: choice}}))
    if old is not None and old.folder != choice.folder:
        shutil.rmtree(preprocessed / old.folder, ignore_errors=True)
    return Prepared(target, preprocessed / FILE, made, kept, seen)


def prepare_online(
    dataset: int | str,
    generator: str,
    *,
    probability: float = 0.3,
    strength: tuple[float, float] | None = None,
    label_mapping: Mapping[int, int] | None = None,
    training_scans: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Path, OnlineChoice]:
    """Tell the trainer of a generator that varies patches in the training step.

    Args:
        dataset: id or name, such as 4 or "Dataset004_Hippocampus"; planned and preprocessed already.
        generator: name in the zoo, or folder.
        probability: of a variation, per patch.
        strength, label_mapping: as for `Variation`.
        training_scans, progress: as for `prepare_bank`.

    Raises:
        DiffaugError: nnU-Net's folders are missing, the raw images have their axes in several directions, or
            the generator does not fit the dataset.
    """
    raw, preprocessed = _folders(dataset)
    description = read_json(raw / "dataset.json")
    operation = Variation(generator, strength, label_mapping=label_mapping)
    regions = [name for name, value in description["labels"].items() if not isinstance(value, int)]
    if regions or "ignore" in description["labels"]:
        raise DiffaugError(
            f"{raw / 'dataset.json'} has {'regions' if regions else 'an ignore label'}: vary its cases by a "
            "bank" + ("" if regions else ", after mapping what is ignored to a label")
        )
    operation.check_labels(description["labels"].values(), raw / "dataset.json")
    channels = len(description["channel_names"])
    if channels != len(operation.card.channels):
        raise DiffaugError(
            f"{operation.card.name} varies {len(operation.card.channels)} channels, {raw.name} has {channels}"
        )
    files = get_filenames_of_train_images_and_targets(str(raw), description)
    scans = {name: [Path(file) for file in own["images"]] for name, own in files.items()}
    axes: dict[tuple[str, ...], Path] = {}
    for images in scans.values():
        header: Any = nib.load(images[0])
        axes.setdefault(nib.orientations.aff2axcodes(header.affine), images[0])
    if len(axes) > 1:
        raise DiffaugError(
            f"the images of {raw} have their axes in several directions ("
            + "; ".join(f"{''.join(codes)}: {file.name}" for codes, file in axes.items())
            + "), which patches do not tell: use a bank, or reorient the raw images"
        )
    record = training_scans or training_scans_of(operation.generator)
    choice = OnlineChoice(
        generator=operation.generator,
        weights=operation.card.weights_hash,
        probability=probability,
        strength=strength,
        label_mapping=dict(label_mapping or {}),
        axes=next(iter(axes)),
        trained_generator=trained_by(record, scans, progress or Progress(quiet=True)) if record else None,
    )
    write_settings(preprocessed, read_settings(preprocessed).model_copy(update={"online": choice}))
    return preprocessed / FILE, choice


def _folders(dataset: int | str) -> tuple[Path, Path]:
    for variable, name in ((nnUNet_raw, "nnUNet_raw"), (nnUNet_preprocessed, "nnUNet_preprocessed")):
        if not variable.is_set():
            raise DiffaugError(f"the environment variable {name} is not set: export it as nnU-Net says")
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except RuntimeError as error:
        raise DiffaugError(f"nnU-Net knows no dataset {dataset}: {error}") from error
    raw, preprocessed = Path(str(nnUNet_raw)) / name, Path(str(nnUNet_preprocessed)) / name
    for folder in (raw, preprocessed):
        if not folder.is_dir():
            raise DiffaugError(f"{folder} is missing: run nnUNetv2_plan_and_preprocess -d {dataset} first")
    return raw, preprocessed


def _plans(preprocessed: Path, plans: str, configuration: str) -> tuple[Any, Any]:
    file = preprocessed / f"{plans}.json"
    if not file.is_file():
        raise DiffaugError(f"{file} is missing: run nnUNetv2_plan_and_preprocess first, or give other plans")
    manager = PlansManager(str(file))
    if configuration not in manager.available_configurations:
        raise DiffaugError(
            f"{file} has no configuration {configuration}; it has "
            f"{', '.join(manager.available_configurations)}"
        )
    setup = manager.get_configuration(configuration)
    if setup.previous_stage_name is not None:
        raise DiffaugError(
            f"{configuration} continues the predictions of {setup.previous_stage_name}, which entries of a "
            "bank do not have: prepare another configuration"
        )
    return manager, setup


def _turned(array: NDArray[Any]) -> NDArray[Any]:
    """`(C, I, J, K)` to nnU-Net's axes `(C, K, J, I)`, and back."""
    return np.ascontiguousarray(array.transpose(0, 3, 2, 1))


def _check_scan(case: BankCase, bank: Bank, images: Sequence[str], data: NDArray[Any], manager: Any) -> None:
    """Refuse a scan that the bank was not built for, and a reader that does more than turn nibabel's axes
    round: entries would lie elsewhere."""
    scan = read_scan([Path(file) for file in images]).image
    bank.check(case, [scan], images[0])
    own = _turned(scan)
    if own.shape != data.shape or not np.allclose(own, data, rtol=1e-4, atol=1e-4 * np.abs(data).max()):
        raise DiffaugError(
            f"{manager.image_reader_writer_class.__name__} reads {images[0]} in other axes than it is stored "
            "in: banks support nnU-Net's readers that do not reorient (SimpleITKIO, NibabelIO)"
        )


def _is_made(target: Path, name: str, k: int) -> bool:
    return (target / f"{name}__{k}.pkl").exists()


def _save(
    target: Path,
    name: str,
    data: NDArray[Any],
    seg: NDArray[Any],
    properties: dict[str, Any],
    how: tuple[Any, Any, Any],
) -> None:
    """Preprocess one entry and write it, whole or not at all."""
    manager, setup, description = how
    kind = setup.preprocessor_class

    class FromMemory(kind):  # type: ignore[misc,valid-type]
        """The plans' preprocessor, with an entry in the place of a case's files."""

        def run_case(self, *_: Any) -> Any:
            return self.run_case_npy(data, seg, properties, manager, setup, description)

    work = target / f".tmp-{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        FromMemory(verbose=False).run_case_save(str(work / name), [], "", manager, setup, description)
        for ending in ENDINGS:
            (work / f"{name}{ending}").replace(target / f"{name}{ending}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
