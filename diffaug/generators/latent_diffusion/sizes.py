"""Sizes of MONAI's latent-diffusion networks, and the networks themselves: MONAI's own classes.

Fields have the names of the classes' arguments. What changes no result and no parameter is fixed here: flash
attention, checkpointing, and half precision inside the normalisation.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import nn

from diffaug.errors import ExtraError

Flags = tuple[bool, ...]
Counts = tuple[PositiveInt, ...]


class _Sizes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def _one_a_level(self, levels: int, **given: Any) -> None:
        for name, values in given.items():
            if isinstance(values, tuple) and len(values) != levels:
                raise ValueError(f"{name} has {len(values)} entries for {levels} levels")


class AutoencoderKLSizes(_Sizes):
    """`AutoencoderKL`, or MAISI's `AutoencoderKlMaisi`, which interpolates linearly on its way up."""

    kind: Literal["AutoencoderKL", "AutoencoderKlMaisi"] = "AutoencoderKL"
    in_channels: PositiveInt = 1
    out_channels: PositiveInt = 1
    latent_channels: PositiveInt = 3
    channels: Counts
    num_res_blocks: Counts | PositiveInt = 2
    attention_levels: Flags
    norm_num_groups: PositiveInt = 32
    norm_eps: float = Field(default=1e-6, gt=0)
    with_encoder_nonlocal_attn: bool = True
    with_decoder_nonlocal_attn: bool = True
    use_convtranspose: bool = False
    include_fc: bool = True
    use_combined_linear: bool = False

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        levels = len(self.channels)
        self._one_a_level(levels, attention_levels=self.attention_levels, num_res_blocks=self.num_res_blocks)
        if any(n % self.norm_num_groups for n in self.channels):
            raise ValueError(f"channels {self.channels} are no multiples of {self.norm_num_groups} groups")
        if self.in_channels != self.out_channels:
            raise ValueError("the autoencoder must give as many channels as it takes")
        return self

    @property
    def factor(self) -> int:
        """Voxels for each point of the latent, on each axis."""
        return 2 ** (len(self.channels) - 1)

    def working_bytes(self, voxels: int) -> int:
        """About the memory it takes to decode so many voxels in slabs (see `slabs`)."""
        return round(3.2 * 4 * self.channels[0] * voxels) + 2**28

    def build(self) -> nn.Module:
        """With random weights.

        Raises:
            ExtraError: MONAI is not installed.
        """
        classes = _monai()
        given = self.model_dump(exclude={"kind", "channels"}) | {"spatial_dims": 3}
        if self.kind == "AutoencoderKL":
            return classes[self.kind](**given, channels=self.channels)
        counts = self.num_res_blocks
        given["num_res_blocks"] = [counts] * len(self.channels) if isinstance(counts, int) else counts
        return classes[self.kind](**given, num_channels=self.channels, num_splits=1, save_mem=False)


class DiffusionUNetSizes(_Sizes):
    """`DiffusionModelUNet`, or MAISI's `DiffusionModelUNetMaisi`, which sees spacing and body region, too."""

    kind: Literal["DiffusionModelUNet", "DiffusionModelUNetMaisi"] = "DiffusionModelUNet"
    in_channels: PositiveInt
    out_channels: PositiveInt
    channels: Counts
    num_res_blocks: Counts | PositiveInt = 2
    attention_levels: Flags
    num_head_channels: tuple[int, ...] | PositiveInt = 8
    norm_num_groups: PositiveInt = 32
    norm_eps: float = Field(default=1e-6, gt=0)
    resblock_updown: bool = False
    with_conditioning: bool = False
    transformer_num_layers: PositiveInt = 1
    cross_attention_dim: PositiveInt | None = None
    num_class_embeds: PositiveInt | None = None
    upcast_attention: bool = False
    include_fc: bool = True
    use_combined_linear: bool = False
    include_top_region_index_input: bool = False
    include_bottom_region_index_input: bool = False
    include_spacing_input: bool = False

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        levels = len(self.channels)
        self._one_a_level(
            levels,
            attention_levels=self.attention_levels,
            num_res_blocks=self.num_res_blocks,
            num_head_channels=self.num_head_channels,
        )
        if any(n % self.norm_num_groups for n in self.channels):
            raise ValueError(f"channels {self.channels} are no multiples of {self.norm_num_groups} groups")
        if self.with_conditioning != (self.cross_attention_dim is not None):
            raise ValueError("with_conditioning and cross_attention_dim go together")
        if self.kind == "DiffusionModelUNet" and (self.regions or self.include_spacing_input):
            raise ValueError("regions and spacing are inputs of DiffusionModelUNetMaisi alone")
        if self.include_top_region_index_input != self.include_bottom_region_index_input:
            raise ValueError("the inputs of the top and the bottom region go together")
        return self

    @property
    def regions(self) -> bool:
        """Whether it sees which regions of the body a volume reaches from and to."""
        return self.include_top_region_index_input or self.include_bottom_region_index_input

    @property
    def factor(self) -> int:
        """Of which the latent's sides must be multiples."""
        return 2 ** (len(self.channels) - 1)

    def working_bytes(self, points: int) -> int:
        """About the memory of a call on a latent of so many points: the activations that wait for the way up,
        and those at work."""
        counts = self.num_res_blocks
        blocks = (counts,) * len(self.channels) if isinstance(counts, int) else counts
        waiting = sum(
            (count + 1) * width / 8**level
            for level, (count, width) in enumerate(zip(blocks, self.channels, strict=True))
        )
        # Measured on a CPU: benchmarks/latent_diffusion_memory.
        return round(4 * points * (waiting + 6 * max(self.channels[:2]))) + 2**28

    def build(self) -> nn.Module:
        """With random weights; raises an ExtraError where MONAI is not installed."""
        inputs = {
            "include_top_region_index_input",
            "include_bottom_region_index_input",
            "include_spacing_input",
        }
        maisi = self.kind == "DiffusionModelUNetMaisi"
        given = self.model_dump(exclude={"kind", "channels"} | (set() if maisi else inputs))
        given["num_channels" if maisi else "channels"] = self.channels
        return _lean(_monai()[self.kind](spatial_dims=3, **given))


class ControlNetSizes(_Sizes):
    """MAISI's `ControlNetMaisi`, whose trunk is the denoiser's; the label map enters as `bits` channels."""

    bits: PositiveInt = 8
    embedding_channels: Counts = (8, 32, 64)

    def working_bytes(self, voxels: int) -> int:
        """About the memory of a call beside the denoiser's: the label map's bits, and two activations of so
        many voxels."""
        return 4 * voxels * (self.bits + 2 * self.embedding_channels[0])

    def build(self, denoiser: DiffusionUNetSizes) -> nn.Module:
        """With random weights; raises an ExtraError where MONAI is not installed."""
        own = {
            "out_channels",
            "kind",
            "channels",
            "include_top_region_index_input",
            "include_bottom_region_index_input",
            "include_spacing_input",
        }
        return _lean(
            _monai()["ControlNetMaisi"](
                spatial_dims=3,
                **denoiser.model_dump(exclude=own),
                num_channels=denoiser.channels,
                conditioning_embedding_in_channels=self.bits,
                conditioning_embedding_num_channels=self.embedding_channels,
                use_checkpointing=False,
            )
        )


def _lean(network: nn.Module) -> nn.Module:
    """Let attention be torch's own, which never holds the matrix of all pairs of points.

    The classes refuse to be made so where there is no GPU, where torch does it as well.
    """
    for module in network.modules():
        if type(module).__name__ in ("SABlock", "CrossAttentionBlock"):
            module.use_flash_attention = True  # type: ignore[assignment]
    return network


def _monai() -> dict[str, Any]:
    """The classes by name."""
    try:
        from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
        from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
        from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
        from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
    except ImportError as error:
        raise ExtraError("MONAI", "monai") from error
    found = (AutoencoderKL, AutoencoderKlMaisi, DiffusionModelUNet, DiffusionModelUNetMaisi, ControlNetMaisi)
    return {each.__name__: each for each in found}
