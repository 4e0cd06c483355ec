"""The 3D VQ-GAN of Medical Diffusion (Khader et al. 2023, doi 10.1038/s41598-023-34341-2): its autoencoder.

Volumes here are `(B, C, D, H, W)`: depth, height, width. Modules and parameters have the names of the
authors' checkpoints, so that a state dict goes in and out as it is.
"""

from collections.abc import Sequence
from math import log2, prod
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from diffaug.generators.blocks import Conv3d, ConvTranspose3d, Float32GroupNorm

PaddingMode = Literal["replicate", "constant", "reflect", "circular"]
# Bytes that the distances between latents and codes may take. All 16384 codes against a 32^3 latent would be
# 2.1 GB at once, and the one-hot matrix of the textbook formulation another 6.4 GB.
DISTANCE_BYTES = 64 * 2**20


class VQGANConfig(BaseModel):
    """Sizes of the VQ-GAN; the defaults are those of the published runs.

    `downsampling` is per axis (depth, height, width), powers of two. `hidden` channels at full resolution
    double with each halving.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(default=1, ge=1)
    hidden: int = Field(default=16, ge=1)
    downsampling: tuple[int, int, int]
    latent_channels: int = Field(default=8, ge=1)
    codes: int = Field(default=16384, ge=2)
    groups: int = Field(default=32, ge=1)
    padding: PaddingMode = "replicate"

    @model_validator(mode="after")
    def _consistent(self) -> "VQGANConfig":
        if max(self.downsampling) < 2 or any(n < 1 or 2 ** int(log2(n)) != n for n in self.downsampling):
            raise ValueError(
                f"downsampling {self.downsampling} needs powers of two, one of them above 1 (the network "
                "has a stage for each halving)"
            )
        widths = {self.hidden * 2**n for n in range(1, self.stages + 1)}
        if wrong := sorted(width for width in widths if width % self.groups):
            raise ValueError(
                f"groups {self.groups} must divide the channel counts {sorted(widths)} (hidden times powers "
                f"of two), not so {wrong}"
            )
        return self

    @property
    def stages(self) -> int:
        """Number of halvings along the most reduced axis."""
        return int(log2(max(self.downsampling)))

    @property
    def strides(self) -> list[tuple[int, int, int]]:
        """Stride of each stage: an axis is halved in the first stages until its factor is reached."""
        halvings = [int(log2(n)) for n in self.downsampling]
        return [tuple(2 if stage < count else 1 for count in halvings) for stage in range(self.stages)]  # type: ignore[misc]

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape of the latent of a volume of spatial `shape`, which is padded where it does not divide."""
        d, h, w = (-(-n // f) for n, f in zip(shape, self.downsampling, strict=True))
        return d, h, w


def same_padding(kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """`F.pad` amounts (last axis first) with which a convolution gives size / stride: of k - s voxels in all,
    the odd one comes before."""
    amounts = []
    for k, s in zip(reversed(kernel), reversed(stride), strict=True):
        amounts += [(k - s) // 2 + (k - s) % 2, (k - s) // 2]
    return amounts


class SamePadConv3d(nn.Module):
    """Convolution after the padding by which n voxels become n / stride."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: str = "replicate",
    ) -> None:
        super().__init__()
        self.amounts = same_padding((kernel,) * 3, stride)
        self.padding = padding
        self.conv = Conv3d(inputs, outputs, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, self.amounts, mode=self.padding))


class SamePadConvTranspose3d(nn.Module):
    """Transposed convolution by which n voxels become n * stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.amounts = same_padding((kernel,) * 3, stride)
        self.convt = ConvTranspose3d(inputs, outputs, kernel, stride=stride, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convt(nn.functional.pad(x, self.amounts, mode="replicate"))


def normalise(groups: int, channels: int) -> nn.Module:
    """The networks' norm."""
    return Float32GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two normalised 3x3x3 convolutions around an identity."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = normalise(groups, channels)
        self.conv1 = SamePadConv3d(channels, channels, 3)
        self.norm2 = normalise(groups, channels)
        self.conv2 = SamePadConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(h)))


class EncoderStage(nn.Module):
    """Halving of some axes, then a residual block."""

    def __init__(
        self, inputs: int, outputs: int, stride: tuple[int, int, int], groups: int, padding: str
    ) -> None:
        super().__init__()
        self.down = SamePadConv3d(inputs, outputs, 4, stride, padding)
        self.res = ResBlock(outputs, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res(self.down(x))


class DecoderStage(nn.Module):
    """Doubling of some axes, then two residual blocks."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int], groups: int) -> None:
        super().__init__()
        self.up = SamePadConvTranspose3d(inputs, outputs, 4, stride)
        self.res1 = ResBlock(outputs, groups)
        self.res2 = ResBlock(outputs, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.res1(self.up(x)))


class Encoder(nn.Module):
    """Volume to features at latent resolution."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.conv_blocks = nn.ModuleList()
        for stage, stride in enumerate(config.strides):
            inputs, outputs = config.hidden * 2**stage, config.hidden * 2 ** (stage + 1)
            self.conv_blocks.append(EncoderStage(inputs, outputs, stride, config.groups, config.padding))
        self.conv_first = SamePadConv3d(config.channels, config.hidden, 3, padding=config.padding)
        self.final_block = nn.Sequential(
            normalise(config.groups, config.hidden * 2**config.stages), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(x)
        for block in self.conv_blocks:
            x = block(x)
        return self.final_block(x)


class Decoder(nn.Module):
    """Features at latent resolution to a volume; its values are unbounded."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widest = config.hidden * 2**config.stages
        self.final_block = nn.Sequential(normalise(config.groups, widest), nn.SiLU())
        self.conv_blocks = nn.ModuleList()
        inputs = widest
        for stage, stride in enumerate(config.strides):
            outputs = config.hidden * 2 ** (config.stages - stage)
            self.conv_blocks.append(DecoderStage(inputs, outputs, stride, config.groups))
            inputs = outputs
        self.conv_last = SamePadConv3d(inputs, config.channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.final_block(x)
        for block in self.conv_blocks:
            x = block(x)
        return self.conv_last(x)


class Codebook(nn.Module):
    """Code vectors `(K, Z)` with the running counts and sums from which training moves them (van den Oord et
    al. 2017, appendix A).

    `initialised` is saved with the rest: a codebook that lives goes on where it was when training resumes.
    Checkpoints of the authors lack it; what they hold is initialised.
    """

    embeddings: Tensor
    N: Tensor
    z_avg: Tensor
    initialised: Tensor

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("embeddings", torch.randn(codes, channels))
        self.register_buffer("N", torch.zeros(codes))
        self.register_buffer("z_avg", self.embeddings.clone())
        self.register_buffer("initialised", torch.tensor(False))

    def nearest(self, z: Tensor) -> Tensor:
        """Indices int64 `(B, d, h, w)` of the codes nearest to the latents `(B, Z, d, h, w)`, in float32.

        Distances are computed for as many latents at a time as fit into 64 MiB.
        """
        flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
        codes = self.embeddings.float()
        squares = codes.square().sum(dim=1)
        rows = max(1, DISTANCE_BYTES // (4 * len(codes)))
        with torch.autocast(z.device.type, enabled=False):
            # |z|^2 is the same for all codes and does not decide.
            found = [torch.addmm(squares, part, codes.T, alpha=-2).argmin(dim=1) for part in flat.split(rows)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])

    def look_up(self, indices: Tensor) -> Tensor:
        """Code vectors `(B, Z, d, h, w)` of indices `(B, d, h, w)`."""
        return nn.functional.embedding(indices, self.embeddings).movedim(-1, 1)

    def quantise(self, z: Tensor) -> Tensor:
        """Each latent `(B, Z, d, h, w)` replaced by the code nearest to it."""
        return self.look_up(self.nearest(z))

    @property
    def live(self) -> Tensor:
        """Which codes training uses, bool `(K,)`: those with a running count of 1 or more. It overwrites the
        others by latents of the last batch."""
        return self.N >= 1

    def range(self, live_only: bool) -> tuple[float, float]:
        """Smallest and largest number in the codebook; `live_only` leaves out dead codes, with which it
        depends on chance. The authors' own latent scale includes them."""
        chosen = self.embeddings
        if live_only and bool(self.live.any()):
            chosen = chosen[self.live]
        return float(chosen.min()), float(chosen.max())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}initialised"
        if key not in state_dict and f"{prefix}embeddings" in state_dict:
            state_dict[key] = torch.tensor(True)
        super()._load_from_state_dict(state_dict, prefix, *args)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder: all that inference needs."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        widest = config.hidden * 2**config.stages
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.pre_vq_conv = SamePadConv3d(widest, config.latent_channels, 1, padding=config.padding)
        self.post_vq_conv = SamePadConv3d(config.latent_channels, widest, 1)
        self.codebook = Codebook(config.codes, config.latent_channels)

    def encode(self, x: Tensor) -> Tensor:
        """Volume `(B, C, D, H, W)` to its continuous latent, before quantisation.

        A size that the downsampling does not divide is padded at its end by repeating the last voxels.
        """
        return self.pre_vq_conv(self.encoder(self.pad(x)))

    def decode(self, z: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Latent to a volume, through the nearest codes; cut to the spatial `shape` if given."""
        return self.decode_quantised(self.codebook.quantise(z), shape)

    def decode_quantised(self, z: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Code vectors to a volume; cut to the spatial `shape` if given."""
        x = self.decoder(self.post_vq_conv(z))
        return x if shape is None else x[:, :, : shape[0], : shape[1], : shape[2]]

    def pad(self, x: Tensor) -> Tensor:
        """Repeat the last voxels until the downsampling divides each size."""
        sizes = zip(x.shape[2:], self.config.latent_shape(x.shape[2:]), self.config.downsampling, strict=True)
        amounts = [count * factor - size for size, count, factor in sizes]
        if not any(amounts):
            return x
        return nn.functional.pad(x, [0, amounts[2], 0, amounts[1], 0, amounts[0]], mode="replicate")


def parameter_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(prod(p.shape) for p in module.parameters())
