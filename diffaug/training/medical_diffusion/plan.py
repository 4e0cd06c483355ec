"""The plan of a Medical Diffusion fit."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
from diffaug.generators.medical_diffusion.vqgan import VQGANConfig
from diffaug.training.plan import PlanBase


class AutoencoderTraining(BaseModel):
    """How long and how the VQ-GAN is trained; the weights of the losses are those of the published runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=0, description="0 keeps the autoencoder of the generator to start from")
    batch: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    decay_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="last part of the run in which the autoencoder's rate falls to 0",
    )
    reconstruction_weight: float = Field(default=4.0, ge=0)
    commitment_weight: float = Field(default=0.25, ge=0)
    feature_weight: float = Field(default=4.0, ge=0, description="of feature matching")
    discriminator_start: int = Field(ge=0, description="step from which the discriminators take part")
    discriminator_norm: Literal["group", "batch"] = Field(
        default="group", description="batch is the authors'; with 2 cases a batch it is noisy"
    )
    perceptual_weight: float = Field(default=4.0, ge=0, description="of LPIPS, where its weights are given")
    perceptual: tuple[str, ...] = Field(
        default=(), description="SHA-256 of the files with the weights of LPIPS; none: no such loss"
    )


class DenoiserTraining(BaseModel):
    """How long and how the denoiser is trained, on cached latents of augmented volumes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    decay_fraction: float = Field(
        default=0.4, ge=0, le=1, description="last part of the run in which the rate falls to 0"
    )
    ema: float = Field(default=0.9995, ge=0, lt=1)
    rounds: int = Field(ge=1, description="augmented encodings of every training case in the latent cache")


class MedicalDiffusionPlan(PlanBase):
    """A VQ-GAN and a denoiser of its latents. It knows no labels: `labels` stays empty."""

    architecture: Literal["medical-diffusion"] = "medical-diffusion"
    preset: str | None = None
    autoencoder: VQGANConfig
    denoiser: UNetConfig
    axes: tuple[int, int, int] = Field(
        default=(2, 0, 1), description="the grid's axes that the networks take for depth, height and width"
    )
    diffusion_steps: int = Field(default=300, ge=1)
    autoencoder_training: AutoencoderTraining
    denoiser_training: DenoiserTraining

    def problems(self) -> list[str]:
        """What in the plan does not fit the rest of it."""
        problems = []
        latent = self.autoencoder.latent_channels
        if (self.denoiser.channels, self.denoiser.out_channels) != (latent, latent):
            problems.append(
                f"denoiser.channels and out_channels must be autoencoder.latent_channels, {latent}"
            )
        if self.autoencoder.channels != len(self.channels):
            problems.append(
                f"autoencoder.channels is {self.autoencoder.channels} for the channels {self.channels}"
            )
        if sorted(self.axes) != [0, 1, 2]:
            problems.append(f"axes must name each of 0, 1 and 2 once, not {self.axes}")
        if self.autoencoder_training.perceptual and min(self.grid.shape) < 16:
            problems.append(f"LPIPS needs slices of at least 16 x 16 voxels, grid.shape is {self.grid.shape}")
        return problems
