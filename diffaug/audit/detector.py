"""The copy detector of an audit as a file, and the inspection of a build's candidates by it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from diffaug.audit.fidelity import Sets
from diffaug.audit.record import GridRecord
from diffaug.audit.segmenting import LabelJudge, read_judge
from diffaug.audit.volumes import LEVELS, CaseSet, on_grid
from diffaug.datasets.manifest import InspectionRecord
from diffaug.datasets.writing import Made
from diffaug.errors import DiffaugError
from diffaug.evaluation.embedding import Embedder, correlation, embed_mirrored, embed_shifted
from diffaug.evaluation.memorisation import find_copies
from diffaug.files import atomic_path, sha256_file
from diffaug.generators.generator import Generator
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
    grid: GridRecord
    outside: Literal["mirror", "background"]
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
    limit = float(_distances(sets.training.intensities, middle).max())
    volumes = {
        name: (float(np.nanmin(v)), float(np.nanmax(v)))
        for name, v in sets.training.label_volumes.items()
        if np.isfinite(v).any()
    }
    beyond = _distances(sets.held_out.intensities, middle) > limit
    record = DetectorRecord(
        grid=GridRecord(orientation=grid.orientation, spacing=grid.spacing, shape=grid.shape),
        outside=grid.outside,
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


def _distances(intensities: NDArray[np.float64], middle: NDArray[np.float64]) -> NDArray[np.float64]:
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
        own = self.record.grid
        return Grid(own.orientation, own.spacing, own.shape, self.record.outside)


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


class Inspection:
    """Refuses candidates that are copies, or beyond the range of real cases.

    Args:
        detector: of the generator's training cases.
        labels: id -> name in the candidates' label maps.
        judge: an independent segmenter that the label has to agree with, or None.

    Raises:
        DiffaugError: the generator makes other channels than the detector knows.
    """

    def __init__(
        self, detector: Detector, labels: Mapping[int, str], channels: int, judge: LabelJudge | None = None
    ) -> None:
        if detector.record.channels != channels:
            raise DiffaugError(
                f"the copy detector knows {detector.record.channels} channels, the generator makes "
                f"{channels}: give the detector of this generator"
            )
        self.detector, self.judge = detector, judge
        self.volumes = {
            number: detector.record.volumes[name]
            for number, name in labels.items()
            if number != 0 and name in detector.record.volumes
        }

    @property
    def record(self) -> InspectionRecord:
        """See `diffaug.datasets.inspecting.Inspector`."""
        own = self.detector.record
        checks = {
            "copy": f"similarity to a training scan above {own.threshold:.4f}, mirrored above "
            f"{own.mirrored_threshold:.4f}",
            "intensity": f"intensities farther than {own.intensities:.4f} standard deviations from the "
            "mean of "
            "the training scans, as none of these is",
        }
        real = {"copy": own.real.get("copy"), "intensity": own.real.get("intensity")}
        if self.volumes:
            checks["volume"] = "a structure smaller or larger than in any training scan"
            real["volume"] = own.real.get("volume")
        if self.judge is not None:
            checks["label"] = (
                f"Dice with an independent segmenter, trained on real scans, below {self.judge.least:.3f}"
            )
            real["label"] = self.judge.real
        return InspectionRecord(
            detector=self.detector.sha256,
            segmenter=self.judge.sha256 if self.judge else None,
            checks=checks,
            real=real,
        )

    def refuse(self, candidates: Sequence[Made]) -> list[list[str]]:
        """See `diffaug.datasets.inspecting.Inspector`."""
        grid = self.detector.grid
        volumes = np.stack([on_grid(made.image, made.label, made.affine, grid) for made in candidates])
        images = torch.from_numpy(volumes)
        own = self.detector.record
        shifted = self._most_alike(embed_shifted(self.detector.model, images))
        mirrored = self._most_alike(embed_mirrored(self.detector.model, images))
        # What is no number is no good case either.
        copies = ~((shifted <= own.threshold) & (mirrored <= own.mirrored_threshold))
        levels = [[np.quantile(channel, LEVELS) for channel in volume] for volume in volumes]
        odd = ~(_distances(np.array(levels), self.detector.intensities) <= own.intensities)
        found = []
        for n, made in enumerate(candidates):
            reasons = {
                "copy": bool(copies[n]),
                "intensity": bool(odd[n]),
                "volume": self._misshapen(made),
                "label": self.judge is not None and not self.judge.agrees(made),
            }
            found.append([name for name, refused in reasons.items() if refused])
        return found

    def _most_alike(self, views: Tensor) -> Tensor:
        """Largest similarity `(B,)` of the views `(B, M, 64)` of each case to a training case."""
        return correlation(views.flatten(0, 1), self.detector.training).view(len(views), -1).amax(1)

    def _misshapen(self, made: Made) -> bool:
        """Whether a structure is smaller or larger than any real one."""
        if made.label is None:
            return False
        voxel = abs(float(np.linalg.det(made.affine[:3, :3])))
        sizes = {number: float(np.sum(made.label == number)) * voxel for number in self.volumes}
        return any(not low <= sizes[number] <= high for number, (low, high) in self.volumes.items())


def find_detector(folder: Path, name: str) -> Path:
    """The detector in a generator's folder, or in its private part.

    Raises:
        DiffaugError: there is none.
    """
    places = [folder / FILE, folder / "private" / FILE]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DiffaugError(
            f"{name} has no copy detector ({' or '.join(map(str, places))}): audit a build of it with "
            "diffaug audit, and give the detector that this writes, copy_detector.safetensors in its "
            "private folder"
        )
    return found


def inspect_by(
    generator: Generator, detector: Path, segmenter: Path | None, *, allow_label_drift: bool = False
) -> Inspection:
    """The inspection of what a generator makes, by files.

    Raises:
        DiffaugError: a file cannot be read, or belongs to other channels or labels.
    """
    # Label maps that are copied say nothing of the image, and carry ids of their source.
    labels = {} if allow_label_drift else generator.card.labels
    judge = read_judge(segmenter, labels) if segmenter is not None else None
    return Inspection(read_detector(detector), labels, len(generator.card.channels), judge)
