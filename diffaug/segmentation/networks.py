"""Segmentation networks of MONAI, nnU-Net and segmentation-models-pytorch-3d, by name and settings.

| kind | network | settings |
|---|---|---|
| `dynunet` | MONAI's DynUNet, nnU-Net's plain U-Net | `filters`, one for each level |
| `segresnet` | MONAI's SegResNet | `init_filters`, `blocks_down`, `blocks_up` |
| `unet` | MONAI's residual UNet | `channels`, one for each level, `num_res_units` |
| `swinunetr` | MONAI's SwinUNETR | `feature_size`, `depths`, `num_heads` |
| `nnunet` | what nnU-Net's plans say | `plans` (file), `configuration` |
| `smp3d` | U-Net of segmentation-models-pytorch-3d | `encoder` (name) |
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from diffaug.errors import DiffaugError, ExtraError
from diffaug.files import read_json

NetworkKind = Literal["dynunet", "segresnet", "unet", "swinunetr", "nnunet", "smp3d"]
# Networks of nnU-Net's plans that may be built; a plans file could name anything that Python can import.
NNUNET_CLASSES = ("PlainConvUNet", "ResidualEncoderUNet")
_ARCHITECTURES = "dynamic_network_architectures.architectures.unet."
_TORCH_LAYER = re.compile(
    r"torch\.nn\.(modules\.[a-z_]+\.)?(Conv3d|Conv2d|InstanceNorm3d|InstanceNorm2d|BatchNorm3d|BatchNorm2d|"
    r"LeakyReLU|ReLU|GELU|Dropout3d|Dropout2d)"
)


class NetworkPlan(BaseModel):
    """Which network, as plain JSON.

    Attributes:
        kind: see the module.
        settings: of that kind; what is left out has a small network's value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: NetworkKind = "dynunet"
    settings: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class _Kind:
    """How one kind is built.

    Attributes:
        build: from settings, input channels and classes.
        multiple: of which sides of a patch are multiples, from the settings.
        encoder, head: how the names of their parameters begin, as regular expressions.
        defaults: of the settings.
    """

    build: Callable[[Mapping[str, Any], int, int], nn.Module]
    multiple: Callable[[Mapping[str, Any]], tuple[int, int, int]]
    encoder: str
    head: str
    defaults: dict[str, Any] = field(default_factory=dict)


def build_network(plan: NetworkPlan, channels: int, classes: int, *, seed: int | None = None) -> nn.Module:
    """The network with random weights; input `(B, channels, I, J, K)`, output logits `(B, classes, I, J, K)`.

    Args:
        seed: of the weights; default: torch's random state.

    Raises:
        ExtraError: its library is not installed.
        DiffaugError: settings that it does not know or cannot use.
    """
    kind, settings = _kind(plan), _settings(plan)
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return kind.build(settings, channels, classes)
    except (DiffaugError, ImportError):
        raise
    except Exception as error:
        raise DiffaugError(f"{plan.kind} cannot be built with the settings {settings}: {error}") from error


def patch_multiple(plan: NetworkPlan) -> tuple[int, int, int]:
    """Of which the sides of a patch `(I, J, K)` are multiples, as the network halves them.

    Raises:
        DiffaugError: settings that it does not know or cannot use.
    """
    settings = _settings(plan)
    try:
        return _kind(plan).multiple(settings)
    except (TypeError, ValueError) as error:
        raise DiffaugError(f"{plan.kind} cannot be built with the settings {settings}: {error}") from error


def completed(plan: NetworkPlan) -> NetworkPlan:
    """The plan with all settings, those that were left out too.

    Raises:
        DiffaugError: settings that it does not know.
    """
    return plan.model_copy(update={"settings": _settings(plan)})


def check_patch(plan: NetworkPlan, patch: Sequence[int]) -> None:
    """Refuse a patch that the network cannot halve so often, or of which one voxel would be left.

    Raises:
        DiffaugError: names what it may be.
    """
    multiple = patch_multiple(plan)
    if any(n % m for n, m in zip(patch, multiple, strict=True)) or tuple(patch) == multiple:
        raise DiffaugError(
            f"a patch of {tuple(patch)} voxels does not suit {plan.kind}: its sides must be multiples of "
            f"{multiple}, and one of them larger than that"
        )


def is_head(plan: NetworkPlan, name: str) -> bool:
    """Whether a parameter of the network belongs to its last layer, which depends on the labels."""
    return re.match(_kind(plan).head, name) is not None


def is_encoder(plan: NetworkPlan, name: str) -> bool:
    """Whether a parameter of the network belongs to its encoder."""
    return re.match(_kind(plan).encoder, name) is not None


def _kind(plan: NetworkPlan) -> _Kind:
    assert set(KINDS) == set(get_args(NetworkKind))
    return KINDS[plan.kind]


def _settings(plan: NetworkPlan) -> dict[str, Any]:
    defaults = KINDS[plan.kind].defaults
    if unknown := sorted(set(plan.settings) - set(defaults)):
        raise DiffaugError(
            f"{plan.kind} has no setting {', '.join(unknown)}; it has {', '.join(sorted(defaults))}"
        )
    return defaults | plan.settings


# -- MONAI ---------------------------------------------------------------------------------------------------


def _dynunet(settings: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    nets = _monai()
    filters = list(settings["filters"])
    strides = [1] + [2] * (len(filters) - 1)
    return nets.DynUNet(
        3,
        channels,
        classes,
        kernel_size=[3] * len(filters),
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=filters,
    )


def _segresnet(settings: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    return _monai().SegResNet(3, in_channels=channels, out_channels=classes, **settings)


def _unet(settings: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    levels = list(settings["channels"])
    return _monai().UNet(
        3, channels, classes, levels, [2] * (len(levels) - 1), num_res_units=settings["num_res_units"]
    )


def _swinunetr(settings: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    return _monai().SwinUNETR(channels, classes, **settings)


def _monai() -> Any:
    try:
        from monai.networks import nets
    except ImportError as error:
        raise ExtraError("MONAI", "monai") from error
    return nets


def _cube(side: int) -> tuple[int, int, int]:
    return side, side, side


# -- nnU-Net -------------------------------------------------------------------------------------------------


def _nnunet(settings: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    architecture = _architecture(settings)
    try:
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    except ImportError as error:
        raise ExtraError("nnU-Net", "nnunet") from error
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        channels,
        classes,
        allow_init=True,
        deep_supervision=False,
    )


def _architecture(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture of a plans file, once it names nothing but known networks and layers."""
    file, name = Path(settings["plans"]), settings["configuration"]
    plans = read_json(file)
    try:
        configuration = plans["configurations"][name]
        while "architecture" not in configuration and "inherits_from" in configuration:
            configuration = plans["configurations"][configuration["inherits_from"]]
        architecture: dict[str, Any] = configuration["architecture"]
        arguments = architecture["arch_kwargs"]
        classes = [arguments[key] for key in architecture["_kw_requires_import"]]
        network = architecture["network_class_name"]
    except (KeyError, TypeError) as error:
        known = sorted(plans.get("configurations", {})) if isinstance(plans, dict) else []
        raise DiffaugError(
            f"{file} has no configuration {name!r} with an architecture; it has {', '.join(known) or 'none'}"
        ) from error
    if network not in [_ARCHITECTURES + known for known in NNUNET_CLASSES]:
        raise DiffaugError(f"{file} names the network {network}; known are {', '.join(NNUNET_CLASSES)}")
    for value in classes:
        if value is not None and not _TORCH_LAYER.fullmatch(str(value)):
            raise DiffaugError(f"{file} names {value}, which is no layer that its networks are made of")
    return architecture


def _nnunet_multiple(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    strides = _architecture(settings)["arch_kwargs"]["strides"]
    if len(strides[0]) != 3:
        raise DiffaugError(f"{settings['configuration']} of {settings['plans']} is two-dimensional")
    i, j, k = (prod(stride[axis] for stride in strides) for axis in range(3))
    return i, j, k


# -- segmentation-models-pytorch-3d --------------------------------------------------------------------------


def _smp3d(settings: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    try:
        import segmentation_models_pytorch_3d as smp
    except ImportError as error:
        raise ExtraError("segmentation-models-pytorch-3d", "smp3d") from error
    # Without `None` it would download weights of 2D images.
    return smp.Unet(settings["encoder"], encoder_weights=None, in_channels=channels, classes=classes)


KINDS: dict[NetworkKind, _Kind] = {
    "dynunet": _Kind(
        _dynunet,
        lambda settings: _cube(2 ** (len(settings["filters"]) - 1)),
        encoder=r"(input_block|downsamples|bottleneck)\.",
        head=r"output_block\.",
        defaults={"filters": [16, 32, 64, 128]},
    ),
    "segresnet": _Kind(
        _segresnet,
        lambda settings: _cube(2 ** (len(settings["blocks_down"]) - 1)),
        encoder=r"(convInit|down_layers)\.",
        head=r"conv_final\.",
        defaults={"init_filters": 16, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]},
    ),
    "unet": _Kind(
        _unet,
        lambda settings: _cube(2 ** (len(settings["channels"]) - 1)),
        # Each level holds the next between its own two blocks; the lowest has one block alone.
        encoder=r"model\.(1\.submodule\.)*(0\.|conv|residual)",
        head=r"model\.2\.",
        defaults={"channels": [16, 32, 64, 128], "num_res_units": 2},
    ),
    "swinunetr": _Kind(
        _swinunetr,
        lambda settings: _cube(32),
        encoder=r"swinViT\.",
        head=r"out\.",
        defaults={"feature_size": 24, "depths": [2, 2, 2, 2], "num_heads": [3, 6, 12, 24]},
    ),
    "nnunet": _Kind(
        _nnunet,
        _nnunet_multiple,
        encoder=r"encoder\.",
        head=r"decoder\.seg_layers\.",
        defaults={"plans": "nnUNetPlans.json", "configuration": "3d_fullres"},
    ),
    "smp3d": _Kind(
        _smp3d,
        lambda settings: _cube(32),
        encoder=r"encoder\.",
        head=r"segmentation_head\.",
        defaults={"encoder": "resnet18"},
    ),
}
