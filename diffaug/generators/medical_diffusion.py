"""Medical Diffusion (Khader et al. 2023, doi 10.1038/s41598-023-34341-2) as a model: VQ-GAN and diffusion in
its latent space.

Latents are `(B, Z, d, h, w)`: depth, height, width, continuous, with the codebook's range scaled to [-1, 1].
They are quantised only when they are decoded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from diffaug.generators.diffusion import (
    SAMPLERS,
    CosineSchedule,
    Projection,
    inner_steps,
    keep_outside,
    visited_steps,
)
from diffaug.generators.factorised_unet import FactorisedUNet
from diffaug.generators.hardware import has_bfloat16
from diffaug.generators.model import Model, Sampling, latent_mask
from diffaug.generators.networks import MedicalDiffusionNetworks
from diffaug.generators.seeds import CaseNoise
from diffaug.generators.vqgan import VQGAN


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
        with self._precision(image):
            z = self.autoencoder.encode(self._to_network(image))
        return scale(z.float(), self.networks.latent_range)

    def decode_image(self, latent: Tensor) -> Tensor:
        z = unscale(latent, self.networks.latent_range)
        with self._precision(latent):
            volume = self.autoencoder.decode(z, [self.networks.shape[axis] for axis in self.networks.axes])
        back = [2 + self.networks.axes.index(axis) for axis in range(3)]
        return volume.float().permute(0, 1, *back)

    def _to_network(self, volume: Tensor) -> Tensor:
        """The grid's axes to depth, height, width."""
        return volume.permute(0, 1, *(2 + axis for axis in self.networks.axes))

    # -- trajectories ----------------------------------------------------------------------------------------

    def sample(self, noise: CaseNoise, sampling: Sampling) -> tuple[Tensor, Tensor]:
        start = noise.draw(self.image_latent)
        latent = self._make(start, self.schedule.steps - 1, None, noise, sampling)
        return latent, latent[:, :0]

    def vary(
        self, clean: Tensor, strength: float, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        step = max(1, round(strength * self.schedule.steps)) - 1
        x = self.schedule.add_noise(clean, noise.draw(self.image_latent), step)
        return self._make(x, step, None, noise, sampling)

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """Where the denoiser is given the masked image and the mask it decides; otherwise the trajectory
        follows the noised latent of the image outside the mask."""
        start = noise.draw(self.image_latent)
        last = self.schedule.steps - 1
        network_mask = self.autoencoder.pad(self._to_network(mask.float()))
        if self.networks.masked:
            # 0 is the middle of the intensity range, as in DiffTumor's training.
            seen = self.encode_image(image * (1 - mask.float()))
            # Nearest neighbour, -1 outside and 1 inside.
            region = nn.functional.interpolate(2 * network_mask - 1, size=self.networks.latent_shape)
            return self._make(start, last, torch.cat([seen, region], dim=1), noise, sampling)
        clean = self.encode_image(image)
        region = latent_mask(network_mask, self.networks.autoencoder.downsampling)
        project = keep_outside(self.schedule, clean, start, region)
        return self._make(start, last, None, noise, sampling, project)

    def _make(
        self,
        x: Tensor,
        step: int,
        condition: Tensor | None,
        noise: CaseNoise,
        sampling: Sampling,
        project: Projection | None = None,
    ) -> Tensor:
        """A latent from the noise of `step` down; the number of sampler steps shrinks with it."""
        count = max(1, round(sampling.steps * (step + 1) / self.schedule.steps))
        spread = visited_steps if self.networks.clip or sampling.sampler == "ancestral" else inner_steps

        def denoise(x: Tensor, step: int) -> Tensor:
            seen = x if condition is None else torch.cat([x, condition], dim=1)
            with self._precision(x):
                return self.denoiser(seen, torch.full((len(x),), step, device=x.device))

        return SAMPLERS[sampling.sampler](
            denoise,
            x,
            self.schedule,
            spread(self.schedule, count, step),
            noise,
            clip=self.networks.clip,
            project=project,
        )

    @contextmanager
    def _precision(self, like: Tensor) -> Iterator[None]:
        """bfloat16 where the networks were trained so; else true float32, on GPUs too, whose convolutions
        would round to 10 bits (TF32) by default."""
        kind = like.device.type
        mixed = self.networks.bfloat16 and has_bfloat16(like.device)
        tf32 = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = tf32 and self.networks.bfloat16
        try:
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=mixed):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = tf32


def scale(z: Tensor, latent_range: tuple[float, float]) -> Tensor:
    """The autoencoder's latents to the denoiser's: the range becomes [-1, 1]."""
    low, high = latent_range
    return 2 * (z - low) / (high - low) - 1


def unscale(z: Tensor, latent_range: tuple[float, float]) -> Tensor:
    """The denoiser's latents to the autoencoder's."""
    low, high = latent_range
    return (z + 1) / 2 * (high - low) + low
