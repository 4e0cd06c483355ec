"""Writing what a build makes: the files of each case, and what describes the whole."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffaug.datasets.describing import MONTAGE, README, caveat, readme, sentence
from diffaug.datasets.layouts import LAYOUTS, nifti_bytes
from diffaug.datasets.manifest import (
    MANIFEST,
    CaseRecord,
    CaseSource,
    Inspected,
    InspectionRecord,
    Manifest,
    Rejected,
    Settings,
    write_manifest,
)
from diffaug.datasets.sources import renumber
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.figures import montage
from diffaug.files import atomic_path, atomic_write_json, atomic_write_text, sha256_file

DESCRIPTION = "dataset.json"
MONTAGE_CASES = 6


class Made(NamedTuple):
    """A synthetic case: image (C, I, J, K) float32, label (I, J, K) of the ids that `Settings.labels` names
    or None, affine (4, 4)."""

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    source: CaseSource | None


class Writer:
    """Writes a dataset's files, each whole or not at all.

    Attributes:
        names: of the cases, in order.
        label_ids: id in `Settings.labels` -> id in the files.
    """

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output = output
        self.settings = settings
        self.layout = LAYOUTS[settings.layout]
        self.names = [
            f"{settings.generator.name}_{settings.verb}_{index:05d}" for index in range(settings.cases)
        ]
        self.label_ids = self.layout.written_ids(list(settings.labels))
        self._label_dtype = np.dtype(np.uint8 if max(self.label_ids.values(), default=0) <= 255 else np.int16)

    def voxel_bytes(self, image_dtype: str) -> int:
        """Bytes of a voxel of a case, all its files together, before compression."""
        label = self._label_dtype.itemsize if self.label_ids else 0
        return len(self.settings.generator.channels) * np.dtype(image_dtype).itemsize + label

    def clear_leftovers(self) -> None:
        """Remove what a killed process was about to write."""
        for folder in (self.output, self.output / "imagesTr", self.output / "labelsTr"):
            for path in folder.glob(".tmp-*"):
                path.unlink()

    def write_case(
        self, index: int, made: Made, header: Manifest, seed: int, rejected: list[Rejected]
    ) -> CaseRecord:
        """Write a case's files and give its record, with its seed and the candidates refused before it."""
        name, settings = self.names[index], self.settings
        image = made.image
        if header.image_dtype == "int16":
            limits = np.iinfo(np.int16)
            image = np.rint(image).clip(limits.min, limits.max)
        arrays = self.layout.image_arrays(image.astype(header.image_dtype))
        volumes = dict(zip(self.layout.image_paths(name, len(image)), arrays, strict=True))
        if made.label is not None:
            label = renumber(made.label, self.label_ids).astype(self._label_dtype)
            volumes[self.layout.label_path(name)] = label
        files = {}
        for path, array in volumes.items():
            content = nifti_bytes(array, made.affine, f"synthetic: {settings.generator.name} {settings.verb}")
            with atomic_path(self.output / path) as temporary:
                temporary.write_bytes(content)
            files[path] = hashlib.sha256(content).hexdigest()
        return CaseRecord(
            name=name,
            generator=settings.generator.name,
            weights=settings.generator.weights,
            verb=settings.verb,
            seed=seed,
            parameters=settings.parameters,
            source=made.source,
            licence=header.licence,
            files=files,
            rejected=rejected,
        )

    def finish(self, header: Manifest, records: list[CaseRecord]) -> Manifest:
        """Write everything but the cases; the manifest last."""
        settings = self.settings
        names = {self.label_ids[number]: name for number, name in settings.labels.items()}
        description = self.layout.describe(
            name=settings.name,
            description=". ".join(filter(None, (sentence(settings), caveat(settings)))),
            licence=header.licence,
            reference="; ".join(header.citation) or settings.generator.name,
            channels=settings.generator.channels,
            labels=names,
            cases=self.names,
            provenance={
                "synthetic": True,
                "generator": settings.generator.name,
                "weights": settings.generator.weights,
                "verb": settings.verb,
                "seed": settings.seed,
                "version": header.versions["diffaug"],
                "manifest": MANIFEST,
            },
        )
        atomic_write_json(self.output / DESCRIPTION, description)
        if settings.inspection is not None and header.inspected is None:
            header = header.model_copy(update={"inspected": _count(records, settings.inspection)})
        atomic_write_text(self.output / README, readme(header))
        self._draw(records[:MONTAGE_CASES], names, header)
        files = {path: sha256_file(self.output / path) for path in (DESCRIPTION, README, MONTAGE)}
        # Whoever has the generator could make the refused candidates again: which they were stays here.
        cases = [record.model_copy(update={"rejected": []}) for record in records]
        manifest = header.model_copy(update={"files": files, "cases": cases})
        write_manifest(self.output / MANIFEST, manifest)
        return manifest

    def _draw(self, records: Sequence[CaseRecord], names: dict[int, str], header: Manifest) -> None:
        """The montage of the first cases, from their files."""
        cases = [load_case(self._files(record.name)) for record in records]
        titles = [
            f"case {index}" + (f"\nof {record.source.name}" if record.source else "")
            for index, record in enumerate(records)
        ]
        montage(
            [case.image for case in cases],
            [case.label for case in cases],
            titles,
            self.output / MONTAGE,
            affines=[case.affine for case in cases],
            names=names,
            heading="\n".join(filter(None, (sentence(self.settings), caveat(self.settings)))),
            footer=f"Licence: {header.licence}",
        )

    def _files(self, name: str) -> CaseFiles:
        images = self.layout.image_paths(name, len(self.settings.generator.channels))
        label = self.output / self.layout.label_path(name) if self.label_ids else None
        return CaseFiles(name, tuple(self.output / path for path in images), label, name)


def _count(records: Sequence[CaseRecord], inspection: InspectionRecord) -> Inspected:
    """How many candidates were made, and how many of them each check refused."""
    refused = [candidate for record in records for candidate in record.rejected]
    return Inspected(
        candidates=len(records) + len(refused),
        rejected={
            name: sum(name in candidate.reasons for candidate in refused) for name in inspection.checks
        },
    )
