"""MONAI's networks with weights of the user's own, as feature extractors."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from diffaug.errors import DiffaugError

# What DataParallel and torch.compile put before the names.
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
NETWORKS = ("resnet10", "resnet18", "resnet34", "resnet50")


def load_network(name: str, weights: Path) -> nn.Module:
    """A MONAI network that gives features `(B, D)` of volumes `(B, C, I, J, K)`, with weights from a file.

    Weights are read without unpickling anything but tensors; heads are left out, prefixes of wrappers taken
    off. MedicalNet's files fit.

    Args:
        name: one of `NETWORKS`.
        weights: a state dict, as safetensors or as torch saves it, alone or under "state_dict".

    Raises:
        DiffaugError: an unknown name, MONAI missing, or weights that cannot be read or do not fit.
    """
    if name not in NETWORKS:
        raise DiffaugError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    try:
        from monai.networks import nets
    except ImportError as error:
        raise DiffaugError(
            f"{name} comes from MONAI, which is not installed: pip install diffaug[monai]"
        ) from error
    state = {WRAPPERS.sub("", key): value for key, value in _read(weights).items()}
    state = {key: value for key, value in state.items() if not key.startswith(("fc.", "conv_seg."))}
    first = state.get("conv1.weight")
    if first is None or first.ndim != 5:
        raise DiffaugError(f"{weights} holds no 3D ResNet: it has no conv1.weight of five axes")
    shortcuts = [key for key in state if ".downsample." in key]
    network: nn.Module = getattr(nets, name)(
        pretrained=False,
        spatial_dims=3,
        n_input_channels=first.shape[1],
        conv1_t_size=first.shape[2],
        feed_forward=False,
        shortcut_type="B" if shortcuts else "A",
        bias_downsample=any(key.endswith(".downsample.0.bias") for key in shortcuts),
    )
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DiffaugError(f"{weights} does not fit MONAI's {name}: {error}") from error
    return network.eval().requires_grad_(False)


def check_channels(network: nn.Module, channels: int, weights: Path) -> None:
    """Refuse a network of other channels than the images have."""
    own = next(network.parameters()).shape[1]
    if own != channels:
        raise DiffaugError(f"{weights} is of a network for {own} channels, the images have {channels}")


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged or foreign file makes the readers raise.
        raise DiffaugError(
            f"{file} cannot be read as weights ({str(error) or type(error).__name__}): give safetensors, or "
            "what torch.save made of a state dict"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not (isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())):
        raise DiffaugError(f"{file} holds no state dict: save the network's state_dict()")
    return content
