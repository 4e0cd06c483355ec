"""The inspection of a build's candidates, by the copy detector of an audit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaug.audit.detector import FILE, Detector, intensity_distances, read_detector
from diffaug.audit.segmenting import LabelJudge, read_judge
from diffaug.audit.volumes import LEVELS, on_grid
from diffaug.datasets.manifest import InspectionRecord
from diffaug.datasets.writing import Made
from diffaug.errors import DiffaugError
from diffaug.evaluation.alignment import correlations_over_views
from diffaug.evaluation.embedding import embed_mirrored, embed_shifted
from diffaug.files import PRIVATE
from diffaug.generators.generator import Generator


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
            "intensity": f"intensities farther than {own.intensities:.4f} standard deviations from the mean "
            "of the training scans, as none of these is",
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
        images = torch.from_numpy(volumes).to(self.detector.training.device)
        own = self.detector.record
        shifted = self._most_alike(embed_shifted(self.detector.model, images))
        mirrored = self._most_alike(embed_mirrored(self.detector.model, images))
        # What is no number is no good case either.
        copies = ~((shifted <= own.threshold) & (mirrored <= own.mirrored_threshold))
        levels = [[np.quantile(channel, LEVELS) for channel in volume] for volume in volumes]
        odd = ~(intensity_distances(np.array(levels), self.detector.intensities) <= own.intensities)
        found = []
        for n, made in enumerate(candidates):
            reasons = {
                "copy": bool(copies[n]),
                "intensity": bool(odd[n]),
                # A label map that was given is none of the generator's.
                "volume": made.source is None and self._misshapen(made),
                "label": self.judge is not None and not self.judge.agrees(made),
            }
            found.append([name for name, refused in reasons.items() if refused])
        return found

    def _most_alike(self, views: Tensor) -> Tensor:
        """Largest similarity `(B,)` of the views `(B, M, 64)` of each case to a training case."""
        return correlations_over_views(views, self.detector.training).amax(1).cpu()

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
    places = [folder / FILE, folder / PRIVATE / FILE]
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
    judge = read_judge(segmenter, labels).to(generator.device) if segmenter is not None else None
    own = read_detector(detector).to(generator.device)
    return Inspection(own, labels, len(generator.card.channels), judge)
