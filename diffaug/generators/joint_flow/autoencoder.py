"""The autoencoder of one modality: a volume or a one-hot label map to a continuous latent and back."""

from collections.abc import Sequence
from math import prod

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from diffaug.generators.blocks import ResidualBlock, conv1, conv3, depth_to_space, space_to_depth


class AutoencoderConfig(BaseModel):
    """Sizes of an autoencoder.

    `downsampling` is per axis, each 1, 2, 4 or 8; the first halving is a space-to-depth of the input, so that
    no convolution runs at full resolution (measured on two cores: 25 times cheaper than a full-resolution
    decoder). `widths` has one entry per level of halving.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(ge=1)
    latent_channels: int = Field(ge=1)
    downsampling: tuple[int, int, int]
    widths: tuple[int, ...]
    blocks: int = Field(default=2, ge=1)

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """Per level, the factor of each axis: (4, 4, 2) is [(2, 2, 2), (2, 2, 1)]."""
        factors = []
        remaining = self.downsampling
        while max(remaining) > 1:
            i, j, k = (2 if r > 1 else 1 for r in remaining)
            remaining = (remaining[0] // i, remaining[1] // j, remaining[2] // k)
            factors.append((i, j, k))
        reached = tuple(prod(level[axis] for level in factors) for axis in range(3))
        if len(factors) != len(self.widths) or reached != self.downsampling:
            raise ValueError(
                f"downsampling {self.downsampling} needs powers of two and one width per halving, "
                f"got widths {self.widths}"
            )
        return factors


class Autoencoder(nn.Module):
    """Residual convolutional autoencoder with a latent of zero mean and unit variance per channel.

    The latent is standardised by running statistics (a batch norm without affine parameters), so the
    diffusion model needs no scale factor. In training mode Gaussian noise of standard deviation
    `latent_noise` is added to it: nearby codes then decode alike.
    """

    def __init__(self, config: AutoencoderConfig, latent_noise: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.latent_noise = latent_noise
        levels, widths = config.levels, config.widths
        self.encoder = nn.ModuleList()
        channels = config.channels
        for factors, width in zip(levels, widths, strict=True):
            project = conv3 if channels == config.channels else conv1
            self.encoder.append(project(channels * prod(factors), width))
            self.encoder.append(nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks))))
            channels = width
        self.to_latent = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), conv3(channels, config.latent_channels)
        )
        self.standardise = nn.BatchNorm3d(config.latent_channels, affine=False)
        self.from_latent = conv3(config.latent_channels, channels)
        self.decoder = nn.ModuleList()
        for factors, finer in zip(reversed(levels), (*reversed(widths[:-1]), None), strict=True):
            self.decoder.append(nn.Sequential(*(ResidualBlock(channels) for _ in range(config.blocks))))
            if finer is not None:
                self.decoder.append(conv1(channels, finer * prod(factors)))
                channels = finer
            else:
                self.decoder.append(
                    nn.Sequential(
                        nn.GroupNorm(8, channels), nn.SiLU(), conv3(channels, config.channels * prod(factors))
                    )
                )

    def encode(self, x: Tensor) -> Tensor:
        """`(B, C, I, J, K)` to the standardised latent `(B, Z, i, j, k)`."""
        for n, factors in enumerate(self.config.levels):
            x = self.encoder[2 * n](space_to_depth(x, factors))
            x = self.encoder[2 * n + 1](x)
        return self.standardise(self.to_latent(x).float())

    def decode(self, z: Tensor) -> Tensor:
        """Latent `(B, Z, i, j, k)` to the volume (for label maps: to logits) `(B, C, I, J, K)`."""
        x = self.from_latent(z)
        for n, factors in enumerate(reversed(self.config.levels)):
            x = self.decoder[2 * n](x)
            project = self.decoder[2 * n + 1]
            if isinstance(project, nn.Sequential):
                # The output layer stays in float32 under autocast: bfloat16 would leave 256 grey levels.
                with torch.autocast(x.device.type, enabled=False):
                    x = project(x.float())
            else:
                x = project(x)
            x = depth_to_space(x, factors)
        return x

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Reconstruct `x`; in training mode through a noisy latent drawn from `generator`."""
        z = self.encode(x)
        if self.training and self.latent_noise > 0:
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
            z = z + self.latent_noise * noise
        return self.decode(z)

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Spatial shape of the latent of a volume of spatial `shape`."""
        i, j, k = (n // f for n, f in zip(shape, self.config.downsampling, strict=True))
        return i, j, k
