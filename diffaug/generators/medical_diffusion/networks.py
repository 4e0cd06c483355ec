"""Sizes of Medical Diffusion's networks, which verbs and samplers they have."""

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
from diffaug.generators.medical_diffusion.vqgan import VQGANConfig


class MedicalDiffusionNetworks(BaseModel):
    """Sizes of the Medical Diffusion networks (VQ-GAN and discrete-time diffusion), and its frozen scale.

    A denoiser that sees twice the latent's channels and one more is DiffTumor's (Chen et al. 2024): it
    inpaints, given the latent of the masked image and the mask.
    """

    model_config = ConfigDict(extra="forbid")
    architecture: ClassVar[str] = "medical-diffusion"
    parameters: ClassVar[tuple[str, ...]] = ()
    autoencoder: VQGANConfig
    denoiser: UNetConfig
    shape: tuple[int, int, int] = Field(description="of the volumes, in the grid's axes")
    axes: tuple[int, int, int] = Field(
        default=(2, 0, 1), description="the grid's axes that the networks take for depth, height and width"
    )
    steps: int = Field(default=300, ge=1, description="steps of the diffusion process, T")
    latent_range: tuple[float, float] = Field(
        description="codes of these values are -1 and 1 to the denoiser: once the codebook's extremes"
    )
    clip: bool = Field(default=True, description="the sampler clips estimates of the clean latent to [-1, 1]")
    bfloat16: bool = Field(
        default=False, description="trained in mixed precision, and used so where the hardware has bfloat16"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        latent, denoiser = self.autoencoder.latent_channels, self.denoiser
        if denoiser.out_channels != latent or denoiser.channels not in (latent, 2 * latent + 1):
            raise ValueError(
                f"the denoiser maps {denoiser.channels} to {denoiser.out_channels} channels; with a latent "
                f"of {latent} channels it must map {latent}, or {2 * latent + 1} (inpainting), to {latent}"
            )
        if sorted(self.axes) != [0, 1, 2]:
            raise ValueError(f"axes must name each of 0, 1 and 2 once, got {self.axes}")
        if not self.latent_range[0] < self.latent_range[1]:
            raise ValueError(f"latent_range must be (low, high) with low < high, got {self.latent_range}")
        return self

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.autoencoder.channels

    @property
    def classes(self) -> int:
        """It knows no labels."""
        return 0

    @property
    def guided(self) -> bool:
        """There is nothing that guidance could give weight to."""
        return False

    @property
    def masked(self) -> bool:
        """Whether the denoiser is given the masked image and the mask."""
        return self.denoiser.channels > self.autoencoder.latent_channels

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that there are, the usual one first; ancestral sampling begins at the last step, from
        which there is no way without clipping."""
        return ("ancestral", "ddim", "dpm-solver++") if self.clip else ("ddim", "dpm-solver++")

    @property
    def verbs(self) -> frozenset[str]:
        """What these networks can do."""
        return frozenset({"inpaint", "encode", "decode"} | (set() if self.masked else {"sample", "vary"}))

    @property
    def most_steps(self) -> int | None:
        """The most sampler steps there can be."""
        return self.steps

    def steps_of(self, sampler: str) -> int:
        """All steps for ancestral sampling, 50 for DDIM, 20 for DPM-Solver++."""
        return min(self.steps, {"ancestral": self.steps, "ddim": 50, "dpm-solver++": 20}[sampler])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of the latent: depth, height, width."""
        return self.autoencoder.latent_shape([self.shape[axis] for axis in self.axes])
