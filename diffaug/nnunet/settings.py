"""What a trainer needs to know, in one file: `nnUNet_preprocessed/DATASET/diffaug.json`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json

FILE = "diffaug.json"
# Environment variable by which `nnUNetTrainerSteps` is told its number of iterations.
STEPS = "DIFFAUG_NNUNET_STEPS"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BankChoice(_Part):
    """A bank as one configuration of nnU-Net preprocesses it.

    Attributes:
        folder: name of the folder of entries beside this file.
        probability: that an entry comes instead of a training case; may be edited.
        per_case: entries of each case.
        cases: cases that have entries.
        bank: SHA-256 of the bank's settings.
        generator: name; weights: hash.
        trained_generator: cases whose scans trained the generator; None where that is unknown.
        leaks: what a trainer does where such a case validates: "refuse", or "warn"; may be edited.
    """

    folder: str = Field(pattern=r"^[^/\\]+$")
    probability: float = Field(ge=0, le=1)
    per_case: int = Field(ge=1)
    cases: list[str]
    bank: str
    generator: str
    weights: str
    trained_generator: list[str] | None
    leaks: Literal["refuse", "warn"] = "refuse"


class OnlineChoice(_Part):
    """A generator that varies patches in the training step.

    Attributes:
        generator: name in the zoo, or folder; weights: hash.
        probability: of a variation, per patch; may be edited.
        strength: its range; None is the card's.
        label_mapping: ids of the dataset to the generator's.
        axes: directions of the raw images' axes, such as ["L", "A", "S"].
        trained_generator, leaks: as for `BankChoice`.
    """

    generator: str
    weights: str
    probability: float = Field(ge=0, le=1)
    strength: tuple[float, float] | None = None
    label_mapping: dict[int, int] = {}
    axes: tuple[str, str, str]
    trained_generator: list[str] | None
    leaks: Literal["refuse", "warn"] = "refuse"


class TrainerSettings(_Part):
    """Banks by plans and configuration, such as "nnUNetPlans__3d_fullres", for nnUNetTrainerDiffAug; and the
    generator for nnUNetTrainerDiffAugGPU."""

    format: Literal[1] = 1
    banks: dict[str, BankChoice] = {}
    online: OnlineChoice | None = None


def read_settings(folder: Path) -> TrainerSettings:
    """The settings in a preprocessed dataset's folder; empty ones where there are none.

    Raises:
        DiffaugError: the file is damaged, or was edited to what cannot be; names the field.
    """
    file = folder / FILE
    if not file.exists():
        return TrainerSettings()
    try:
        return TrainerSettings.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DiffaugError(f"{file} cannot be used: {error}") from error


def write_settings(folder: Path, settings: TrainerSettings) -> None:
    """Write the settings, whole or not at all."""
    atomic_write_json(folder / FILE, settings.model_dump(mode="json"))


def bank_key(plans: str, configuration: str) -> str:
    """How settings name a configuration."""
    return f"{plans}__{configuration}"
