"""Medical Diffusion (Khader et al. 2023, doi 10.1038/s41598-023-34341-2) as a model: VQ-GAN and diffusion in
its latent space.

Latents are `(B, Z, d, h, w)`: depth, height, width, continuous, with the codebook's range scaled to [-1, 1].
They are quantised only when they are decoded.
"""

from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffaug.generators.diffusion import (
    CLEAN,
    SAMPLERS,
    CosineSchedule,
    Projection,
    inner_steps,
    keep_outside,
    visited_steps,
)
from diffaug.generators.factorised_unet import FactorisedUNet
from diffaug.generators.hardware import exact_float32, has_bfloat16, mixed_precision
from diffaug.generators.model import Model, Sampling, latent_mask
from diffaug.generators.networks import MedicalDiffusionNetworks
from diffaug.generators.seeds import CaseNoise
from diffaug.generators.vqgan import VQGAN

CITATION = (
    "Khader F et al. Denoising diffusion probabilistic models for 3D medical image generation. Scientific "
    "Reports 13:7303, 2023. doi:10.1038/s41598-023-34341-2"
)


class MedicalDiffusion(Model):
    """Sampling, varying and inpainting in latent space; it knows no labels."""

    files: ClassVar[dict[str, str]] = {
        "autoencoder.safetensors": "autoencoder.",
        "denoiser.safetensors": "denoiser.",
    }
    stored_as = torch.float32

    def __init__(self, networks: MedicalDiffusionNetworks) -> None:
        super().__init__()
        self.networks = networks
        self.autoencoder = VQGAN(networks.autoencoder)
        self.denoiser = FactorisedUNet(networks.denoiser)
        self.schedule = CosineSchedule(networks.steps)
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
        start = noise.draw(self.image_latent)
        latent = self._make(start, self._steps(sampling), None, noise, sampling)
        return latent, latent[:, :0]

    def vary(
        self, clean: Tensor, strength: float, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        steps = self._steps(sampling, max(1, round(strength * self.schedule.steps)) - 1)
        x = self.schedule.add_noise(clean, noise.draw(self.image_latent), steps[0])
        return self._make(x, steps, None, noise, sampling)

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """Where the denoiser is given the masked image and the mask it decides; otherwise the trajectory
        follows the noised latent of the image outside the mask."""
        start, steps = noise.draw(self.image_latent), self._steps(sampling)
        network_mask = self.autoencoder.pad(self._to_network(mask.float()))
        if self.networks.masked:
            # 0 is the middle of the intensity range, as in DiffTumor's training.
            seen = self.encode_image(image * (1 - mask.float()))
            # Nearest neighbour, -1 outside and 1 inside.
            region = nn.functional.interpolate(2 * network_mask - 1, size=self.networks.latent_shape)
            return self._make(start, steps, torch.cat([seen, region], dim=1), noise, sampling)
        clean = self.encode_image(image)
        region = latent_mask(network_mask, self.networks.autoencoder.downsampling)
        project = keep_outside(self.schedule, clean, start, region)
        # Once more, for steps that end before the data are clean.
        return project(self._make(start, steps, None, noise, sampling, project), CLEAN)

    def _steps(self, sampling: Sampling, start: int | None = None) -> list[int]:
        """The steps that a sampler visits from `start` (default: the last) down; in proportion fewer."""
        share = 1.0 if start is None else (start + 1) / self.schedule.steps
        spread = visited_steps if self.networks.clip else inner_steps
        return spread(self.schedule, max(1, round(sampling.steps * share)), start)

    def _make(
        self,
        x: Tensor,
        steps: list[int],
        condition: Tensor | None,
        noise: CaseNoise,
        sampling: Sampling,
        project: Projection | None = None,
    ) -> Tensor:
        """A latent, from `x` at the first of `steps`."""

        def denoise(x: Tensor, step: int) -> Tensor:
            seen = x if condition is None else torch.cat([x, condition], dim=1)
            return self.denoiser(seen, torch.full((len(x),), step, device=x.device))

        sampler = SAMPLERS[sampling.sampler]
        with self._precision(self.denoiser, x):
            return sampler(denoise, x, self.schedule, steps, noise, clip=self.networks.clip, project=project)

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
