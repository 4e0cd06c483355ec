"""What the Generator asks of an architecture.

All tensors here are on the grid and in network units; orientation, spacing, units and label ids are the
Generator's business. Axes of volumes are the grid's; those of latents are the architecture's own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffaug.errors import CardError, VerbError
from diffaug.files import atomic_path
from diffaug.generators.seeds import CaseNoise


@dataclass(frozen=True)
class Sampling:
    """How a trajectory is sampled.

    Attributes:
        guidance: weight of the label (or modality) on the image; 1 where there is none.
        shift: lean towards high noise; 1 where there is none.
        parameters: what else the denoiser is told, by name.
    """

    sampler: str
    steps: int
    guidance: float = 1.0
    shift: float = 1.0
    parameters: Mapping[str, float] = field(default_factory=dict)


class Model(nn.Module, ABC):
    """Networks of one architecture and the verbs in latent space.

    A model overrides the verbs that its networks have; the others raise a VerbError. A label is given as its
    latent `condition`, without channels where there is none.
    """

    files: Mapping[str, str]
    """Weight file -> prefix of the parameters in it."""
    stored_as: ClassVar[torch.dtype]
    """What floating-point weights are written as."""

    @property
    @abstractmethod
    def image_latent(self) -> tuple[int, ...]:
        """Shape of an image's latent: channels, then its axes."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Volume in network units to its latent."""

    @abstractmethod
    def decode_image(self, latent: Tensor) -> Tensor:
        """Latent to a volume in network units."""

    def encode_label(self, label: Tensor) -> Tensor:
        """Label map `(B, 1, I, J, K)`, places in the vocabulary, to its latent; one without channels for a
        model that knows no labels."""
        return torch.zeros(len(label), 0, *self.image_latent[1:], device=label.device)

    def decode_label(self, latent: Tensor) -> Tensor:
        """Latent to logits `(B, L, I, J, K)`."""
        raise CardError("this generator knows no labels")

    def sample(self, noise: CaseNoise, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Latents of images and of label maps, from nothing."""
        raise self._cannot("sample")

    def paint(self, condition: Tensor, noise: CaseNoise, sampling: Sampling) -> Tensor:
        """The latent of an image that shows a label."""
        raise self._cannot("paint")

    def vary(
        self, clean: Tensor, strength: float, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """A latent partly noised and made clean again (SDEdit, Meng et al. 2022).

        Args:
            strength: noise level in (0, 1] to begin from. The number of steps shrinks in proportion.
        """
        raise self._cannot("vary")

    def inpaint(
        self, image: Tensor, mask: Tensor, condition: Tensor, noise: CaseNoise, sampling: Sampling
    ) -> Tensor:
        """The latent of a volume whose voxels in `mask` `(B, 1, I, J, K)` are made anew, given the rest."""
        raise self._cannot("inpaint")

    def segment(self, latent: Tensor, noise: CaseNoise, sampling: Sampling) -> Tensor:
        """The latent of the label map of an image."""
        raise self._cannot("segment")

    def _cannot(self, verb: str) -> VerbError:
        return VerbError(f"the networks of {type(self).__name__} cannot {verb}")

    # -- files -----------------------------------------------------------------------------------------------

    def save_weights(self, folder: Path) -> list[str]:
        """Write the weights to `folder`; returns the file names."""
        for name, prefix in self.files.items():
            # Copies, since safetensors refuses tensors that share memory.
            state = {
                key.removeprefix(prefix): (t.to(self.stored_as) if t.is_floating_point() else t).clone(
                    memory_format=torch.contiguous_format
                )
                for key, t in self.state_dict().items()
                if key.startswith(prefix)
            }
            with atomic_path(folder / name) as temporary:
                save_file(state, temporary)
        return list(self.files)

    def load_weights(self, folder: Path, files: Iterable[str]) -> None:
        """Read the weights that `save_weights` wrote.

        Raises:
            CardError: for a file that is missing or whose tensors do not fit the card's networks.
        """
        if missing := sorted(set(self.files) - set(files)):
            raise CardError(f"the card in {folder} does not list {missing}, which its architecture needs")
        own = self.state_dict()
        for name, prefix in self.files.items():
            state = {prefix + key: tensor for key, tensor in load_file(folder / name).items()}
            expected = {key: tensor for key, tensor in own.items() if key.startswith(prefix)}
            if problem := misfit(state, expected):
                raise CardError(f"{folder / name} does not fit the card: {problem}")
            own |= {key: tensor.to(own[key].dtype) for key, tensor in state.items()}
        self.load_state_dict(own)


def misfit(state: dict[str, Tensor], expected: dict[str, Tensor], most: int = 5) -> str:
    """What keeps tensors from being those that are expected: keys that are missing, unexpected or of another
    shape, at most `most` of each; empty where nothing does."""
    shared = sorted(expected.keys() & state.keys())
    parts = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "wrong shape": [
            f"{k} {_shape(state[k])} instead of {_shape(expected[k])}"
            for k in shared
            if state[k].shape != expected[k].shape
        ],
    }
    return "; ".join(f"{what} {_some(keys, most)}" for what, keys in parts.items() if keys)


def latent_mask(mask: Tensor, downsampling: Sequence[int]) -> Tensor:
    """A voxel mask `(B, 1, I, J, K)` at the latent's resolution: any voxel counts, and one more all around.

    A code depends on voxels around its own: without the widening the old content would leak into the region.
    """
    factors = tuple(downsampling)
    pooled = nn.functional.max_pool3d(mask.float(), factors, stride=factors, ceil_mode=True)
    return nn.functional.max_pool3d(pooled, 3, stride=1, padding=1)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(keys: list[str], most: int) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
