"""The copy detector of an audit, as a file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffaug.audit.encoder import load_encoder
from diffaug.audit.features import Space
from diffaug.audit.volumes import CaseSet, Sets
from diffaug.errors import DiffaugError
from diffaug.evaluation.embedding import Embedder
from diffaug.evaluation.memorisation import find_copies
from diffaug.files import atomic_path, sha256_file
from diffaug.generators.card import CardGrid
from diffaug.generators.grid import Grid

FILE = "copy_detector.safetensors"
_DAMAGED = "is no copy detector, or damaged: take the one that diffaug audit or diffaug fit wrote"


class DetectorRecord(BaseModel):
    """Everything in a detector's file but its tensors.

    Attributes:
        grid: on which cases are compared.
        channels: of the images.
        threshold: similarity of a case to its nearest training case above which it is refused.
        mirrored_threshold: the same for its mirror images.
        intensities: largest distance of a training case's intensities from the mean training case's.
        volumes: label's name -> smallest and largest volume of a training case, mm^3.
        real: share of real cases that each check refuses; for copies the expected one.
        training: number of training cases.
        files: SHA-256 of their files on the grid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    grid: CardGrid
    channels: int
    threshold: float
    mirrored_threshold: float
    intensities: float
    volumes: dict[str, tuple[float, float]]
    real: dict[str, float | None]
    training: int
    files: str


def write_detector(model: Embedder, space: Space, sets: Sets, grid: Grid, path: Path) -> None:
    """Keep what finds copies of an audit's training cases, and the ranges of its real cases.

    The file holds no scan. Whoever has it can test whether a scan that they hold was used for training.

    Args:
        model: the audit's encoder.
        space: the encoder's space.
    """
    copies = find_copies([search.similarities for search in space.searches], sets.held_out.patients)
    middle = sets.training.intensities.mean(0)
    limit = float(intensity_distances(sets.training.intensities, middle).max())
    volumes = {
        name: (float(np.nanmin(v)), float(np.nanmax(v)))
        for name, v in sets.training.label_volumes.items()
        if np.isfinite(v).any()
    }
    beyond = intensity_distances(sets.held_out.intensities, middle) > limit
    record = DetectorRecord(
        grid=CardGrid.of(grid),
        channels=sets.training.images.shape[1],
        threshold=copies.searches[0].threshold,
        mirrored_threshold=copies.searches[1].threshold,
        intensities=limit,
        volumes=volumes,
        real={
            "copy": min(1.0, sum(found.expected for found in copies.searches)),
            "intensity": float(beyond.mean()),
            "volume": _beyond_volumes(sets.held_out, volumes),
        },
        training=len(sets.training),
        files=sets.training.files,
    )
    tensors = {f"encoder.{name}": _compact(value) for name, value in model.state_dict().items()}
    tensors |= {
        "training": torch.from_numpy(space.training).half(),
        "intensities": torch.from_numpy(middle).float(),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"detector": record.model_dump_json()})


def _compact(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).contiguous().cpu()


def _beyond_volumes(cases: CaseSet, volumes: Mapping[str, tuple[float, float]]) -> float | None:
    """Share of labelled cases with a label outside the range; None where no case has such labels."""
    names = [name for name in volumes if name in cases.label_volumes]
    if not names:
        return None
    found = np.stack([cases.label_volumes[name] for name in names])
    limits = np.array([volumes[name] for name in names])
    labelled = np.isfinite(found).all(0)
    outside = (found < limits[:, :1]) | (found > limits[:, 1:])
    return float(outside[:, labelled].any(0).mean()) if labelled.any() else None


def intensity_distances(intensities: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wasserstein distance of quantile functions `(N, C, Q)` from that of `(C, Q)`."""
    distances: NDArray[np.float64] = np.abs(intensities - middle).mean((1, 2))
    return distances


@dataclass(frozen=True)
class Detector:
    """A detector as its file holds it.

    Attributes:
        model: the encoder.
        training: embeddings of the training cases `(N, 64)`.
        intensities: quantiles of the mean training case `(C, 33)`.
        record: everything else.
        sha256: of the file.
    """

    model: Embedder
    training: Tensor
    intensities: NDArray[np.float64]
    record: DetectorRecord
    sha256: str

    @property
    def grid(self) -> Grid:
        """On which cases are compared."""
        return self.record.grid.to_grid()

    def to(self, device: torch.device) -> "Detector":
        """The same, with its tensors on a device."""
        return replace(self, model=self.model.to(device), training=self.training.to(device))


def read_detector(path: Path) -> Detector:
    """Read what `write_detector` wrote.

    Raises:
        DiffaugError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise DiffaugError(f"{path} does not exist: diffaug audit and diffaug fit write a copy detector")
    try:
        with safe_open(path, framework="pt") as file:
            record = DetectorRecord.model_validate_json((file.metadata() or {})["detector"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = {
            name.removeprefix("encoder."): value.float() if value.is_floating_point() else value
            for name, value in tensors.items()
            if name.startswith("encoder.")
        }
        model = load_encoder(state, record.channels)
        training, intensities = tensors["training"].float(), tensors["intensities"].double().numpy()
    except (SafetensorError, ValidationError, KeyError, RuntimeError) as error:
        raise DiffaugError(f"{path} {_DAMAGED}") from error
    return Detector(model, training, intensities, record, sha256_file(path))
