"""Latents in files: safetensors that say which generator they belong to."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator

_KEY = "latent"


@dataclass(frozen=True)
class StoredLatent:
    """What a file holds: a latent `(1, Z, i, j, k)` float32, and the name and weight hash of its generator,
    where the file names them."""

    path: Path
    latent: Tensor
    generator: str | None
    weights_hash: str | None

    def of(self, generator: Generator) -> Tensor:
        """The latent, for `generator` to decode.

        Raises:
            DiffaugError: it belongs to other weights.
        """
        if self.weights_hash not in (None, generator.weights_hash):
            raise DiffaugError(
                f"{self.path} is a latent of {self.generator} with the weights {self.weights_hash}, but "
                f"{generator.name} has {generator.weights_hash}: decode it by the generator that encoded it"
            )
        return self.latent


def latent_bytes(latent: Tensor, generator: Generator) -> bytes:
    """The bytes of a file that holds a latent `(1, Z, i, j, k)` made by `generator`."""
    metadata = {"format": "pt", "generator": generator.name, "weights_hash": generator.weights_hash}
    return save({_KEY: latent.cpu().contiguous()}, metadata)


def read_latent(path: Path) -> StoredLatent:
    """Read what `latent_bytes` gave.

    Raises:
        DiffaugError: the file is no safetensors file, or does not hold one latent.
    """
    advice = "give a file that `diffaug encode` wrote"
    try:
        with safe_open(path, framework="pt") as file:
            metadata, latent = file.metadata() or {}, file.get_tensor(_KEY).float()
    except (OSError, SafetensorError) as error:
        raise DiffaugError(f"{path} holds no latent ({error}): {advice}") from error
    if latent.ndim != 5 or len(latent) != 1:
        raise DiffaugError(f"{path} holds a tensor of the shape {tuple(latent.shape)}: {advice}")
    if broken := latent.numel() - int(latent.isfinite().sum()):
        raise DiffaugError(f"{path} holds {broken} numbers that are NaN or infinite: {advice}")
    return StoredLatent(path, latent, metadata.get("generator"), metadata.get("weights_hash"))
