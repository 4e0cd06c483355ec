"""LPIPS (Zhang et al. 2018) on slices, with weights that the user has on disk.

Modules and parameters have the names of the authors' checkpoints, which carry it as `perceptual_model`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffaug.errors import DiffaugError
from diffaug.generators.model import misfit
from diffaug.zoo.unpickling import read_checkpoint

# VGG16's layers by their index: convolutions (with their widths) and poolings; the rest are ReLUs.
CONVOLUTIONS = {
    0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
    17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
POOLINGS = (4, 9, 16, 23)
# Last layer (a ReLU) of each slice, and its width.
SLICES = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}


class VGG16(nn.Module):
    """The five feature maps of VGG16 that LPIPS compares."""

    def __init__(self) -> None:
        super().__init__()
        first = 0
        for number, last in enumerate(SLICES, start=1):
            part = nn.Sequential()
            for index in range(first, last + 1):
                if index in CONVOLUTIONS:
                    part.add_module(str(index), nn.Conv2d(*CONVOLUTIONS[index], 3, padding=1))
                else:
                    part.add_module(str(index), nn.MaxPool2d(2) if index in POOLINGS else nn.ReLU())
            self.add_module(f"slice{number}", part)
            first = last + 1

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            x = part(x)
            features.append(x)
        return features


class ScalingLayer(nn.Module):
    """Images in [-1, 1] to VGG16's range."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class Linear(nn.Module):
    """A weight for each channel; the dropout before it is never active."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Perceptual distance of slices `(B, C, H, W)` in [-1, 1]: `(B,)`.

    Frozen, always in evaluation mode and in float32: the same slices have the same distance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16()
        for number, width in enumerate(SLICES.values()):
            self.add_module(f"lin{number}", Linear(width))
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            # Each channel is looked at as a grey image.
            grey = [x.float().flatten(0, 1)[:, None].expand(-1, 3, -1, -1) for x in (a, b)]
            features = [self.net(self.scaling_layer(x)) for x in grey]
            distance = torch.zeros(len(grey[0]), device=a.device)
            for number, (p, q) in enumerate(zip(*features, strict=True)):
                weighted = self.get_submodule(f"lin{number}")((_unit(p) - _unit(q)).square())
                distance = distance + weighted.mean(dim=(1, 2, 3))
        return distance.view(len(a), -1).mean(dim=1)


def _unit(x: Tensor) -> Tensor:
    # The floor keeps the root's gradient finite where all features are 0.
    return x / (x.square().sum(dim=1, keepdim=True).clamp(min=1e-20).sqrt() + 1e-10)


def three_planes(a: Tensor, b: Tensor, lpips: LPIPS, generator: torch.Generator) -> Tensor:
    """Mean distance of one random slice of each of the three axes of volumes `(B, C, D, H, W)`, summed over
    the axes: with depth slices alone a network leaves artefacts across them."""
    total = torch.zeros((), device=a.device)
    for axis in (2, 3, 4):
        chosen = torch.randint(a.shape[axis], (len(a),), generator=generator)
        slices = [
            torch.stack([v.select(axis - 1, int(n)) for v, n in zip(x, chosen, strict=True)]) for x in (a, b)
        ]
        total = total + lpips(*slices).mean()
    return total


def load_lpips(files: Sequence[Path]) -> LPIPS:
    """LPIPS with the weights in `files` together: safetensors or PyTorch files, such as the authors' `.ckpt`.

    Understood are LPIPS's own names, with or without `perceptual_model.` before them, and torchvision's
    VGG16 (`features.0.weight`).

    Raises:
        DiffaugError: a file that cannot be read, or weights that are missing.
    """
    lpips = LPIPS()
    expected = lpips.state_dict()
    state: dict[str, Tensor] = {k: v for k, v in expected.items() if k.startswith("scaling_layer")}
    for path in files:
        for key, tensor in _read(path).items():
            key = key.removeprefix("perceptual_model.")
            if key.startswith("features."):
                index = int(key.split(".")[1])
                number = 1 + sum(last < index for last in SLICES)
                key = f"net.slice{number}.{key.removeprefix('features.')}"
            if key in expected:
                state[key] = tensor
    if problem := misfit(state, expected):
        names = ", ".join(map(str, files))
        raise DiffaugError(f"{names} do not hold the weights of LPIPS (VGG16): {problem}")
    lpips.load_state_dict(state)
    return lpips


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:
            raise DiffaugError(f"cannot read weights from {path}: {error}") from error
    found = read_checkpoint(path)
    found = found.get("state_dict", found)
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}
