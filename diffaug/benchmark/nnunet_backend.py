"""Cells of a benchmark by real nnU-Net: its planning, preprocessing, training and prediction.

The dataset is planned once. Each cell gets a folder of preprocessed data of its own, made of links, with its
labelled cases as the only fold; transforms come from a bank, pretrained weights by `-pretrained_weights`.
Networks keep their random initial weights: nnU-Net has no seed for them.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray

from diffaug.bank import build_bank
from diffaug.benchmark.config import Arm
from diffaug.benchmark.operations import operation_of
from diffaug.datasets.layouts import LAYOUTS
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json, read_json
from diffaug.nnunet.settings import FILE, STEPS

NUMBER = 900
PLANS, CONFIGURATION = "nnUNetPlans", "3d_fullres"
FOLDERS = ("raw", "preprocessed", "results")


def home(work: Path) -> Path:
    """Of nnU-Net's folders in a benchmark's."""
    return work / "nnunet"


def plans_file(work: Path, name: str) -> Path:
    """The plans of the benchmark's dataset."""
    return home(work) / "preprocessed" / dataset_name(name) / f"{PLANS}.json"


def dataset_name(name: str) -> str:
    """Of a benchmark in nnU-Net."""
    words = "".join(word.capitalize() for word in name.split("-"))
    return f"Dataset{NUMBER}_{words}"


def plan(
    dataset: Dataset, training: Sequence[CaseFiles], scored: Sequence[CaseFiles], work: Path, name: str
) -> Path:
    """Write the raw dataset, plan and preprocess it, once; returns the plans file."""
    folder = home(work)
    folder.mkdir(parents=True, exist_ok=True)
    file, done = plans_file(work, name), folder / "planned"
    whole = json.dumps([[case.name for case in training], [case.name for case in scored]])
    with FileLock(folder / ".lock"):
        if done.exists() and done.read_text() != whole:
            raise DiffaugError(f"{folder} was planned for other cases: give another output, or remove it")
        if not done.exists():
            for part in FOLDERS:
                shutil.rmtree(folder / part, ignore_errors=True)
            raw = folder / "raw" / dataset_name(name)
            for case in training:
                _write_case(case, raw, "imagesTr", "labelsTr")
            for case in scored:
                _write_case(case, raw, "imagesTs", None)
            labels = {label: number for number, label in sorted(dataset.labels.items())}
            if list(labels.values()) != list(range(len(labels))):
                raise DiffaugError(f"nnU-Net needs labels 0, 1, 2, ...; {dataset.root} has {labels}")
            atomic_write_json(
                raw / "dataset.json",
                {
                    "channel_names": {str(n): channel for n, channel in enumerate(dataset.channels)},
                    "labels": labels,
                    "numTraining": len(training),
                    "file_ending": ".nii.gz",
                },
            )
            command = ["nnUNetv2_plan_and_preprocess", "-d", str(NUMBER), "-c", CONFIGURATION]
            run([*command, "-np", "1", "-npfp", "1"], folder)
            done.write_text(whole)
    return file


def train_and_predict(
    arm: Arm,
    generator: str,
    cases: Sequence[CaseFiles],
    steps: int,
    weights: Path | None,
    seed: int,
    work: Path,
    name: str,
    cell: str,
) -> dict[str, NDArray[np.int16]]:
    """Train on some cases and predict the scored ones: label maps `(1, I, J, K)` by case.

    Args:
        weights: `nnunet.pth` of a pretraining, or None.
        steps: iterations of nnU-Net.
        cell: names its folder.
    """
    shared, own = home(work), home(work) / "cells" / cell
    shutil.rmtree(own, ignore_errors=True)
    dataset = dataset_name(name)
    _link(shared / "raw", own / "raw")
    preprocessed = own / "preprocessed" / dataset
    preprocessed.mkdir(parents=True)
    for entry in sorted((shared / "preprocessed" / dataset).iterdir()):
        _link(entry, preprocessed / entry.name)
    names = [case.name for case in cases]
    # nnU-Net wants somebody to validate on; nothing is decided by it.
    atomic_write_json(preprocessed / "splits_final.json", [{"train": names, "val": names[:1]}])
    trainer = "nnUNetTrainerSteps"
    if arm.transforms:
        trainer = "nnUNetTrainerDiffAugSteps"
        _prepare_bank(arm, generator, names, seed, own, dataset)
    environment = {STEPS: str(steps)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = [
        "nnUNetv2_train",
        str(NUMBER),
        CONFIGURATION,
        "0",
        "-tr",
        trainer,
        "-p",
        PLANS,
        "-device",
        device,
    ]
    if weights is not None:
        train += ["-pretrained_weights", str(weights)]
    run(train, own, environment)
    out = own / "predictions"
    predict = ["nnUNetv2_predict", "-i", str(shared / "raw" / dataset / "imagesTs"), "-o", str(out)]
    predict += ["-d", str(NUMBER), "-c", CONFIGURATION, "-p", PLANS, "-f", "0", "-tr", trainer]
    run([*predict, "--disable_tta", "-npp", "1", "-nps", "1", "-device", device], own, environment)
    found = {}
    for file in sorted(out.glob("*.nii.gz")):
        volume: Any = nib.load(file)
        found[file.name.removesuffix(".nii.gz")] = np.asarray(volume.dataobj).astype(np.int16)[None]
    shutil.rmtree(own)
    return found


def _prepare_bank(arm: Arm, generator: str, names: Sequence[str], seed: int, own: Path, dataset: str) -> None:
    """Variants of the labelled cases, as nnU-Net preprocesses them."""
    (use,) = arm.transforms
    raw = read_dataset(own / "raw" / dataset)
    few = Dataset(**(vars(raw) | {"cases": tuple(case for case in raw.cases if case.name in set(names))}))
    operation = operation_of(use, generator)
    build_bank(operation, few, own / "bank", per_case=use.variants, seed=seed)
    command = ["diffaug", "nnunet", "prepare", str(NUMBER), "--bank", str(own / "bank")]
    run([*command, "--probability", str(use.probability)], own)
    settings = own / "preprocessed" / dataset / FILE
    # The fold's validation case is one that trains; the scored cases are checked by the benchmark.
    atomic_write_json(settings, json.loads(settings.read_text().replace('"refuse"', '"warn"')))


def run(command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command with nnU-Net's folders in `folder`; its output goes to `log.txt` there.

    Raises:
        DiffaugError: it failed; with the end of its output.
    """
    import diffaug

    scripts = Path(sys.executable).parent
    settings = {f"nnUNet_{part}": str(folder / part) for part in FOLDERS}
    settings |= {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0" if "train" in command[0] else "1"}
    settings["nnUNet_extTrainer"] = str(Path(diffaug.__file__).parent / "nnunet" / "shim")
    settings["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}"
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            command, env=os.environ | settings | (environment or {}), stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        end = "\n".join((folder / "log.txt").read_text(encoding="utf-8").splitlines()[-15:])
        raise DiffaugError(f"{' '.join(command)} failed; the end of {folder / 'log.txt'}:\n{end}")


def _write_case(case: CaseFiles, raw: Path, images: str, labels: str | None) -> None:
    """A case in nnU-Net's raw layout: its own files where they are that already."""
    (raw / images).mkdir(parents=True, exist_ok=True)
    single = all(file.name.endswith(".nii.gz") and len(nib.load(file).shape) == 3 for file in case.images)  # type: ignore[attr-defined]
    if single:
        for channel, file in enumerate(case.images):
            _link(file, raw / images / f"{case.name}_{channel:04d}.nii.gz")
    else:
        loaded = load_case(case)
        paths = LAYOUTS["nnunet"].image_paths(case.name, len(loaded.image))
        for channel, path in zip(loaded.image, paths, strict=True):
            nib.save(nib.Nifti1Image(channel, loaded.affine), raw / images / Path(path).name)
    if labels is not None and case.label is not None:
        (raw / labels).mkdir(parents=True, exist_ok=True)
        _link(case.label, raw / labels / f"{case.name}.nii.gz")


def _link(source: Path, target: Path) -> None:
    """A symbolic link, or a copy of a small JSON file, which a cell may change."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json":
        shutil.copy(source, target)
    else:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def read_plans(file: Path) -> str:
    """The architecture and geometry of the plans, by which cells are compared."""
    own = read_json(file)["configurations"][CONFIGURATION]
    return json.dumps({key: own[key] for key in ("architecture", "spacing", "patch_size")}, sort_keys=True)
