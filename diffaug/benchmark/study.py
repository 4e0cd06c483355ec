"""What all cells of a benchmark share: dataset, generator, network space, and who is scored."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffaug.benchmark.config import Arm, Benchmark
from diffaug.benchmark.nnunet_backend import plan, read_plans
from diffaug.benchmark.operations import operation_of
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.training_scans import recognised, scan_hashes
from diffaug.datasets.volumes import CaseFiles, ras_geometry
from diffaug.errors import DatasetError, DiffaugError, LeakError
from diffaug.files import sha256_file
from diffaug.generators.card import Card
from diffaug.operations import check_held_out
from diffaug.operations.sources import card_of, reference
from diffaug.pretraining.preparing import classes_by_name, nnunet_space, number_of
from diffaug.pretraining.stages import check_method
from diffaug.progress import Progress
from diffaug.segmentation.cases import Space, choose_space
from diffaug.segmentation.networks import NetworkPlan, build_network, check_patch, patch_multiple


@dataclass(frozen=True)
class Study:
    """A benchmark on a dataset.

    Attributes:
        benchmark: what is compared.
        dataset: with split and label maps.
        work: folder of caches and results.
        network: the benchmark's, or that of nnU-Net's plans.
        given: the benchmark's space, or that of nnU-Net's plans, if any.
        device: on which cells train.
    """

    benchmark: Benchmark
    dataset: Dataset
    work: Path
    network: NetworkPlan
    given: Space | None
    device: str = "cpu"

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
        spacings, shapes = zip(*(ras_geometry(case.images[0]) for case in self.training), strict=True)
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
            "generator": self.card.weights_hash if benchmark.uses_generator(arm) else None,
            "data": {
                stage.data: self._files_hash(self.folder_cases[stage.data][1])
                for stage in arm.pretraining
                if stage.data in self.folder_cases
            },
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
        return self._files_hash([case for cases in self._parts().values() for case in cases])

    def _files_hash(self, cases: Sequence[CaseFiles]) -> str:
        """Of the names and the contents of cases."""
        found = hashlib.sha256(json.dumps(sorted(self.dataset.labels.items())).encode())
        for case in cases:
            for file in (*case.images, *([case.label] if case.label else [])):
                found.update(f"{case.name} {case.patient} {sha256_file(file)}".encode())
        return found.hexdigest()[:16]

    @cached_property
    def folder_cases(self) -> dict[str, tuple[Dataset, list[CaseFiles]]]:
        """Datasets that arms name as data to pretrain on, and their cases that train."""
        found: dict[str, tuple[Dataset, list[CaseFiles]]] = {}
        for arm in self.benchmark.arms.values():
            for stage in arm.pretraining:
                if stage.data not in ("synthetic", "real", *found):
                    dataset = read_dataset(Path(stage.data))
                    found[stage.data] = dataset, list(dataset.training_cases)
        return found

    def classes_of(self, labels: Mapping[int, str]) -> dict[int, int]:
        """Id of a source -> class of the network, by name."""
        names = {n: self.dataset.labels[number] for n, number in enumerate(self.labels, start=1)}
        return classes_by_name(names, labels)

    @property
    def label_mapping(self) -> dict[int, int] | None:
        """Id of the dataset -> id of the generator, by name; None where they are the same."""
        found = {n: number_of(self.dataset.labels[n], self.card.labels) for n in self.labels}
        mapping = {number: own for number, own in found.items() if own is not None}
        return None if all(number == own for number, own in mapping.items()) else mapping

    def _parts(self) -> dict[str, Sequence[CaseFiles]]:
        return {"training": self.training, "scored": self.scored}


def open_study(
    benchmark: Benchmark,
    data: Path,
    work: Path,
    *,
    patients: Path | None = None,
    split: Path | None = None,
    device: str = "cpu",
) -> Study:
    """Read the dataset and check what can be checked before anything is trained.

    Raises:
        DatasetError: it has no split by patient, or too few labelled cases in it.
        LeakError: a scored scan trained the generator.
        DiffaugError: the generator cannot do what an arm asks of it.
    """
    dataset = read_dataset(data, patients=patients, split=split)
    if dataset.split is None:
        raise DatasetError(
            [f"{dataset.root} has no splits.json: name the cases of train, validation and test in one"]
        )
    study = Study(benchmark, dataset, work, benchmark.network, benchmark.space, device)
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
    scored = [[str(file) for file in case.images] for case in study.scored]
    if any(benchmark.uses_generator(arm) for arm in benchmark.arms.values()):
        _check_generator(study, scored)
    for name, (other, cases) in study.folder_cases.items():
        _check_folder(study, name, other, cases)
    for name, arm in benchmark.arms.items():
        for use in arm.transforms:
            try:
                operation_of(use, benchmark.generator, study.label_mapping)
            except (TypeError, ValueError) as error:
                raise DiffaugError(f"arm {name}, {use.operation}: {error}") from error
        for stage in arm.pretraining:
            check_method(stage.method, study.network, study.space.patch)
    build_network(study.network, study.channels, len(study.labels) + 1)
    return study


def _check_generator(study: Study, scored: Sequence[Sequence[str]]) -> None:
    """Refuse a generator of other structures or channels, or one that saw a scored scan."""
    card, dataset = study.card, study.dataset
    unknown = [dataset.labels[n] for n in study.labels if number_of(dataset.labels[n], card.labels) is None]
    if unknown:
        raise DiffaugError(
            f"{card.name} does not know {', '.join(unknown)} of {dataset.root} (it knows "
            f"{', '.join(card.labels.values())}): name the labels alike, or fit a generator to them"
        )
    if len(card.channels) != study.channels:
        raise DiffaugError(f"{card.name} has {len(card.channels)} channels, {dataset.root} {study.channels}")
    try:
        check_held_out(scored, reference(study.benchmark.generator))
    except LeakError as error:
        raise LeakError(
            f"{error.args[0].split(': they')[0]}: they trained {card.name}, and scores on them say too much. "
            "Score others: name the cases that trained it under `train` in splits.json"
        ) from error


def _check_folder(study: Study, name: str, dataset: Dataset, cases: Sequence[CaseFiles]) -> None:
    """Refuse data to pretrain on that has other structures or channels, or shows a scored scan."""
    if len(dataset.channels) != study.channels:
        raise DiffaugError(
            f"{name} has {len(dataset.channels)} channels, {study.dataset.root} {study.channels}"
        )
    supervised = [
        arm
        for arm, own in study.benchmark.arms.items()
        if any(stage.data == name and stage.method == "supervised" for stage in own.pretraining)
    ]
    missing = [
        study.dataset.labels[n]
        for n in study.labels
        if number_of(study.dataset.labels[n], dataset.labels) is None
    ]
    if supervised and (missing or not any(case.label for case in cases)):
        raise DiffaugError(
            f"{name} has no label maps of {', '.join(missing) or 'its cases'}, which {supervised[0]} needs"
        )
    salt = "00"
    scored = {case.name: case.images for case in study.scored}
    known = {value for pair in scan_hashes(study.scored, salt).values() for value in pair}
    seen = recognised({case.name: case.images for case in cases}, salt, known, Progress(quiet=True))
    if seen:
        raise LeakError(
            f"{len(seen)} cases of {name} are among the {len(scored)} scored scans, such as {seen[0]}: take "
            "them out, or give it a splits.json in which they do not train"
        )


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
