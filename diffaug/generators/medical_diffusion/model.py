"""Medical Diffusion (Khader et al. 2023, doi 10.1038/s41598-023-34341-2) as a model: VQ-GAN and diffusion in
its latent space.

Latents are `(B, Z, d, h, w)`: depth, height, width, continuous, with the codebook's range scaled to [-1, 1].
They are quantised only when they are decoded.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from diffaug.generators.diffusion import CosineSchedule
from diffaug.generators.hardware import exact_float32, has_bfloat16, mixed_precision
from diffaug.generators.medical_diffusion.factorised_unet import FactorisedUNet
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.medical_diffusion.vqgan import VQGAN
from diffaug.generators.model import Model, Sampling, latent_mask
from diffaug.generators.processes import DiscreteDiffusion
from diffaug.generators.seeds import CaseNoise

CITATION = (
    "Khader F et al. Denoising diffusion probabilistic models for 3D medical image generation. Scientific "
    "Reports 13:7303, 2023. doi:10.1038/s41598-023-34341-2"
)


class MedicalDiffusion(Model):
    """Sampling, varying and inpainting in latent space; it knows no labels."""

    files: Mapping[str, str] = {
        "autoencoder.safetensors": "autoencoder.",
        "denoiser.safetensors": "denoiser.",
    }
    stored_as = torch.float32

    def __init__(self, networks: MedicalDiffusionNetworks) -> None:
        super().__init__()
        self.networks = networks
        self.autoencoder = VQGAN(networks.autoencoder)
        self.denoiser = FactorisedUNet(networks.denoiser)
        clip = networks.clip
        self.process = DiscreteDiffusion(CosineSchedule(networks.steps), clip, inner=not clip)
        self.eval().requires_grad_(False)

    @property
    def image_latent(self) -> tuple[int, ...]:
        return self.networks.autoencoder.latent_channels, *self.networks.latent_shape

    # -- autoencoder -----------------------------------------------------------------------------------------

    def encode_image(self, image: Tensor) -> Tensor:
        with self._precision(self.autoencoder, image):
            z = self.autoencoder.encode(self._to_network(image))
        return scale(z.float(), self.networks.latent_range)

    def decode_image(self, latent: Tensor) -> Tensor:
        z = unscale(latent, self.networks.latent_range)
        with self._precision(self.autoencoder, latent):
            volume = self.autoencoder.decode(z, [self.networks.shape[axis] for axis in self.networks.axes])
        back = [2 + self.networks.axes.index(axis) for axis in range(3)]
        return volume.float().permute(0, 1, *back)

    def _to_network(self, volume: Tensor) -> Tensor:
        """The grid's axes to depth, height, width."""
        return volume.permute(0, 1, *(2 + axis for axis in self.networks.axes))

    # -- trajectories ----------------------------------------------------------------------------------------

    def sample(self, noise: CaseNoise, sampling: Sampling) -> tuple[Tensor, Tensor]:
        latent = self._make(noise.draw(self.image_latent), noise, sampling)
        return latent, latent[:, :0]

    def vary(
        self, clean: Tensor, strength: float, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        return self._make(noise.draw(self.image_latent), noise, sampling, clean=clean, strength=strength)

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """Where the denoiser is given the masked image and the mask it decides; otherwise the trajectory
        follows the noised latent of the image outside the mask."""
        start = noise.draw(self.image_latent)
        network_mask = self.autoencoder.pad(self._to_network(mask.float()))
        if self.networks.masked:
            # 0 is the middle of the intensity range, as in DiffTumor's training.
            seen = self.encode_image(image * (1 - mask.float()))
            # Nearest neighbour, -1 outside and 1 inside.
            region = nn.functional.interpolate(2 * network_mask - 1, size=self.networks.latent_shape)
            return self._make(start, noise, sampling, torch.cat([seen, region], dim=1))
        clean = self.encode_image(image)
        region = latent_mask(network_mask, self.networks.autoencoder.downsampling)
        return self._make(start, noise, sampling, clean=clean, mask=region)

    def _make(
        self,
        start: Tensor,
        noise: CaseNoise,
        sampling: Sampling,
        condition: Tensor | None = None,
        *,
        clean: Tensor | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """A latent; the denoiser sees `condition` beside it."""

        def predict(x: Tensor, step: int) -> Tensor:
            seen = x if condition is None else torch.cat([x, condition], dim=1)
            return self.denoiser(seen, torch.full((len(x),), step, device=x.device))

        with self._precision(self.denoiser, start):
            return self.process.make(
                predict, start, noise, sampling, clean=clean, strength=strength, mask=mask
            )

    def _precision(self, network: nn.Module, like: Tensor) -> AbstractContextManager[None]:
        """bfloat16 where the networks were trained so and the hardware has it; else true float32."""
        if self.networks.bfloat16:
            return mixed_precision(network, like.device, has_bfloat16(like.device))
        return exact_float32()


def scale(z: Tensor, latent_range: tuple[float, float]) -> Tensor:
    """The autoencoder's latents to the denoiser's: the range becomes [-1, 1]."""
    low, high = latent_range
    return 2 * (z - low) / (high - low) - 1


def unscale(z: Tensor, latent_range: tuple[float, float]) -> Tensor:
    """The denoiser's latents to the autoencoder's."""
    low, high = latent_range
    return (z + 1) / 2 * (high - low) + low
