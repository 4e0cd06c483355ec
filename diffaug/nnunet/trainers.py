"""The trainers, which nnU-Net finds by `export nnUNet_extTrainer=$(diffaug nnunet trainer-dir)`."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.errors import DiffaugError, ExtraError
from diffaug.files import atomic_path
from diffaug.nnunet.settings import FILE, STEPS, BankChoice, OnlineChoice, bank_key, read_settings
from diffaug.operations.sources import card_of
from diffaug.transforms.batch import BatchVariation

try:
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
    from batchgeneratorsv2.transforms.utils.random import RandomTransform
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
except ImportError as error:
    raise ExtraError("nnU-Net", "nnunet") from error


# The learning rate falls once an epoch.
STEPS_AN_EPOCH = 25


class _PredictableWithoutUs(nnUNetTrainer):  # type: ignore[misc]
    """Its checkpoints name `nnUNetTrainer`: they predict where diffaug is not installed."""

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net does, but for the trainer's name."""
        super().save_checkpoint(filename)
        if self.local_rank == 0 and not self.disable_checkpointing:
            # nnU-Net's own file, written a moment ago; it holds more than weights.
            checkpoint = torch.load(filename, map_location="cpu", weights_only=False)
            checkpoint["trainer_name"] = nnUNetTrainer.__name__
            with atomic_path(filename) as temporary:
                torch.save(checkpoint, temporary)

    def guard(self, choice: BankChoice | OnlineChoice, validation: Sequence[str]) -> None:
        """Refuse to validate on cases that trained the generator, or warn, as the settings say."""
        if self.fold == "all":
            return
        if choice.trained_generator is None:
            self.print_to_log_file(
                f"diffaug: it is unknown which scans trained {choice.generator}; if validation cases are "
                "among them, their scores say too much"
            )
            return
        leaks = sorted(set(validation) & set(choice.trained_generator))
        if not leaks:
            return
        file = Path(self.preprocessed_dataset_folder_base) / FILE
        message = (
            f"{len(leaks)} of {len(validation)} validation cases trained {choice.generator}, such as "
            f"{leaks[0]}: scores on them say too much. Write other folds with `diffaug splits`, or set leaks "
            f'to "warn" in {file}'
        )
        if choice.leaks == "refuse":
            raise DiffaugError(message)
        self.print_to_log_file(f"diffaug: WARNING: {message}")


class nnUNetTrainerDiffAug(_PredictableWithoutUs):  # noqa: N801
    """nnU-Net's trainer that draws a part of its training cases from a bank.

    With the probability in `diffaug.json` (see `diffaug nnunet prepare --bank`) an entry of the bank comes in
    the place of a training case, preprocessed alike; cropping, oversampling of the foreground and
    augmentation follow unchanged. Validation sees no entry.
    """

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's datasets; the training one draws from the bank."""
        folder = Path(self.preprocessed_dataset_folder_base)
        key = bank_key(self.plans_manager.plans_name, self.configuration_name)
        banks = read_settings(folder).banks
        if key not in banks:
            raise DiffaugError(
                f"{folder / FILE} names no bank for {key} (it has {', '.join(banks) or 'none'}): run "
                f"`diffaug nnunet prepare {self.plans_manager.dataset_name} --bank BANK` first"
            )
        choice = banks[key]
        training, validation = super().get_tr_and_val_datasets()
        self.guard(choice, validation.identifiers)
        names = [f"{name}__{k}" for name in choice.cases for k in range(choice.per_case)]
        entries = self.dataset_class(str(folder / choice.folder), names)
        training = DatasetWithBank(training, entries, choice)
        self.print_to_log_file(
            f"diffaug: with probability {choice.probability:g} one of {choice.per_case} variations by "
            f"{choice.generator} comes instead of a training case, for "
            f"{len(training.banked & set(training.identifiers))} of {len(training.identifiers)} cases"
        )
        return training, validation


class _Steps(nnUNetTrainer):  # type: ignore[misc]
    """For benchmarks: as many iterations as `DIFFAUG_NNUNET_STEPS` says, and no validation."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        steps = int(os.environ[STEPS])
        self.num_epochs = max(1, round(steps / STEPS_AN_EPOCH))
        self.num_iterations_per_epoch = max(1, round(steps / self.num_epochs))
        self.num_val_iterations_per_epoch = 1
        self.save_every = self.num_epochs + 1

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Scores come from elsewhere."""


class nnUNetTrainerSteps(_Steps):  # noqa: N801
    """nnU-Net's trainer for a benchmark's number of iterations."""


class nnUNetTrainerDiffAugSteps(_Steps, nnUNetTrainerDiffAug):  # noqa: N801
    """The same with a bank."""


class nnUNetTrainerDiffAugGPU(_PredictableWithoutUs):  # noqa: N801
    """nnU-Net's trainer that varies a part of the patches in the training step, on the training device.

    Patches are varied after nnU-Net's spatial and intensity transforms and before they are mirrored, which
    the generator may not know; what follows in nnU-Net's pipeline (mirroring, masks, regions, targets of deep
    supervision) is done after that, on the device. The settings are in `diffaug.json` (see `diffaug nnunet
    prepare --generator`).
    """

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's datasets, after a look at who validates."""
        training, validation = super().get_tr_and_val_datasets()
        self.guard(self.choice, validation.identifiers)
        return training, validation

    @cached_property
    def choice(self) -> OnlineChoice:
        """The settings."""
        folder = Path(self.preprocessed_dataset_folder_base)
        if (choice := read_settings(folder).online) is None:
            raise DiffaugError(
                f"{folder / FILE} names no generator: run `diffaug nnunet prepare "
                f"{self.plans_manager.dataset_name} --generator NAME` first"
            )
        return choice

    @cached_property
    def vary(self) -> BatchVariation:
        """The variation of a batch of patches."""
        card_of(self.choice.generator, self.choice.weights)
        flat = len(self.configuration_manager.patch_size) < 3
        if flat or self.is_cascaded or self.label_manager.has_ignore_label:
            raise DiffaugError(
                "nnUNetTrainerDiffAugGPU does not support 2d, cascades, or an ignore label, whose anatomy is "
                "unknown: use another configuration, or nnUNetTrainerDiffAug with a bank"
            )
        return BatchVariation(
            self.choice.generator,
            self.choice.probability,
            self.choice.strength,
            label_mapping=self.choice.label_mapping,
        )

    @cached_property
    def affine(self) -> NDArray[np.float64]:
        """Voxel to world of a patch, mm, but for its place."""
        return patch_affine(
            self.choice.axes, self.plans_manager.transpose_forward, self.configuration_manager.spacing
        )

    @cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        """Scale and offset `(C, 1, 1, 1)` from a patch's intensities to those that the generator knows."""
        channels = self.vary.operation.card.channels
        scale, offset = np.ones(len(channels)), np.zeros(len(channels))
        if self.vary.operation.card.intensity.kind == "window":
            schemes = self.configuration_manager.normalization_schemes
            if set(schemes) != {"CTNormalization"}:
                raise DiffaugError(
                    f"{self.choice.generator} needs calibrated units, and {', '.join(schemes)} does not "
                    "keep them: only CTNormalization can be taken back"
                )
            properties = self.plans_manager.foreground_intensity_properties_per_channel
            for n in range(len(channels)):
                scale[n], offset[n] = properties[str(n)]["std"], properties[str(n)]["mean"]
        both = torch.tensor(np.stack([scale, offset]), dtype=torch.float32, device=self.device)
        return both[0].view(-1, 1, 1, 1), both[1].view(-1, 1, 1, 1)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """The part of nnU-Net's pipeline that comes before a variation; the rest is kept for `train_step`."""
        transforms = super().get_training_transforms(*args, **kwargs).transforms
        before = (SpatialTransform, Convert2DTo3DTransform, Convert3DTo2DTransform, RandomTransform)
        cut = next(n for n, transform in enumerate(transforms) if not isinstance(transform, before))
        self.after = ComposeTransforms(transforms[cut:])
        return ComposeTransforms(transforms[:cut])

    @torch.no_grad()
    def finish(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Patches `(B, C, X, Y, Z)` and their label maps, varied and brought to the end of the pipeline."""
        scale, offset = self.units
        varied = self.vary(image * scale + offset, label[:, :1].clamp(min=0), self.affine)
        image = (varied - offset) / scale
        done = [self.after(image=i, segmentation=s) for i, s in zip(image, label, strict=True)]
        targets = [case["segmentation"] for case in done]
        image = torch.stack([case["image"] for case in done])
        if isinstance(targets[0], list):
            return image, [torch.stack(level) for level in zip(*targets, strict=True)]
        return image, torch.stack(targets)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, on varied patches."""
        data, target = (batch[name].to(self.device, non_blocking=True) for name in ("data", "target"))
        data, target = self.finish(data, target)
        return super().train_step({**batch, "data": data, "target": target})


def patch_affine(
    axes: Sequence[str], transpose_forward: Sequence[int], spacing: Sequence[float]
) -> NDArray[np.float64]:
    """Voxel-to-world affine (mm, RAS+) of nnU-Net's arrays, but for the place.

    Args:
        axes: directions of the image's axes as nibabel gives them, such as ("L", "A", "S").
        transpose_forward: of the plans: the axis (z, y, x) that each axis of an array comes from.
        spacing: of an array's axes, mm.
    """
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    directions = nib.orientations.axcodes2ornt(tuple(axes))
    for n, (source, size) in enumerate(zip(transpose_forward, spacing, strict=True)):
        # nnU-Net's readers give z, y, x: nibabel's axes from the last to the first.
        world, sign = directions[2 - source]
        affine[int(world), n] = sign * size
    return affine


class DatasetWithBank:
    """A dataset of nnU-Net's whose cases are now and then entries of a bank, preprocessed alike.

    Args:
        cases: the training cases.
        entries: a dataset of the same class on the bank's folder.
        choice: which cases have entries, how many, and how often one comes.
    """

    def __init__(self, cases: Any, entries: Any, choice: BankChoice) -> None:
        self.cases, self.entries = cases, entries
        self.identifiers: list[str] = cases.identifiers
        self.probability, self.per_case = choice.probability, choice.per_case
        self.banked = frozenset(choice.cases)

    def load_case(self, identifier: str) -> Any:
        """What nnU-Net's datasets give: image, segmentation, that of the previous stage, and properties."""
        # nnU-Net's loaders draw from numpy's global state, which each worker seeds.
        if identifier in self.banked and np.random.rand() < self.probability:
            return self.entries.load_case(f"{identifier}__{np.random.randint(self.per_case)}")
        return self.cases.load_case(identifier)

    def __getitem__(self, identifier: str) -> Any:
        return self.load_case(identifier)
