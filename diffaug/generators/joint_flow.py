"""The flagship architecture: two autoencoders and a joint flow-matching denoiser, as one model.

All tensors here are on the grid and in network units; orientation, spacing, units and label ids are the
Generator's business. Latents of image and label are `(B, Z, i, j, k)`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffaug.errors import CardError
from diffaug.files import atomic_path
from diffaug.generators.autoencoder import Autoencoder
from diffaug.generators.card import Networks
from diffaug.generators.denoiser import JointDenoiser
from diffaug.generators.hardware import has_bfloat16
from diffaug.generators.samplers import SAMPLERS, Projection, Velocity, add_noise, keep_outside, noise_levels

WEIGHTS = "joint_flow.safetensors"


class JointFlow(nn.Module):
    """Sampling, painting, varying, inpainting and segmenting in latent space.

    `noise` arguments are standard normal tensors of the latent's shape: the caller draws them from seeds.
    """

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.image = Autoencoder(networks.image_autoencoder)
        self.label = Autoencoder(networks.label_autoencoder) if networks.label_autoencoder else None
        self.denoiser = JointDenoiser(networks.denoiser)
        self.eval().requires_grad_(False)

    # -- autoencoders ----------------------------------------------------------------------------------------

    def encode_image(self, image: Tensor) -> Tensor:
        """Volume in network units to its latent."""
        with self._autocast(image):
            return self.image.encode(image).float()

    def decode_image(self, latent: Tensor) -> Tensor:
        """Latent to a volume in network units."""
        with self._autocast(latent):
            return self.image.decode(latent).float()

    def encode_label(self, one_hot: Tensor) -> Tensor:
        """One-hot label map to its latent; an empty one for a model that knows no labels."""
        if self.label is None:
            return one_hot.new_zeros(one_hot.shape[0], 0, *self.denoiser.config.latent_shape)
        with self._autocast(one_hot):
            return self.label.encode(one_hot).float()

    def decode_label(self, latent: Tensor) -> Tensor:
        """Latent to logits `(B, L, I, J, K)`."""
        if self.label is None:
            raise CardError("this generator knows no labels")
        with self._autocast(latent):
            return self.label.decode(latent).float()

    # -- trajectories ----------------------------------------------------------------------------------------

    def sample(
        self,
        image_noise: Tensor,
        label_noise: Tensor,
        *,
        steps: int,
        guidance: float = 1.0,
        shift: float = 1.0,
        sampler: str = "euler",
    ) -> tuple[Tensor, Tensor]:
        """Both latents from noise, at equal levels."""
        channels = image_noise.shape[1]

        def velocity(x: Tensor, level: float) -> Tensor:
            image, label = x[:, :channels], x[:, channels:]
            image_velocity, label_velocity = self._velocities(image, label, level, level)
            if guidance != 1.0 and label.shape[1]:
                free, _ = self._velocities(image, label_noise, level, 1.0)
                image_velocity = free + guidance * (image_velocity - free)
            return torch.cat([image_velocity, label_velocity], dim=1)

        x = torch.cat([image_noise, label_noise], dim=1)
        x = SAMPLERS[sampler](velocity, x, noise_levels(steps, shift=shift))
        return x[:, :channels], x[:, channels:]

    def paint(
        self,
        label: Tensor | None,
        image_noise: Tensor,
        label_noise: Tensor,
        *,
        steps: int,
        guidance: float = 1.0,
        shift: float = 1.0,
        sampler: str = "euler",
        start: tuple[Tensor, float] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The image latent that shows a label latent (None: any anatomy).

        Args:
            start: clean image latent and strength: begin at that noise level instead of at pure noise
                (SDEdit, Meng et al. 2022). The number of steps shrinks in proportion.
            mask: with `start`, the region `(B, 1, i, j, k)` that is made anew; the rest follows the clean
                latent.
        """
        clean, strength = start if start is not None else (image_noise, 1.0)
        x = add_noise(clean, image_noise, strength)
        count = max(1, round(steps * strength))
        project: Projection | None = None
        if mask is not None:
            project = keep_outside(clean, image_noise, mask)
        velocity = self._image_velocity(label, label_noise, guidance)
        return SAMPLERS[sampler](velocity, x, noise_levels(count, start=strength, shift=shift), project)

    def segment(
        self, image: Tensor, label_noise: Tensor, *, steps: int, shift: float = 1.0, sampler: str = "euler"
    ) -> Tensor:
        """The label latent of an image latent."""

        def velocity(x: Tensor, level: float) -> Tensor:
            return self._velocities(image, x, 0.0, level)[1]

        return SAMPLERS[sampler](velocity, label_noise, noise_levels(steps, shift=shift))

    def _image_velocity(self, label: Tensor | None, label_noise: Tensor, guidance: float) -> Velocity:
        def velocity(x: Tensor, level: float) -> Tensor:
            if label is None or not label.shape[1]:
                return self._velocities(x, label_noise, level, 1.0)[0]
            guided, _ = self._velocities(x, label, level, 0.0)
            if guidance != 1.0:
                free, _ = self._velocities(x, label_noise, level, 1.0)
                guided = free + guidance * (guided - free)
            return guided

        return velocity

    def _velocities(
        self, image: Tensor, label: Tensor, image_level: float, label_level: float
    ) -> tuple[Tensor, Tensor]:
        levels = image.new_full((2, len(image)), image_level)
        levels[1] = label_level
        with self._autocast(image):
            return self.denoiser(image, label, levels[0], levels[1])

    def _autocast(self, like: Tensor) -> torch.autocast:
        kind = like.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=has_bfloat16(like.device))

    # -- files -----------------------------------------------------------------------------------------------

    def save_weights(self, folder: Path) -> list[str]:
        """Write the weights (float16) to `folder`; returns the file names."""
        state = {
            name: tensor.half().contiguous() if tensor.is_floating_point() else tensor.contiguous()
            for name, tensor in self.state_dict().items()
        }
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(state, temporary)
        return [WEIGHTS]

    def load_weights(self, folder: Path, files: Iterable[str]) -> None:
        """Read the weights that `save_weights` wrote.

        Raises:
            CardError: for a file that is missing or whose tensors do not fit the card's networks.
        """
        if WEIGHTS not in files:
            raise CardError(f"the card in {folder} lists no {WEIGHTS}; a joint-flow generator needs it")
        state = load_file(folder / WEIGHTS)
        own = self.state_dict()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
        if missing or unexpected or wrong:
            raise CardError(
                f"{folder / WEIGHTS} does not fit the card: missing {missing[:5]}, "
                f"unexpected {unexpected[:5]}, wrong shape {wrong[:5]}"
            )
        self.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def latent_mask(mask: Tensor, downsampling: tuple[int, int, int]) -> Tensor:
    """A voxel mask `(B, 1, I, J, K)` at the latent's resolution: any voxel counts, and one more all around.

    A code depends on voxels around its own: without the widening the old content would leak into the region.
    """
    pooled = nn.functional.max_pool3d(mask.float(), downsampling, stride=downsampling)
    return nn.functional.max_pool3d(pooled, 3, stride=1, padding=1)
