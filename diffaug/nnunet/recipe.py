"""Supervised pretraining inside nnU-Net: the plans of one dataset carried to another, on which it begins."""

import shutil
from pathlib import Path
from typing import NamedTuple

from diffaug.errors import DiffaugError, ExtraError
from diffaug.files import atomic_path, read_json

try:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        preprocess_dataset,
    )
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
    from nnunetv2.utilities.dataset_name_id_conversion import (
        convert_dataset_name_to_id,
        maybe_convert_to_dataset_name,
    )
except ImportError as error:
    raise ExtraError("nnU-Net", "nnunet") from error


class Recipe(NamedTuple):
    """Names of both datasets, the plans under which the first trains, and the two commands that follow."""

    pretraining: str
    finetuning: str
    plans: str
    commands: tuple[str, str]


def prepare_pretraining(
    finetuning: int | str,
    pretraining: int | str,
    *,
    plans: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    processes: int = 1,
) -> Recipe:
    """Preprocess a dataset by the plans of another, so that the networks of both are the same.

    Does what nnU-Net's documentation does by hand: fingerprint of the pretraining dataset, plans moved,
    preprocessing.

    Args:
        finetuning: id or name of the dataset that is in the end trained on; it has been planned.
        pretraining: id or name of the dataset that comes first, such as a synthetic one; raw is enough.
        plans: of the first.
        configuration: that will be trained.
        processes: of the preprocessing.

    Raises:
        DiffaugError: a dataset is not there or not planned, or channels differ.
    """
    names = [_name(dataset) for dataset in (finetuning, pretraining)]
    fine, pre = names
    planned = Path(str(nnUNet_preprocessed)) / fine / f"{plans}.json"
    if not planned.is_file():
        raise DiffaugError(f"{planned} does not exist: run nnUNetv2_plan_and_preprocess for {fine} first")
    configurations = read_json(planned)["configurations"]
    if configuration not in configurations:
        raise DiffaugError(
            f"{planned} has no configuration {configuration}; it has {', '.join(sorted(configurations))}"
        )
    described = [read_json(Path(str(nnUNet_raw)) / name / "dataset.json") for name in names]
    channels = [list(one["channel_names"].values()) for one in described]
    if len(channels[0]) != len(channels[1]):
        raise DiffaugError(f"{fine} has the channels {channels[0]}, {pre} {channels[1]}: they must be alike")
    number = convert_dataset_name_to_id(pre)
    own = f"{plans}Of{convert_dataset_name_to_id(fine):03d}"
    # Planning would copy the description, too.
    with atomic_path(Path(str(nnUNet_preprocessed)) / pre / "dataset.json") as temporary:
        shutil.copy(Path(str(nnUNet_raw)) / pre / "dataset.json", temporary)
    extract_fingerprint_dataset(number, num_processes=processes, clean=False, show_progress_bar=False)
    move_plans_between_datasets(fine, pre, plans, own)
    preprocess_dataset(number, own, (configuration,), (processes,), show_progress_bar=False)
    trained = f"nnUNetTrainer__{own}__{configuration}"
    checkpoint = Path(str(nnUNet_results)) / pre / trained / "fold_all" / "checkpoint_final.pth"
    return Recipe(
        pre,
        fine,
        own,
        (
            f"nnUNetv2_train {number} {configuration} all -p {own}",
            f"nnUNetv2_train {convert_dataset_name_to_id(fine)} {configuration} 0 -p {plans} "
            f"-pretrained_weights {checkpoint}",
        ),
    )


def _name(dataset: int | str) -> str:
    """The dataset's name in nnU-Net.

    Raises:
        DiffaugError: there is none in nnUNet_raw.
    """
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise DiffaugError(f"nnU-Net knows no dataset {dataset}: {error}") from error
    if not (Path(str(nnUNet_raw)) / name / "dataset.json").is_file():
        raise DiffaugError(
            f"{Path(str(nnUNet_raw)) / name} has no dataset.json: set nnUNet_raw to its folder"
        )
    return name
