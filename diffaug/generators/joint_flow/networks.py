"""Sizes of joint flow's networks, which verbs and samplers they have."""

from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import DenoiserConfig
from diffaug.generators.verbs import VERBS


class JointFlowNetworks(BaseModel):
    """Sizes of the joint-flow networks."""

    model_config = ConfigDict(extra="forbid")
    architecture: ClassVar[str] = "joint-flow"
    parameters: ClassVar[tuple[str, ...]] = ()
    image_autoencoder: AutoencoderConfig
    label_autoencoder: AutoencoderConfig | None
    denoiser: DenoiserConfig

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        image, label, denoiser = self.image_autoencoder, self.label_autoencoder, self.denoiser
        if denoiser.image_channels != image.latent_channels:
            raise ValueError(
                "the denoiser's image_channels differ from the image autoencoder's latent_channels"
            )
        if denoiser.label_channels != (label.latent_channels if label else 0):
            raise ValueError(
                "the denoiser's label_channels differ from the label autoencoder's latent_channels"
            )
        if label and label.downsampling != image.downsampling:
            raise ValueError("the two autoencoders differ in their downsampling")
        # What the networks' own sizes do not allow is an error here already, not when they are built.
        for autoencoder in filter(None, (image, label)):
            _ = autoencoder.levels
        _ = denoiser.tokens
        return self

    @property
    def channels(self) -> int:
        """Image channels."""
        return self.image_autoencoder.channels

    @property
    def downsampling(self) -> tuple[int, int, int]:
        """Voxels for each point of the latent, on each axis."""
        return self.image_autoencoder.downsampling

    @property
    def classes(self) -> int:
        """Labels with the background; 0 for none."""
        return self.label_autoencoder.channels if self.label_autoencoder else 0

    @property
    def guided(self) -> bool:
        """Whether there is something that guidance can give weight to: the label."""
        return self.label_autoencoder is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the volumes."""
        latent = zip(self.denoiser.latent_shape, self.image_autoencoder.downsampling, strict=True)
        i, j, k = (n * factor for n, factor in latent)
        return i, j, k

    @property
    def samplers(self) -> tuple[str, ...]:
        """The samplers that there are, the usual one first."""
        return "adams-bashforth", "euler", "heun"

    @property
    def verbs(self) -> frozenset[str]:
        """What these networks can do."""
        return frozenset(VERBS if self.label_autoencoder else set(VERBS) - {"paint", "segment"})

    @property
    def most_steps(self) -> int | None:
        """The most sampler steps there can be; None for any number."""
        return None

    def steps_of(self, sampler: str) -> int | None:
        """Usual steps of a sampler; None where they are those of any other."""
        return None
