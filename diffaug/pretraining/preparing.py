"""From what a user asks for to a plan and its cases."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from pydantic import ValidationError

from diffaug.datasets.manifest import MANIFEST, read_manifest
from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles, ras_geometry
from diffaug.errors import DatasetError, DiffaugError, LabelError
from diffaug.files import read_json
from diffaug.generators.generator import Generator
from diffaug.generators.seeds import case_seed
from diffaug.pretraining.plan import DatasetSource, GeneratorSource, PretrainingPlan, Stage
from diffaug.pretraining.pretrain import Material
from diffaug.pretraining.sources import Streamed, held_out_patients
from diffaug.pretraining.stages import check_method
from diffaug.progress import Progress
from diffaug.segmentation.cases import Prepared, Space, Window, choose_space, read_prepared
from diffaug.segmentation.networks import (
    NetworkPlan,
    build_network,
    check_patch,
    completed,
    patch_multiple,
)

# Of the patients of each dataset, and samples of each generator.
HELD_OUT, HELD_OUT_SAMPLES = 0.1, 8
# Of the free memory, that cases may take.
MEMORY = 0.6


@dataclass(frozen=True)
class Asked:
    """What a user asks for.

    Attributes:
        datasets: to pretrain on; of those with a split the training cases.
        generators: whose samples are streamed.
        shares: of the datasets, then of the generators; default: equal ones.
        reuse: how often a sample is drawn.
    """

    network: NetworkPlan
    stages: Sequence[Stage]
    datasets: Sequence[Dataset]
    generators: Sequence[Generator]
    shares: Sequence[float] | None = None
    reuse: int = 4
    spacing: tuple[float, float, float] | None = None
    patch: tuple[int, int, int] | None = None
    window: tuple[float, float] | None = None
    seed: int = 0


def make_plan(asked: Asked) -> PretrainingPlan:
    """The plan, from headers and cards; no scan is read.

    Raises:
        DiffaugError: sources that do not belong together, or none; a patch that does not suit the network.
        LabelError: a stage needs labels that a source lacks.
    """
    count = len(asked.datasets) + len(asked.generators)
    if count == 0:
        raise DiffaugError("nothing to pretrain on: give datasets, generators, or both")
    shares = list(asked.shares or [1 / count] * count)
    if len(shares) != count or min(shares) <= 0:
        raise DiffaugError(f"{count} sources need {count} shares above 0, got {shares}")
    shares = [share / sum(shares) for share in shares]
    channels = {len(dataset.channels) for dataset in asked.datasets}
    channels |= {len(generator.card.channels) for generator in asked.generators}
    if len(channels) > 1:
        raise DiffaugError(f"the sources have {sorted(channels)} channels: pretrain on those of one number")
    sources: list[DatasetSource | GeneratorSource] = [
        _dataset_source(dataset, share) for dataset, share in zip(asked.datasets, shares, strict=False)
    ]
    sources += [
        GeneratorSource(
            generator=generator.name,
            weights=generator.weights_hash,
            licence=generator.card.licence,
            reuse=asked.reuse,
            share=share,
        )
        for generator, share in zip(asked.generators, shares[len(asked.datasets) :], strict=True)
    ]
    network = completed(asked.network)
    space = _space(asked)
    check_patch(network, space.patch)
    for stage in asked.stages:
        check_method(stage.method, network, space.patch)
    # What cannot be built is found out before anything is written.
    build_network(network, min(channels), 2)
    return PretrainingPlan(
        network=network,
        space=space,
        channels=channels.pop(),
        labels=_labels(asked),
        sources=sources,
        stages=list(asked.stages),
        seed=asked.seed,
    )


def read_material(
    plan: PretrainingPlan,
    datasets: Sequence[Dataset],
    generators: Sequence[Generator],
    progress: Progress,
) -> Material:
    """The cases of a plan's sources.

    Raises:
        DatasetError: a scan cannot be read.
        DiffaugError: they do not fit into memory.
    """
    _check_memory(plan, [case for dataset in datasets for case in dataset.training_cases])
    read = [
        read_prepared(
            dataset.training_cases,
            plan.space,
            classes_by_name(plan.labels, dataset.labels),
            progress,
            f"reading {dataset.name}",
        )
        for dataset in datasets
    ]
    # A patient of several datasets is held out of all.
    held = held_out_patients([case for cases in read for case in cases], HELD_OUT, plan.seed)
    training: list[Sequence[Prepared] | Streamed] = [
        [case for case in cases if case.patient not in held] for cases in read
    ]
    held_out = [case for cases in read for case in cases if case.patient in held]
    streamed = [source for source in plan.sources if isinstance(source, GeneratorSource)]
    for source, generator in zip(streamed, generators, strict=True):
        classes = classes_by_name(plan.labels, generator.card.labels)
        training.append(Streamed(generator, plan.space, classes, plan.seed, source.reuse))
        apart = Streamed(generator, plan.space, classes, case_seed(plan.seed, 1), 1)
        held_out += apart.samples(range(HELD_OUT_SAMPLES))
    return Material(training, held_out)


def _dataset_source(dataset: Dataset, share: float) -> DatasetSource:
    manifest = dataset.root / MANIFEST
    made = read_manifest(manifest).settings.generator.name if manifest.is_file() else None
    return DatasetSource(
        folder=str(dataset.root),
        name=dataset.name,
        licence=dataset.licence,
        cases=len(dataset.training_cases),
        synthetic=made,
        share=share,
    )


def _labels(asked: Asked) -> dict[int, str]:
    """Class -> name, of the first source; all others must know the same names."""
    if not any(stage.method == "supervised" for stage in asked.stages):
        return {0: "background"}
    vocabularies = [
        (str(dataset.root), dataset.labels)
        for dataset in asked.datasets
        if any(case.label for case in dataset.training_cases) or not asked.generators
    ]
    vocabularies += [(generator.name, dict(generator.card.labels)) for generator in asked.generators]
    (first, own), *others = vocabularies
    names = [name for number, name in sorted(own.items()) if number != 0]
    if not names:
        raise LabelError(f"{first} has no labels, which supervised pretraining needs")
    for other, labels in others:
        numbers = [number_of(name, labels) for name in names]
        if None in numbers or len(labels) != len(names) + 1:
            different = sorted({name for n, name in labels.items() if n != 0} ^ set(names))
            raise LabelError(
                f"{first} and {other} do not both know {', '.join(different)}: name their labels alike, and "
                "pretrain on sources of the same structures"
            )
    labelled = [case for dataset in asked.datasets for case in dataset.training_cases if case.label]
    if not labelled and not asked.generators:
        raise LabelError(f"{first} has no label map, which supervised pretraining needs")
    return {0: "background"} | dict(enumerate(names, start=1))


def classes_by_name(own: Mapping[int, str], labels: Mapping[int, str]) -> dict[int, int]:
    """Id of a source -> class of the network, by name.

    Args:
        own: class of the network -> name, 0 being background.
        labels: id of the source -> name.
    """
    found = {number_of(name, labels): n for n, name in own.items() if n != 0}
    return {0: 0} | {number: n for number, n in found.items() if number is not None}


def number_of(name: str, labels: Mapping[int, str]) -> int | None:
    """The id of a structure in a vocabulary, by its name; of one without a name of its own ("label 3", as
    datasets without names have it) by its id. None where there is none."""
    by_name = {other: number for number, other in labels.items() if number != 0}
    if name in by_name:
        return by_name[name]
    nameless = re.fullmatch(r"label (\d+)", name)
    return int(nameless[1]) if nameless and int(nameless[1]) in labels else None


def _space(asked: Asked) -> Space:
    if asked.network.kind == "nnunet":
        chosen = nnunet_space(asked.network)
    else:
        spacings: list[Sequence[float]] = []
        shapes: list[Sequence[int]] = []
        for dataset in asked.datasets:
            for case in dataset.training_cases:
                spacing, shape = ras_geometry(case.images[0])
                spacings.append(spacing)
                shapes.append(shape)
        if not asked.datasets:
            for generator in asked.generators:
                axes = np.argsort(nib.orientations.axcodes2ornt(generator.grid.orientation)[:, 0])
                spacings.append([generator.grid.spacing[axis] for axis in axes])
                shapes.append([generator.grid.shape[axis] for axis in axes])
        chosen = choose_space(spacings, shapes, patch_multiple(asked.network))
    own: dict[str, Any] = {"spacing": asked.spacing, "patch": asked.patch}
    own["window"] = Window.of(*asked.window) if asked.window else None
    try:
        return Space(**(dict(chosen) | {name: value for name, value in own.items() if value is not None}))
    except ValidationError as error:
        raise DiffaugError(
            f"spacings are above 0 mm and patches have sides of 1 voxel and more, got {asked.spacing} and "
            f"{asked.patch}"
        ) from error


def nnunet_space(network: NetworkPlan) -> Space:
    """What nnU-Net's plans say. Its arrays have the axes of the file in reverse order, then
    `transpose_forward`; of files that are stored in RAS order these point S, A, R."""
    file, name = Path(network.settings["plans"]), network.settings.get("configuration", "3d_fullres")
    plans = read_json(file)
    try:
        configuration = plans["configurations"][name]
        spacing, patch = configuration["spacing"], configuration["patch_size"]
        order = plans.get("transpose_forward", [0, 1, 2])
        schemes = configuration.get("normalization_schemes", [])
        if set(schemes) - {"ZScoreNormalization"} and schemes != ["CTNormalization"]:
            raise DiffaugError(
                f"{file} asks for {', '.join(schemes)}: known are z-scores, and CT of a single channel"
            )
        i, j, k = ("SAR"[axis] for axis in order)
        window = None
        if schemes == ["CTNormalization"]:
            known = plans["foreground_intensity_properties_per_channel"]["0"]
            window = Window(
                low=known["percentile_00_5"],
                high=known["percentile_99_5"],
                mean=known["mean"],
                std=known["std"],
            )
        return Space(spacing=spacing, patch=patch, window=window, orientation=(i, j, k))
    except DiffaugError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DiffaugError(f"{file} is no plans file of nnU-Net with a 3D configuration {name}") from error


def _check_memory(plan: PretrainingPlan, cases: Sequence[CaseFiles]) -> None:
    """Refuse cases that would not fit, before any is read."""
    needed = 0.0
    for case in cases:
        header: Any = nib.load(case.images[0])
        extent = np.prod(header.shape[:3]) * abs(np.linalg.det(header.affine[:3, :3]))
        voxels = max(float(extent / np.prod(plan.space.spacing)), float(np.prod(plan.space.patch)))
        needed += voxels * (4 * plan.channels + 2)
    free = psutil.virtual_memory().available
    if needed > MEMORY * free:
        raise DatasetError(
            [
                f"{len(cases)} cases take {needed / 2**30:.0f} GiB at a spacing of {plan.space.spacing} mm, "
                f"and {free / 2**30:.0f} GiB are free: give a coarser spacing, or fewer cases by a split"
            ]
        )
