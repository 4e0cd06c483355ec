"""The plan of a fit: everything that decides the result, written where a user can read and edit it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffaug.errors import DiffaugError
from diffaug.generators.autoencoder import AutoencoderConfig
from diffaug.generators.denoiser import DenoiserConfig
from diffaug.generators.intensity import IntensityConvention
from diffaug.training.augmentation import AugmentationConfig


class GridPlan(BaseModel):
    """Orientation (axis codes), spacing (mm) and shape (voxels) of the generator's grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    orientation: tuple[str, str, str] = ("R", "A", "S")
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]


class AutoencoderTraining(BaseModel):
    """How long and how the two autoencoders are trained (together, on augmented volumes)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=0, description="0 keeps the autoencoders of the generator to start from")
    batch: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    latent_noise: float = Field(default=0.1, ge=0)
    gradient_weight: float = Field(default=0.5, ge=0, description="weight of the finite-difference term")


class DenoiserTraining(BaseModel):
    """How long and how the denoiser is trained, on cached latents of augmented volumes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=6e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    decay_fraction: float = Field(
        default=0.4, ge=0, le=1, description="last part of the run in which the rate falls to 0"
    )
    ema: float = Field(default=0.9995, ge=0, lt=1)
    rounds: int = Field(ge=1, description="augmented encodings of every training case in the latent cache")
    label_weight: float = Field(default=1.0, ge=0)


class Plan(BaseModel):
    """A complete plan. Nothing later depends on the clock: the iterations are fixed here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str
    grid: GridPlan
    extent: Literal["object", "patch"] = "object"
    channels: list[str]
    labels: dict[int, str]
    intensity: IntensityConvention
    image_autoencoder: AutoencoderConfig
    label_autoencoder: AutoencoderConfig | None
    denoiser: DenoiserConfig
    augmentation: AugmentationConfig
    autoencoder_training: AutoencoderTraining
    denoiser_training: DenoiserTraining
    evaluate_every: int = Field(default=200, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)
    seed: int = 0
    budget: float | None = Field(default=None, description="seconds of training that were planned for")
    init: str | None = Field(default=None, description="hash of the weights that the training starts from")


def read_plan(path: Path) -> Plan:
    """Read a plan that `diffaug fit --dry-run` wrote and perhaps a user edited.

    Raises:
        DiffaugError: names the file and every field that is wrong.
    """
    try:
        return Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise DiffaugError(f"cannot read the plan {path}: {error}") from error
    except ValidationError as error:
        lines = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise DiffaugError(f"the plan {path} is not valid:\n{lines}") from error
