"""Real and synthetic cases on the generator's grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaug.datasets.reading import read_dataset
from diffaug.datasets.volumes import load_case
from diffaug.evaluation.segmenter import standardise
from diffaug.generators.grid import Grid, place
from diffaug.generators.intensity import IntensityConvention, fit_intensity_map

GRID = Grid(("R", "A", "S"), (1.0, 1.0, 1.0), (40, 56, 40))
LABELS = (1, 2)
CONVENTION = IntensityConvention(kind="percentile", typical=[(0.0, 1000.0)])


@dataclass(frozen=True)
class Cases:
    """Volumes on `GRID`: images `(N, 1, I, J, K)` float32 in their own units, labels of that shape, int16."""

    names: tuple[str, ...]
    patients: tuple[str, ...]
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, indices: Sequence[int]) -> "Cases":
        """Some of the cases."""
        rows = list(indices)
        names, patients = (tuple(values[i] for i in rows) for values in (self.names, self.patients))
        return Cases(names, patients, self.images[rows], self.labels[rows])

    def draw(self, count: int, seed: int, *, one_per_patient: bool = False) -> "Cases":
        """`count` cases: patients in random order, each with all of its cases or with the first one alone."""
        order = np.random.default_rng(seed).permutation(sorted(set(self.patients))).tolist()
        rows = []
        for patient in order:
            own = [i for i, other in enumerate(self.patients) if other == patient]
            rows += own[:1] if one_per_patient else own
        return self.pick(rows[:count])

    def standardised(self) -> Tensor:
        """What the reference segmenter sees."""
        return standardise(self.images)

    def network_units(self) -> Tensor:
        """Images with their 0.5 and 99.5 percentiles at -1 and 1, clipped at 1.5: the unit of distances."""
        return torch.stack([to_network_units(image, image) for image in self.images])

    def foreground(self) -> Tensor:
        """Label maps `(N, L, I, J, K)`, one channel of 0 and 1 for each label but the background."""
        return torch.cat([(self.labels == label).float() for label in LABELS], 1)


def to_network_units(image: Tensor, reference: Tensor) -> Tensor:
    """An image `(1, I, J, K)` in network units by the percentiles of `reference`."""
    return fit_intensity_map(reference, CONVENTION).normalise(image)


def read_cases(data: Path, subsets: Sequence[str]) -> Cases:
    """The cases of some subsets, shifted onto the grid by whole voxels, mirrored beyond the scan."""
    folder = data / "Task04_Hippocampus"
    if not folder.is_dir():
        raise SystemExit(f"{folder} does not exist: give --data the folder that holds Task04_Hippocampus")
    dataset = read_dataset(folder)
    if dataset.split is None or not dataset.patients_given:
        raise SystemExit(
            f"{folder} needs splits.json and patients.csv: a split by patient is part of every figure"
        )
    wanted = {name for subset in subsets for name in dataset.split[subset]}
    names, patients, images, labels = [], [], [], []
    for case in dataset.cases:
        if case.name not in wanted:
            continue
        loaded = load_case(case)
        assert loaded.label is not None
        placement = place(GRID, loaded.image.shape[1:], loaded.affine)
        if not placement.same_spacing:
            raise SystemExit(f"{case.name}: the benchmark compares voxels and needs scans of 1 mm spacing")
        label = torch.from_numpy(np.where(np.isin(loaded.label, LABELS), loaded.label, 0))
        names.append(case.name)
        patients.append(case.patient)
        images.append(placement.to_grid(torch.from_numpy(loaded.image)[None])[0])
        labels.append(placement.label_to_grid(label[None])[0].short())
    return Cases(tuple(names), tuple(patients), torch.stack(images), torch.stack(labels))
