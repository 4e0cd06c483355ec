"""Sizes of latent diffusion's networks and their process, which verbs and samplers they have."""

from math import prod
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from diffaug.generators.latent_diffusion.sizes import AutoencoderKLSizes, ControlNetSizes, DiffusionUNetSizes
from diffaug.generators.processes import MONAI_EULER


class DiscreteProcess(BaseModel):
    """Diffusion in discrete steps with scaled linear betas; the denoiser predicts the noise."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["discrete"] = "discrete"
    steps: int = Field(default=1000, ge=1)
    beta_start: float = Field(default=0.0015, gt=0, lt=1)
    beta_end: float = Field(default=0.0195, gt=0, lt=1)


class FlowProcess(BaseModel):
    """Rectified flow; the denoiser predicts the velocity from noise to data at times up to `steps`."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["flow"] = "flow"
    steps: int = Field(default=1000, ge=1)
    shifts: bool = Field(default=True, description="trained at higher noise the larger its latents were")


class LatentDiffusionNetworks(BaseModel):
    """Sizes of MONAI's latent diffusion networks (of bundles, MAISI and NV-Generate), and what was frozen
    with them.

    The denoiser may see, beside the latent, the card's parameters: as constant maps and as the context of its
    cross-attention (`conditions`, in this order), as the class of its embedding (`modality`), or as the body
    regions at both ends (`top_region`, `bottom_region`). The spacing that it may see is the grid's.
    """

    model_config = ConfigDict(extra="forbid")
    architecture: ClassVar[str] = "latent-diffusion"
    autoencoder: AutoencoderKLSizes
    denoiser: DiffusionUNetSizes
    control: ControlNetSizes | None = Field(default=None, description="by which label maps are painted")
    process: Annotated[DiscreteProcess | FlowProcess, Field(discriminator="kind")]
    shape: tuple[int, int, int] = Field(description="of the volumes, in the grid's axes")
    spacing: tuple[float, float, float] = Field(description="mm, as the denoiser is told it")
    scale_factor: float = Field(default=1.0, gt=0, description="of latents to the denoiser's")
    conditions: tuple[str, ...] = ()
    label_ids: tuple[int, ...] = Field(default=(), description="that `control` knows, 0 first")
    window: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        default=None, description="of the latent, which the autoencoder works on at once; None: all of it"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        latent, denoiser, more = self.autoencoder.latent_channels, self.denoiser, len(self.conditions)
        if (denoiser.in_channels, denoiser.out_channels) != (latent + more, latent):
            raise ValueError(
                f"the denoiser maps {denoiser.in_channels} to {denoiser.out_channels} channels; with a "
                f"latent of {latent} channels and {more} conditions it must map {latent + more} to {latent}"
            )
        if denoiser.with_conditioning and denoiser.cross_attention_dim != more:
            raise ValueError(f"cross-attention to {denoiser.cross_attention_dim} values, not {more}")
        multiple = self.autoencoder.factor * denoiser.factor
        if any(n % multiple for n in self.shape):
            raise ValueError(f"the shape must be multiples of {multiple}, got {self.shape}")
        if (self.control is None) != (not self.label_ids):
            raise ValueError("control and label_ids go together")
        if self.control is not None:
            if len(self.control.embedding_channels) != len(self.autoencoder.channels):
                raise ValueError("the control's embedding does not come down to the latent")
            if self.conditions:
                raise ValueError("the control does not see conditions")
            if not 0 <= min(self.label_ids) <= max(self.label_ids) < 2**self.control.bits:
                raise ValueError(f"label_ids must lie between 0 and {2**self.control.bits - 1}")
        return self

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.autoencoder.in_channels

    @property
    def downsampling(self) -> tuple[int, int, int]:
        """Voxels for each point of the latent, on each axis."""
        return (self.autoencoder.factor,) * 3

    @property
    def classes(self) -> int:
        """Labels with the background; 0 for none."""
        return len(self.label_ids)

    @property
    def guided(self) -> bool:
        """Whether there is something that guidance can give weight to: the modality."""
        return self.denoiser.num_class_embeds is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of the latent."""
        i, j, k = (n // self.autoencoder.factor for n in self.shape)
        return i, j, k

    @property
    def autoencoder_bytes(self) -> int:
        """About the memory that the autoencoder takes at work."""
        voxels = prod(self.autoencoder_window) * self.autoencoder.factor**3
        return self.autoencoder.working_bytes(voxels)

    @property
    def autoencoder_window(self) -> tuple[int, int, int]:
        """What of the latent the autoencoder works on at once."""
        i, j, k = (
            min(n, m) for n, m in zip(self.window or self.latent_shape, self.latent_shape, strict=True)
        )
        return i, j, k

    @property
    def working_bytes(self) -> int:
        """About the memory that sampling takes beside the weights."""
        denoising = self.denoiser.working_bytes(prod(self.latent_shape))
        if self.control is not None:
            denoising += self.control.working_bytes(prod(self.shape))
        return max(self.autoencoder_bytes, denoising)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what the denoiser is told and a user chooses."""
        regions = ("top_region", "bottom_region") if self.denoiser.regions else ()
        modality = ("modality",) if self.denoiser.num_class_embeds else ()
        return (*self.conditions, *regions, *modality)

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that there are, the usual one first."""
        if self.process.kind == "flow":
            return "euler", "heun", "adams-bashforth", MONAI_EULER
        return "ddim", "dpm-solver++", "ancestral"

    @property
    def verbs(self) -> frozenset[str]:
        """What these networks can do. Those that paint label maps do not make them: they sample no cases."""
        return frozenset({"paint" if self.control else "sample", "vary", "inpaint", "encode", "decode"})

    @property
    def most_steps(self) -> int | None:
        """The most sampler steps there can be."""
        return self.process.steps

    def steps_of(self, sampler: str) -> int:
        """All steps for ancestral sampling, 50 for DDIM, 20 for DPM-Solver++, 30 for a flow."""
        usual = {"ancestral": self.process.steps, "ddim": 50, "dpm-solver++": 20}
        return min(self.process.steps, usual.get(sampler, 30))
