"""The flagship architecture: two autoencoders and a joint flow-matching denoiser, as one model.

Latents of image and label are `(B, Z, i, j, k)`, axes as the grid's.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffaug.errors import CardError
from diffaug.generators.hardware import has_bfloat16, mixed_precision
from diffaug.generators.joint_flow.autoencoder import Autoencoder
from diffaug.generators.joint_flow.denoiser import JointDenoiser
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.labels import spread
from diffaug.generators.model import Model, Sampling, latent_mask
from diffaug.generators.samplers import SAMPLERS, Projection, Velocity, add_noise, keep_outside, noise_levels
from diffaug.generators.seeds import CaseNoise
from diffaug.generators.windows import Shape3, over_windows

# Windows in one batch on a GPU.
GPU_WINDOWS = 8


class JointFlow(Model):
    """Sampling, painting, varying, inpainting and segmenting in latent space."""

    files: Mapping[str, str] = {"joint_flow.safetensors": ""}
    stored_as = torch.float16

    def __init__(self, networks: JointFlowNetworks) -> None:
        super().__init__()
        self.image = Autoencoder(networks.image_autoencoder)
        self.label = Autoencoder(networks.label_autoencoder) if networks.label_autoencoder else None
        self.denoiser = JointDenoiser(networks.denoiser)
        # Saves a tenth of a call on two Zen 5 cores.
        self.denoiser.to(memory_format=torch.channels_last_3d)
        self.eval().requires_grad_(False)

    @property
    def image_latent(self) -> tuple[int, ...]:
        config = self.denoiser.config
        return config.image_channels, *config.latent_shape

    # -- autoencoders: in windows where a volume is larger than the networks' --------------------------------

    def encode_image(self, image: Tensor) -> Tensor:
        return self._encode(self.image, image)

    def decode_image(self, latent: Tensor) -> Tensor:
        return self._decode(self.image, latent)

    def encode_label(self, label: Tensor) -> Tensor:
        if self.label is None:
            shape = [n // d for n, d in zip(label.shape[2:], self._downsampling, strict=True)]
            return torch.zeros(len(label), 0, *shape, device=label.device)
        return self._encode(self.label, spread(label, self.label.config.channels))

    def decode_label(self, latent: Tensor) -> Tensor:
        if self.label is None:
            raise CardError("this generator knows no labels")
        return self._decode(self.label, latent)

    def _encode(self, network: Autoencoder, volume: Tensor) -> Tensor:
        scale = self._downsampling, (1, 1, 1)
        with self._autocast(volume):
            return self._over_windows(lambda x: network.encode(x).float(), [volume], scale)[0]

    def _decode(self, network: Autoencoder, latent: Tensor) -> Tensor:
        scale = (1, 1, 1), self._downsampling
        with self._autocast(latent):
            return self._over_windows(lambda z: network.decode(z).float(), [latent], scale)[0]

    @property
    def _downsampling(self) -> Shape3:
        return self.image.config.downsampling

    def _over_windows(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        volumes: Sequence[Tensor],
        scale: tuple[Shape3, Shape3] = ((1, 1, 1), (1, 1, 1)),
    ) -> tuple[Tensor, ...]:
        at_once = 1 if volumes[0].device.type == "cpu" else GPU_WINDOWS
        return over_windows(function, volumes, self.denoiser.config.latent_shape, scale, at_once=at_once)

    # -- trajectories ----------------------------------------------------------------------------------------

    def sample(self, noise: CaseNoise, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Both latents from noise, at equal levels."""
        image_noise, label_noise = self._draw(noise, self.denoiser.config.latent_shape)
        channels = image_noise.shape[1]

        def velocity(x: Tensor, level: float) -> Tensor:
            image, label = x[:, :channels], x[:, channels:]
            if sampling.guidance == 1.0 or not label.shape[1]:
                return torch.cat(self._velocities(image, label, level, level), dim=1)
            conditioned, free = self._with_and_without(image, label, label_noise, level, level)
            image_velocity = free[0] + sampling.guidance * (conditioned[0] - free[0])
            return torch.cat([image_velocity, conditioned[1]], dim=1)

        x = torch.cat([image_noise, label_noise], dim=1)
        x = self._integrate(velocity, x, noise_levels(sampling.steps, shift=sampling.shift), sampling)
        return x[:, :channels], x[:, channels:]

    def paint(self, condition: Tensor, noise: CaseNoise, sampling: Sampling) -> Tensor:
        image_noise, label_noise = self._draw(noise, condition.shape[2:])
        return self._make(image_noise, image_noise, 1.0, condition, label_noise, sampling)

    def vary(
        self, clean: Tensor, strength: float, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        image_noise, label_noise = self._draw(noise, clean.shape[2:])
        return self._make(clean, image_noise, strength, condition, label_noise, sampling)

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """Outside the mask the trajectory follows the noised latent of the image."""
        clean = self.encode_image(image)
        image_noise, label_noise = self._draw(noise, clean.shape[2:])
        project = keep_outside(clean, image_noise, latent_mask(mask, self.image.config.downsampling))
        return self._make(clean, image_noise, 1.0, condition, label_noise, sampling, project)

    def segment(self, latent: Tensor, noise: CaseNoise, sampling: Sampling) -> Tensor:
        _, label_noise = self._draw(noise, latent.shape[2:])

        def velocity(x: Tensor, level: float) -> Tensor:
            return self._velocities(latent, x, 0.0, level)[1]

        levels = noise_levels(sampling.steps, shift=sampling.shift)
        return self._integrate(velocity, label_noise, levels, sampling)

    def _make(
        self,
        clean: Tensor,
        image_noise: Tensor,
        strength: float,
        condition: Tensor,
        label_noise: Tensor,
        sampling: Sampling,
        project: Projection | None = None,
    ) -> Tensor:
        """An image latent from the noise level `strength` down."""
        x = add_noise(clean, image_noise, strength)
        count = max(1, round(sampling.steps * strength))
        levels = noise_levels(count, start=strength, shift=sampling.shift)
        velocity = self._image_velocity(condition, label_noise, sampling.guidance)
        return self._integrate(velocity, x, levels, sampling, project)

    def _integrate(
        self,
        velocity: Velocity,
        x: Tensor,
        levels: list[float],
        sampling: Sampling,
        project: Projection | None = None,
    ) -> Tensor:
        """The trajectory from `x` at the first of the noise levels."""
        with mixed_precision(self.denoiser, x.device, has_bfloat16(x.device)):
            return SAMPLERS[sampling.sampler](velocity, x, levels, project)

    def _image_velocity(self, label: Tensor, label_noise: Tensor, guidance: float) -> Velocity:
        def velocity(x: Tensor, level: float) -> Tensor:
            if not label.shape[1]:
                return self._velocities(x, label_noise, level, 1.0)[0]
            if guidance == 1.0:
                return self._velocities(x, label, level, 0.0)[0]
            conditioned, free = self._with_and_without(x, label, label_noise, level, 0.0)
            return free[0] + guidance * (conditioned[0] - free[0])

        return velocity

    def _with_and_without(
        self, image: Tensor, label: Tensor, label_noise: Tensor, image_level: float, label_level: float
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Velocities given the label at its level, and with pure noise in its place; as one batch, which
        takes 0.9 of two calls' time."""
        levels = image.new_full((2 * len(image),), label_level)
        levels[len(image) :] = 1.0
        velocities = self._velocities(
            torch.cat([image, image]), torch.cat([label, label_noise]), image_level, levels
        )
        conditioned, free = zip(*(v.chunk(2) for v in velocities), strict=True)
        return conditioned, free

    def _draw(self, noise: CaseNoise, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Noise of the image latent and of the label latent, one lattice for all windows."""
        config = self.denoiser.config
        both = noise.draw((config.image_channels + config.label_channels, *shape))
        return both[:, : config.image_channels], both[:, config.image_channels :]

    def _velocities(
        self, image: Tensor, label: Tensor, image_level: float, label_level: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        levels = image.new_full((2, len(image)), image_level)
        levels[1] = label_level

        def velocities(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
            # Windows beside each other in a batch have the levels of their cases.
            repeated = levels.repeat(1, len(image) // levels.shape[1])
            return self.denoiser(image, label, repeated[0], repeated[1])

        image_velocity, label_velocity = self._over_windows(velocities, [image, label])
        return image_velocity, label_velocity

    def _autocast(self, like: Tensor) -> torch.autocast:
        kind = like.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=has_bfloat16(like.device))
