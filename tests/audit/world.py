"""A small world of scans: blobs in smooth texture, of known patients, and cases made from them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from diffaug.audit.auditing import Part
from diffaug.audit.features import NamedSearch, Space, intensity_space
from diffaug.audit.volumes import LEVELS, CaseSet, Sets
from diffaug.datasets.reading import read_dataset
from diffaug.evaluation.memorisation import Search
from diffaug.generators.grid import Grid
from diffaug.progress import Progress

SHAPE = (16, 16, 16)
AFFINE = np.diag([2.0, 2, 2, 1])
GRID = Grid(("R", "A", "S"), (2.0, 2.0, 2.0), SHAPE)
LABELS = {"background": 0, "core": 1, "shell": 2}


class Scan(NamedTuple):
    """An image and its label map."""

    image: np.ndarray
    label: np.ndarray


class Person:
    """Somebody whose scans all show one anatomy, each with noise of its own."""

    def __init__(self, rng: np.random.Generator) -> None:
        centre = 7.5 + rng.uniform(-1, 1, 3)
        distance = np.sqrt(sum((i - c) ** 2 for i, c in zip(np.indices(SHAPE), centre, strict=True)))
        radius = rng.uniform(4.5, 6)
        texture = gaussian_filter(rng.normal(size=SHAPE), 1.5)
        self.image = 400 + 150 / (1 + np.exp(distance - radius)) + 120 * texture / texture.std()
        self.label = np.select([distance < 0.6 * radius, distance < radius], [1, 2]).astype(np.uint8)
        self._rng = rng

    def scan(self) -> Scan:
        noisy = self.image + self._rng.normal(scale=12, size=SHAPE)
        return Scan(noisy.round().astype(np.int16), self.label)


# -------- datasets on disk


def write_decathlon(
    root: Path, scans: Mapping[str, Scan], affine: np.ndarray = AFFINE, labels: Mapping[str, int] = LABELS
) -> Path:
    """A dataset in the decathlon's layout; without label maps where `labels` is empty."""
    for folder in ("imagesTr", "labelsTr") if labels else ("imagesTr",):
        (root / folder).mkdir(parents=True)
    entries = []
    for name, scan in scans.items():
        entries.append({"image": f"./imagesTr/{name}.nii.gz"})
        nib.save(nib.Nifti1Image(scan.image, affine), root / "imagesTr" / f"{name}.nii.gz")
        if labels:
            entries[-1]["label"] = f"./labelsTr/{name}.nii.gz"
            nib.save(nib.Nifti1Image(scan.label, affine), root / "labelsTr" / f"{name}.nii.gz")
    description = {
        "name": root.name,
        "licence": "CC0-1.0",
        "modality": {"0": "MRI"},
        "labels": {str(number): name for name, number in labels.items()} or {"0": "background"},
        "training": entries,
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_nnunet(root: Path, scans: Mapping[str, Scan]) -> Path:
    """A labelled dataset in nnU-Net's raw layout."""
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for name, scan in scans.items():
        nib.save(nib.Nifti1Image(scan.image, AFFINE), root / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(scan.label, AFFINE), root / "labelsTr" / f"{name}.nii.gz")
    description = {
        "name": root.name,
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": len(scans),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_patients(root: Path, patients: Mapping[str, str]) -> None:
    with (root / "patients.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([("case", "patient"), *patients.items()])


def part(root: Path, *subsets: str) -> Part:
    """The cases of a dataset, or of some subsets of its split."""
    dataset = read_dataset(root)
    if not subsets:
        return Part(dataset, dataset.cases)
    assert dataset.split is not None
    chosen = {name for subset in subsets for name in dataset.split[subset]}
    return Part(dataset, [case for case in dataset.cases if case.name in chosen])


@dataclass(frozen=True)
class World:
    """Folders of datasets.

    Attributes:
        real: 30 training cases of 20 patients, and 20 held-out cases of 16 patients, with table and split.
        leaky: 24 cases of other people, but for copies.
        copies: case of `leaky` -> the training case that it is.
        mirrored: case of `leaky` -> the training case that it mirrors.
        honest: 24 cases of other people.
        noise: 24 cases of nobody.
    """

    real: Path
    leaky: Path
    copies: Mapping[str, str]
    mirrored: Mapping[str, str]
    honest: Path
    noise: Path

    @property
    def training(self) -> Part:
        return part(self.real, "train")

    @property
    def held_out(self) -> Part:
        return part(self.real, "validation", "test")


def make_world(folder: Path) -> World:
    rng = np.random.default_rng(0)
    scans: dict[str, Scan] = {}
    patients: dict[str, str] = {}
    split: dict[str, list[str]] = {}
    # People with one and with two scans.
    for subset, once, twice in (("train", 10, 10), ("validation", 8, 0), ("test", 4, 4)):
        split[subset] = []
        for number in range(once + twice):
            person = Person(rng)
            for visit in range(1 if number < once else 2):
                name = f"{subset}_{number:02d}_{visit}"
                scans[name], patients[name] = person.scan(), f"{subset} patient {number}"
                split[subset].append(name)
    real = write_decathlon(folder / "Real", scans)
    write_patients(real, patients)
    (real / "splits.json").write_text(json.dumps(split))

    copies = {"made_003": "train_04_0", "made_011": "train_15_1", "made_020": "train_00_0"}
    mirrored = {"made_007": "train_08_0"}
    others = {f"made_{number:03d}": Person(rng).scan() for number in range(24)}
    leaky = dict(others)
    leaky |= {name: scans[original] for name, original in copies.items()}
    leaky |= {
        name: Scan(*(array[:, ::-1].copy() for array in scans[original]))
        for name, original in mirrored.items()
    }
    noise = {
        name: Scan(rng.integers(200, 800, SHAPE).astype(np.int16), scan.label)
        for name, scan in others.items()
    }
    return World(
        real=real,
        leaky=write_nnunet(folder / "Dataset901_Leaky", leaky),
        copies=copies,
        mirrored=mirrored,
        honest=write_nnunet(folder / "Dataset902_Honest", others),
        noise=write_nnunet(folder / "Dataset903_Noise", noise),
    )


# -------- cases in memory


def case_set(prefix: str, images: np.ndarray, patients: Sequence[str] | None = None) -> CaseSet:
    """Cases from volumes `(N, I, J, K)` or `(N, C, I, J, K)`, with figures that are theirs but for labels."""
    images = images[:, None] if images.ndim == 4 else images
    names = tuple(f"{prefix}_{number}" for number in range(len(images)))
    return CaseSet(
        names=names,
        patients=names if patients is None else tuple(patients),
        images=images.astype(np.float16),
        intensities=np.quantile(images.astype(float), LEVELS, axis=(2, 3, 4)).transpose(1, 2, 0),
        consistency=np.random.default_rng(len(images)).uniform(0.5, 1, (len(images), 3)),
        label_volumes={},
        files=f"{prefix} of {len(images)}",
    )


def standard_sets(synthetic: int = 18, training: int = 20, held_out: int = 12, seed: int = 0) -> Sets:
    """Independent standardised textures of 8 x 8 x 8 voxels."""
    rng = np.random.default_rng(seed)

    def textures(count: int) -> np.ndarray:
        found = gaussian_filter(rng.normal(size=(count, 8, 8, 8)), (0, 1.5, 1.5, 1.5))
        found -= found.mean((1, 2, 3), keepdims=True)
        return found / found.std((1, 2, 3), keepdims=True)

    return Sets(
        case_set("synthetic", textures(synthetic)),
        case_set("training", textures(training)),
        case_set("held_out", textures(held_out)),
    )


def intensities_of(sets: Sets) -> Space:
    """The space of intensities, without hints from another space."""
    count = len(sets.training)
    nothing = Search(np.zeros((len(sets.synthetic), count)), np.zeros((len(sets.held_out), count)))
    return intensity_space(sets, [NamedSearch(name, name, nothing) for name in "ab"], Progress(quiet=True))
