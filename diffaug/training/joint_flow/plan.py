"""The plan of a joint-flow fit."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import DenoiserConfig
from diffaug.training.plan import PlanBase


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
    snapshots: int = Field(
        default=0, ge=0, description="averaged weights to keep in private/snapshots, at even distances"
    )

    @property
    def snapshot_steps(self) -> list[int]:
        """Numbers of steps after which the averaged weights are kept; the last is that of all steps."""
        return [self.steps * (n + 1) // self.snapshots for n in range(self.snapshots)]


class JointFlowPlan(PlanBase):
    """Two autoencoders and a denoiser of both latents."""

    architecture: Literal["joint-flow"] = "joint-flow"
    image_autoencoder: AutoencoderConfig
    label_autoencoder: AutoencoderConfig | None
    denoiser: DenoiserConfig
    autoencoder_training: AutoencoderTraining
    denoiser_training: DenoiserTraining

    def problems(self) -> list[str]:
        """What in the plan does not fit the rest of it."""
        problems = []
        downsampling = self.image_autoencoder.downsampling
        latent = tuple(n // d for n, d in zip(self.grid.shape, downsampling, strict=True))
        if (
            any(n % d for n, d in zip(self.grid.shape, downsampling, strict=True))
            or latent != self.denoiser.latent_shape
        ):
            problems.append(
                f"grid.shape {self.grid.shape} divided by downsampling {downsampling} is not "
                f"denoiser.latent_shape {self.denoiser.latent_shape}"
            )
        label = self.label_autoencoder
        if label is not None and label.downsampling != downsampling:
            problems.append("image_autoencoder and label_autoencoder must have the same downsampling")
        expected = (self.image_autoencoder.latent_channels, label.latent_channels if label else 0)
        if (self.denoiser.image_channels, self.denoiser.label_channels) != expected:
            problems.append(f"denoiser.image_channels and label_channels must be {expected}")
        return problems
