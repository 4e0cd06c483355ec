"""The denoiser of Medical Diffusion: a U-Net with in-plane convolutions and attention along depth.

Khader et al. 2023 (doi 10.1038/s41598-023-34341-2), after Ho et al. 2022 (video diffusion models, arXiv
2204.03458), depth in the place of time. Latents here are `(B, Z, d, h, w)`. Modules and parameters have the
names of the authors' checkpoints, so that a state dict goes in and out as it is.
"""

from itertools import pairwise
from math import log

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from diffaug.generators.blocks import Conv3d, ConvTranspose3d, Float32GroupNorm

# Buckets of the relative position bias (Raffel et al. 2020) and the distance from which all share the last.
BUCKETS = 32
MAX_DISTANCE = 32
# The linear attention's head size does not follow the depth attention's.
LINEAR_HEAD = 32


class UNetConfig(BaseModel):
    """Sizes of the U-Net; the defaults are those of the published runs with a latent of 8 channels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels: int = Field(default=8, ge=1, description="of the input: latent and condition together")
    out_channels: int = Field(default=8, ge=1)
    dim: int = Field(default=32, ge=4)
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    heads: int = Field(default=8, ge=1)
    head_dim: int = Field(default=32, ge=2)
    kernel: int = Field(default=7, ge=1, description="in-plane, of the first convolution; odd")
    groups: int = Field(default=8, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "UNetConfig":
        if not self.dim_mults:
            raise ValueError("dim_mults is empty: give one multiple of dim for each level")
        if wrong := sorted({w for w in self.widths if w % self.groups}):
            raise ValueError(f"groups {self.groups} must divide the level widths, not so {wrong}")
        if self.dim % 2 or self.kernel % 2 == 0 or self.head_dim % 2:
            raise ValueError(
                "dim and head_dim must be even and kernel odd, "
                f"got {self.dim}, {self.head_dim} and {self.kernel}"
            )
        return self

    @property
    def widths(self) -> list[int]:
        """Channels before the first level and after each."""
        return [self.dim, *(self.dim * m for m in self.dim_mults)]

    @property
    def multiple(self) -> int:
        """What height and width are padded to a multiple of."""
        return int(2 ** (len(self.dim_mults) - 1))


def relative_buckets(depth: int) -> Tensor:
    """Buckets int64 `(depth, depth)` of key minus query: half of them for each sign, near distances one
    each, farther ones logarithmic."""
    positions = torch.arange(depth)
    distance = positions[None, :] - positions[:, None]
    half = BUCKETS // 2
    exact = half // 2
    size = distance.abs()
    far = (
        exact
        + (torch.log(size.clamp(min=1).float() / exact) / log(MAX_DISTANCE / exact) * (half - exact)).long()
    )
    bucket = torch.where(size < exact, size, far.clamp(max=half - 1))
    return bucket + half * (distance > 0)


class RelativePositionBias(nn.Module):
    """A learned bias `(heads, depth, depth)` for each bucketed distance of key and query."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, heads)

    def forward(self, depth: int) -> Tensor:
        buckets = relative_buckets(depth).to(self.relative_attention_bias.weight.device)
        return self.relative_attention_bias(buckets).permute(2, 0, 1)


class RotaryEmbedding(nn.Module):
    """Rotation of neighbouring pairs of channels by an angle that grows with position (Su et al. 2021)."""

    freqs: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 10000.0 ** (-torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor) -> Tensor:
        """Rotate `(..., positions, channels)`; channels beyond the embedding's stay as they are."""
        angles = torch.arange(x.shape[-2], device=x.device).float()[:, None] * self.freqs.float()
        count = 2 * len(self.freqs)
        # A pair as a complex number is turned by one multiplication.
        pairs = torch.view_as_complex(x[..., :count].float().unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return turned if count == x.shape[-1] else torch.cat([turned, x[..., count:]], dim=-1)


class ChannelNorm(nn.Module):
    """Layer norm over channels, without a bias, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        variance, mean = torch.var_mean(y, dim=1, correction=0, keepdim=True)
        return ((y - mean) * (variance + 1e-5).rsqrt() * self.gamma).to(x.dtype)


class Residual(nn.Module):
    """`x + fn(x)`."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x + self.fn(x, bias)


class PreNorm(nn.Module):
    """`fn(norm(x))`."""

    def __init__(self, channels: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.fn(self.norm(x), bias)


class Attention(nn.Module):
    """Multi-head attention over sequences `(N, length, channels)`, with rotary positions where given."""

    def __init__(self, channels: int, heads: int, head_dim: int, rotary_emb: RotaryEmbedding | None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.rotary_emb = rotary_emb
        self.to_qkv = nn.Linear(channels, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.to_qkv(x).view(n, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q = q * self.head_dim**-0.5
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q).to(v.dtype), self.rotary_emb(k).to(v.dtype)
        similarity = q @ k.transpose(-1, -2)
        if bias is not None:
            similarity = similarity + bias
        out = similarity.float().softmax(dim=-1).to(v.dtype) @ v
        return self.to_out(out.transpose(1, 2).reshape(n, length, self.heads * self.head_dim))


class AlongDepth(nn.Module):
    """Attention along depth, for each in-plane position."""

    def __init__(self, fn: Attention) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, c, d, h, w = x.shape
        sequences = x.permute(0, 3, 4, 2, 1).reshape(b * h * w, d, c)
        return self.fn(sequences, bias).view(b, h, w, d, c).permute(0, 4, 3, 1, 2)


class InPlane(nn.Module):
    """Attention over the positions of each slice."""

    def __init__(self, fn: Attention) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, c, d, h, w = x.shape
        sequences = x.permute(0, 2, 3, 4, 1).reshape(b * d, h * w, c)
        return self.fn(sequences).view(b, d, h, w, c).permute(0, 4, 1, 2, 3)


class SpatialLinearAttention(nn.Module):
    """Linear attention over the positions of each slice (Shen et al. 2021)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(channels, 3 * heads * LINEAR_HEAD, 1, bias=False)
        self.to_out = nn.Conv2d(heads * LINEAR_HEAD, channels, 1)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        b, c, d, h, w = x.shape
        slices = x.transpose(1, 2).reshape(b * d, c, h, w)
        qkv = self.to_qkv(slices).view(b * d, 3, self.heads, LINEAR_HEAD, h * w)
        q, k, v = qkv.unbind(dim=1)
        q = (q.float().softmax(dim=-2) * LINEAR_HEAD**-0.5).to(v.dtype)
        k = k.float().softmax(dim=-1).to(v.dtype)
        context = k @ v.transpose(-1, -2)
        out = (context.transpose(-1, -2) @ q).reshape(b * d, self.heads * LINEAR_HEAD, h, w)
        return self.to_out(out).view(b, d, c, h, w).transpose(1, 2)


class Block(nn.Module):
    """In-plane convolution, norm, and the modulation by (scale, shift)."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.proj = Conv3d(inputs, outputs, (1, 3, 3), padding=(0, 1, 1))
        self.norm = Float32GroupNorm(groups, outputs)

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        x = self.norm(self.proj(x))
        if modulation is not None:
            scale, shift = modulation[:, :, None, None, None].chunk(2, dim=1)
            x = x * (scale + 1) + shift
        return nn.functional.silu(x)


class ResnetBlock(nn.Module):
    """Two blocks around an identity; `time` (B, D) modulates the first where it is given."""

    def __init__(self, inputs: int, outputs: int, groups: int, time: int | None = None) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time, 2 * outputs)) if time else None
        self.block1 = Block(inputs, outputs, groups)
        self.block2 = Block(outputs, outputs, groups)
        self.res_conv = Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        modulation = self.mlp(time) if self.mlp is not None and time is not None else None
        return self.block2(self.block1(x, modulation)) + self.res_conv(x)


class StepEmbedding(nn.Module):
    """Sinusoids of the diffusion step: `(B,)` to `(B, dim)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, step: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=step.device) * -(log(10000) / (half - 1)))
        angles = step.float()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Level(nn.ModuleList):
    """One resolution: two residual blocks, linear attention in the plane, attention along depth; then what
    changes the resolution."""

    def __init__(
        self, config: UNetConfig, inputs: int, outputs: int, rotary: RotaryEmbedding, resize: nn.Module
    ) -> None:
        time = 4 * config.dim
        linear = SpatialLinearAttention(outputs, config.heads)
        super().__init__(
            [
                ResnetBlock(inputs, outputs, config.groups, time),
                ResnetBlock(outputs, outputs, config.groups, time),
                Residual(PreNorm(outputs, linear)),
                depth_attention(config, outputs, rotary),
                resize,
            ]
        )

    def features(self, x: Tensor, time: Tensor, bias: Tensor) -> Tensor:
        """All but the change of resolution."""
        block1, block2, in_plane, along_depth, _ = self
        return along_depth(in_plane(block2(block1(x, time), time)), bias)

    def resize(self, x: Tensor) -> Tensor:
        """The change of resolution, none at the coarsest (down) or the finest (up) level."""
        return self[4](x)


def depth_attention(config: UNetConfig, channels: int, rotary: RotaryEmbedding) -> Residual:
    """Attention along depth as a residual branch."""
    attention = Attention(channels, config.heads, config.head_dim, rotary)
    return Residual(PreNorm(channels, AlongDepth(attention)))


class FactorisedUNet(nn.Module):
    """Noise in a latent `(B, Z, d, h, w)` at diffusion steps `(B,)`; depth is never reduced.

    A height or width that the levels do not divide is padded at its end, and the output cut back.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        dim, time = config.dim, 4 * config.dim
        rotary = RotaryEmbedding(min(32, config.head_dim))
        margin = config.kernel // 2
        self.time_rel_pos_bias = RelativePositionBias(config.heads)
        self.init_conv = Conv3d(
            config.channels, dim, (1, config.kernel, config.kernel), padding=(0, margin, margin)
        )
        self.init_temporal_attn = depth_attention(config, dim, rotary)
        self.time_mlp = nn.Sequential(
            StepEmbedding(dim), nn.Linear(dim, time), nn.GELU(), nn.Linear(time, time)
        )
        pairs = list(pairwise(config.widths))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in pairs:
            coarsest = len(self.downs) == len(pairs) - 1
            halve = Conv3d(outputs, outputs, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
            down = nn.Identity() if coarsest else halve
            self.downs.append(Level(config, inputs, outputs, rotary, down))
        for inputs, outputs in reversed(pairs):
            finest = len(self.ups) == len(pairs) - 1
            double = ConvTranspose3d(inputs, inputs, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
            up = nn.Identity() if finest else double
            self.ups.append(Level(config, 2 * outputs, inputs, rotary, up))
        widest = config.widths[-1]
        self.mid_block1 = ResnetBlock(widest, widest, config.groups, time)
        in_plane = Attention(widest, config.heads, config.head_dim, None)
        self.mid_spatial_attn = Residual(PreNorm(widest, InPlane(in_plane)))
        self.mid_temporal_attn = depth_attention(config, widest, rotary)
        self.mid_block2 = ResnetBlock(widest, widest, config.groups, time)
        self.final_conv = nn.Sequential(
            ResnetBlock(2 * dim, dim, config.groups), Conv3d(dim, config.out_channels, 1)
        )

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rest = [-n % self.config.multiple for n in (width, height)]
        if any(rest):
            x = nn.functional.pad(x, [0, rest[0], 0, rest[1], 0, 0], mode="replicate")
        bias = self.time_rel_pos_bias(x.shape[2])
        first = self.init_conv(x)
        x = self.init_temporal_attn(first, bias)
        time = self.time_mlp(step)
        skips: list[Tensor] = []
        for level in self.downs:
            assert isinstance(level, Level)
            x = level.features(x, time, bias)
            skips.append(x)
            x = level.resize(x)
        x = self.mid_block1(x, time)
        x = self.mid_temporal_attn(self.mid_spatial_attn(x), bias)
        x = self.mid_block2(x, time)
        for level in self.ups:
            assert isinstance(level, Level)
            x = level.resize(level.features(torch.cat([x, skips.pop()], dim=1), time, bias))
        x = self.final_conv(torch.cat([x, first], dim=1))
        return x[..., :height, :width].float()
