"""Cases that are made or read before training: synthetic ones, real ones, and variants of labelled ones."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from diffaug.benchmark.config import Arm, Pretraining
from diffaug.benchmark.operations import operation_of
from diffaug.benchmark.study import Study
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.files import atomic_path
from diffaug.generators.grid import place
from diffaug.generators.seeds import case_seed
from diffaug.operations import Case, apply_to_cases
from diffaug.operations.sources import resolve
from diffaug.progress import Progress
from diffaug.segmentation.cases import Prepared, prepare, read_prepared
from diffaug.segmentation.patches import Swap

# Samples that are made at once.
BATCH = 8


def pretraining_cases(study: Study, stage: Pretraining, seed: int, progress: Progress) -> list[Prepared]:
    """The cases of one stage of pretraining."""
    if stage.data == "synthetic":
        return synthetic_cases(study, stage.cases, seed, progress)
    if stage.data == "real":
        return read_prepared(study.training, study.space, study.classes, progress, "reading")
    dataset, cases = study.folder_cases[stage.data]
    if stage.method == "supervised":
        cases = [case for case in cases if case.label is not None]
    classes = study.classes_of(dataset.labels)
    return read_prepared(cases, study.space, classes, progress, f"reading {dataset.name}")


def synthetic_cases(study: Study, count: int, seed: int, progress: Progress) -> list[Prepared]:
    """Cases that the generator samples; kept on disk, as float16."""
    name = f"{study.card.name} {study.card.weights_hash} {study.space.model_dump_json()} {count} {seed}"
    file = study.work / "cache" / f"synthetic-{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    generator = resolve(study.benchmark.generator).to(study.device)
    classes = study.classes_of(generator.card.labels)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            images, labels = [], []
            with progress.task("sampling", total=count) as task:
                for start in range(0, count, BATCH):
                    rows = range(start, min(start + BATCH, count))
                    sample = generator.sample(len(rows), seed=[case_seed(seed, row) for row in rows])
                    for image, label in zip(sample.image, sample.label, strict=True):
                        made = prepare("", "", image, label, sample.affine, study.space, classes)
                        assert made.label is not None
                        images.append(made.image.half().numpy())
                        labels.append(made.label.numpy().astype(np.uint8))
                    task.advance(len(rows))
            with atomic_path(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, images=np.stack(images), labels=np.stack(labels))
    kept = np.load(file)
    placement = place(generator.grid, generator.grid.shape, generator.grid.affine)
    return [
        Prepared(f"sample {n}", f"sample {n}", image, label, placement)
        for n, (image, label) in enumerate(
            zip(
                torch.from_numpy(kept["images"]).float(),
                torch.from_numpy(kept["labels"]).short(),
                strict=True,
            )
        )
    ]


def variants(
    study: Study, arm: Arm, cases: Sequence[CaseFiles], seed: int, progress: Progress
) -> Swap | None:
    """Variants of labelled cases, by the arm's transforms, as what comes in the place of a case."""
    if not arm.transforms:
        return None
    generator = resolve(study.benchmark.generator).to(study.device)
    pools: list[dict[str, list[Prepared]]] = []
    total = len(cases) * sum(use.variants for use in arm.transforms)
    with progress.task("varying", total=total) as task:
        for number, use in enumerate(arm.transforms):
            operation = operation_of(use, study.benchmark.generator, study.label_mapping)
            pool: dict[str, list[Prepared]] = {}
            for case in cases:
                name = int.from_bytes(case.name.encode(), "big") % 2**63
                own_seed = case_seed(case_seed(seed, number), name)
                loaded = load_case(case)
                assert loaded.label is not None
                own = Case(torch.from_numpy(loaded.image), torch.from_numpy(loaded.label))
                pool[case.name] = []
                for k in range(use.variants):
                    drawn = operation.parameters(case_seed(own_seed, k) % 2**31)
                    (made,) = apply_to_cases(generator, [drawn], [own], loaded.affine)
                    pool[case.name].append(
                        prepare(
                            case.name,
                            case.patient,
                            made.image,
                            made.label,
                            loaded.affine,
                            study.space,
                            study.classes,
                        )
                    )
                    task.advance()
            pools.append(pool)

    def swap(case: Prepared, random: torch.Generator) -> Prepared:
        draw, entry = torch.rand(2, generator=random).tolist()
        for use, pool in zip(arm.transforms, pools, strict=True):
            if draw < use.probability:
                return pool[case.name][int(entry * use.variants)]
            draw -= use.probability
        return case

    return swap


def digest(content: Any) -> str:
    """A short name for plain JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
