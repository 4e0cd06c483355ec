"""What all cells of a benchmark share: dataset, generator, network space, and who is scored."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from diffaug.benchmark.config import Arm, Benchmark
from diffaug.benchmark.nnunet_backend import plan, read_plans
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DatasetError, DiffaugError
from diffaug.generators.card import Card
from diffaug.operations import check_held_out
from diffaug.operations.sources import card_of, reference
from diffaug.pretraining.preparing import nnunet_space
from diffaug.pretraining.stages import check_method
from diffaug.segmentation.cases import Space, choose_space
from diffaug.segmentation.networks import NetworkPlan, check_patch, patch_multiple


@dataclass(frozen=True)
class Study:
    """A benchmark on a dataset.

    Attributes:
        benchmark: what is compared.
        dataset: with split and label maps.
        work: folder of caches and results.
        network: the benchmark's, or that of nnU-Net's plans.
        given: the benchmark's space, or that of nnU-Net's plans, if any.
    """

    benchmark: Benchmark
    dataset: Dataset
    work: Path
    network: NetworkPlan
    given: Space | None

    @cached_property
    def training(self) -> list[CaseFiles]:
        """Labelled cases that train."""
        return self._subset("train")

    @cached_property
    def scored(self) -> list[CaseFiles]:
        """Labelled cases that are scored."""
        return self._subset(self.benchmark.subset)

    def _subset(self, name: str) -> list[CaseFiles]:
        assert self.dataset.split is not None
        wanted = set(self.dataset.split[name])
        return [case for case in self.dataset.cases if case.name in wanted and case.label is not None]

    @cached_property
    def card(self) -> Card:
        """The generator's."""
        return card_of(self.benchmark.generator)

    @cached_property
    def labels(self) -> list[int]:
        """Ids of the dataset's structures, in order; class n of the network is the n-th, from 1."""
        return [number for number in sorted(self.dataset.labels) if number != 0]

    @property
    def classes(self) -> dict[int, int]:
        """Id of the dataset -> class of the network."""
        return {0: 0} | {number: n for n, number in enumerate(self.labels, start=1)}

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.dataset.channels)

    @cached_property
    def space(self) -> Space:
        """In which networks work: the benchmark's, or chosen from the training cases."""
        if self.given is not None:
            check_patch(self.network, self.given.patch)
            return self.given
        spacings, shapes = [], []
        for case in self.training:
            header: Any = nib.load(case.images[0])
            axes = np.argsort(nib.orientations.io_orientation(header.affine)[:, 0])
            spacings.append(nib.affines.voxel_sizes(header.affine)[axes])
            shapes.append([header.shape[axis] for axis in axes])
        return choose_space(spacings, shapes, patch_multiple(self.network))

    def settings(self, arm: Arm, labelled: int | None, seed: int) -> dict[str, Any]:
        """Everything that decides a cell's result, as plain JSON."""
        benchmark = self.benchmark
        return {
            "arm": arm.model_dump(mode="json", exclude={"title", "seeds"}),
            "labelled": labelled,
            "seed": seed,
            "network": self._network,
            "space": self.space.model_dump(mode="json"),
            "schedule": benchmark.fine_tuning(arm).model_dump(mode="json"),
            "generator": self.card.weights_hash,
            "subset": benchmark.subset,
            "tolerance": benchmark.tolerance,
            "cases": self._cases_hash,
        }

    @cached_property
    def _network(self) -> dict[str, Any]:
        """What is trained, wherever its plans lie."""
        network = self.network.model_dump(mode="json")
        if self.benchmark.backend == "nnunet":
            plans = read_plans(Path(network["settings"]["plans"]))
            network["settings"] = {"plans": hashlib.sha256(plans.encode()).hexdigest()[:16]}
        return network

    @cached_property
    def _cases_hash(self) -> str:
        names = {part: [c.name for c in cases] for part, cases in self._parts().items()}
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

    def _parts(self) -> dict[str, Sequence[CaseFiles]]:
        return {"training": self.training, "scored": self.scored}


def open_study(benchmark: Benchmark, data: Path, work: Path, *, patients: Path | None = None) -> Study:
    """Read the dataset and check what can be checked before anything is trained.

    Raises:
        DatasetError: it has no split by patient, or too few labelled cases in it.
        LeakError: a scored scan trained the generator.
        DiffaugError: the generator cannot do what an arm asks of it.
    """
    dataset = read_dataset(data, patients=patients)
    if dataset.split is None:
        raise DatasetError(
            [f"{dataset.root} has no splits.json: name the cases of train, validation and test in one"]
        )
    study = Study(benchmark, dataset, work, benchmark.network, benchmark.space)
    for part, cases in study._parts().items():
        if not cases:
            raise DatasetError([f"{dataset.root} has no labelled {part} case"])
    if max(benchmark.labelled) > len(study.training):
        raise DatasetError(
            [
                f"{dataset.root} has {len(study.training)} labelled training cases, the benchmark asks for "
                f"{max(benchmark.labelled)}"
            ]
        )
    if benchmark.backend == "nnunet":
        file = plan(dataset, study.training, study.scored, work, benchmark.name)
        network = NetworkPlan(kind="nnunet", settings={"plans": str(file)})
        study = replace(study, network=network, given=nnunet_space(network))
    uses_generator = any(
        arm.transforms or any(stage.data == "synthetic" for stage in arm.pretraining)
        for arm in benchmark.arms.values()
    )
    if uses_generator:
        if unknown := sorted(set(study.labels) - set(study.card.labels)):
            raise DiffaugError(
                f"{study.card.name} does not know the labels {unknown} of {dataset.root}: fit a generator "
                "to them"
            )
        files = [[str(file) for file in case.images] for case in study.scored]
        check_held_out(files, reference(benchmark.generator))
    for arm in benchmark.arms.values():
        for stage in arm.pretraining:
            check_method(stage.method, study.network, study.space.patch)
    return study


def draw_labelled(cases: Sequence[CaseFiles], count: int, seed: int) -> list[CaseFiles]:
    """`count` cases: patients in random order, each with all of its cases, as far as these still fit.

    Raises:
        DatasetError: no patients have just so many cases together.
    """
    patients = sorted({case.patient for case in cases})
    drawn: list[CaseFiles] = []
    for index in np.random.default_rng(seed).permutation(len(patients)):
        own = [case for case in cases if case.patient == patients[index]]
        if len(drawn) + len(own) <= count:
            drawn += own
    if len(drawn) < count:
        raise DatasetError([f"no patients have {count} cases together: change `labelled`"])
    return drawn
