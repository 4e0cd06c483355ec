"""Building a synthetic dataset: interrupted at any moment, it ends with the same bytes.

While a build runs, `.diffaug-build.jsonl` in its folder holds the settings and a line per finished case; the
manifest, written last, takes its place. What a restart finds is trusted by its hash, not by its name.
"""

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from diffaug.datasets.arguments import check_arguments, fill_parameters
from diffaug.datasets.checking import check_dataset
from diffaug.datasets.describing import caveat
from diffaug.datasets.inspecting import Accepted, Inspector
from diffaug.datasets.layouts import LAYOUTS, LayoutName
from diffaug.datasets.manifest import (
    MANIFEST,
    CaseRecord,
    CaseSource,
    GeneratorRecord,
    Manifest,
    Settings,
    Verb,
    combined_licence,
    device_name,
    differences,
    plain,
    versions,
)
from diffaug.datasets.resuming import STATE, alone, read_state
from diffaug.datasets.sources import RealCase, Source, Sources, find_sources, read_source
from diffaug.datasets.writing import Made, Writer
from diffaug.errors import DatasetError, DiffaugError
from diffaug.files import atomic_write_text, sha256_file
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityMap, typical_map
from diffaug.progress import Progress

# A range of more units than this loses nothing that matters when rounded to whole numbers.
INTEGER_RANGE = 255
# Room for what describes the dataset, beside its cases.
EXTRA_BYTES = 4_000_000
# Differing settings that a message shows.
MOST_LINES = 10


@dataclass(frozen=True)
class Build:
    """What a call of `build_dataset` did.

    Attributes:
        output: the dataset's folder.
        cases: number of cases in it.
        made: cases made by this call.
        kept: cases that an earlier call made, found intact.
        repaired: files of an earlier call that were missing or altered and were made again.
        cut: case whose label reaches beyond the generator's grid -> voxels of it cut off with the image.
        licence: of the dataset.
        rejected: candidates that were refused, by check; empty where none was looked at.
    """

    output: Path
    cases: int
    made: int
    kept: int
    repaired: tuple[str, ...]
    cut: dict[str, int]
    licence: str
    rejected: dict[str, int] = field(default_factory=dict)


class _Survey(NamedTuple):
    """What is known before anything is made: the voxel type of the images, and the voxels of each source."""

    image_dtype: Literal["int16", "float32"]
    voxels: list[int]


def build_dataset(
    generator: Generator,
    output: Path | str,
    *,
    cases: int,
    verb: Verb = "sample",
    source: Path | str | None = None,
    layout: LayoutName = "nnunet",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    strength: float | None = None,
    label_mapping: Mapping[int, int] | None = None,
    allow_label_drift: bool = False,
    parameters: Mapping[str, float | str] | None = None,
    batch_size: int = 8,
    inspector: Inspector | None = None,
    progress: Progress | None = None,
) -> Build:
    """Write a synthetic dataset, or finish one that was interrupted.

    Case k has the seed `case_seed(seed, k)`, or where candidates were refused one derived from it; its
    bytes depend on nothing but that, the other settings, the
    versions in the manifest and the device. Images are int16 where their range exceeds 255 units, else
    float32; labels are uint8 (int16 where ids need it), numbered from 0 without a gap for nnU-Net. What a
    generator without labels samples has no label maps.

    Args:
        generator: on the device it should run on.
        output: the dataset's folder: new, empty, or what an earlier call with the same settings left. For
            nnU-Net its name has the form `Dataset901_Name`.
        cases: number of cases, >= 1.
        verb: `sample` makes image and label (of a generator without labels only an image) from nothing;
            `paint` an image for each label map; `vary` another image for each labelled case. Painted and
            varied cases lie where their source does, cropped to the box around its label where the
            generator's grid does not cover the volume. Varied images are plain decodes, without the scan's
            own noise.
        source: for `paint` a folder of label maps, for `vary` a dataset that `read_dataset` understands (of
            one with a split, the training cases); used in turn, with another seed each time.
        layout: "nnunet" (raw) or "decathlon".
        steps, guidance, sampler, strength: as for the generator's verbs; default: the card's.
        label_mapping: id in the source -> id of the generator; ids not named stand for themselves.
        allow_label_drift: `vary` with a generator that knows no labels, which is refused otherwise: the
            source's label maps are copied, with their ids and names, though the anatomy may have moved.
        parameters: what else the generator is told, by name (the card's `parameters`).
        batch_size: cases made at once, >= 1; does not change their bytes.
        inspector: looks at every candidate, such as `diffaug.audit.inspection.Inspection`; a refused one is
            made again with another seed, and the manifest says how many were and why. Default: every
            candidate is taken.
        progress: where to show it; default: nowhere.

    Raises:
        DiffaugError: arguments, sources or the output folder do not allow the build, or the disk is too
            small; nothing has been written then.
    """
    output = Path(output).expanduser()
    filled = fill_parameters(
        generator,
        verb,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        strength=strength,
        allow_label_drift=allow_label_drift,
        told=parameters,
    )
    check_arguments(
        generator,
        verb,
        cases=cases,
        source=source,
        layout=layout,
        seed=seed,
        label_mapping=label_mapping,
        allow_label_drift=allow_label_drift,
        batch_size=batch_size,
        inspected=inspector is not None,
    )
    LAYOUTS[layout].check_folder(output.absolute())
    sources = find_sources(verb, source, cases, generator.card.channels, with_labels=allow_label_drift)
    settings = Settings(
        name=output.absolute().name,
        layout=layout,
        cases=cases,
        verb=verb,
        seed=seed,
        generator=GeneratorRecord(
            name=generator.name,
            weights=generator.weights_hash,
            channels=generator.card.channels,
            labels=generator.card.labels,
            grid=generator.card.grid,
            intensity=generator.card.intensity,
        ),
        parameters=filled,
        label_mapping=dict(sorted((label_mapping or {}).items())),
        source=sources.record,
        inspection=inspector.record if inspector else None,
    )
    progress = progress or Progress(quiet=True)
    mapping = label_mapping or {}
    return _Builder(generator, output, settings, sources, mapping, batch_size, inspector, progress).run()


# -------- the build


class _Builder:
    """One call of `build_dataset`, its arguments checked."""

    def __init__(
        self,
        generator: Generator,
        output: Path,
        settings: Settings,
        sources: Sources,
        label_mapping: Mapping[int, int],
        batch_size: int,
        inspector: Inspector | None,
        progress: Progress,
    ) -> None:
        self.inspector = inspector
        self.generator = generator
        self.output = output
        self.settings = settings
        # As it was given: the record does not say whether other ids are an error.
        self.label_mapping = label_mapping
        self.dataset = sources.dataset
        self.sources = sources.cases
        self.batch_size = batch_size
        self.progress = progress
        self.writer = Writer(output, settings)
        self.names = self.writer.names

    def run(self) -> Build:
        """Make what is missing; see `build_dataset`."""
        earlier, complete = read_state(self.output)
        if earlier is not None:
            self._refuse(differences(plain(earlier.settings), plain(self.settings)), "settings")
        known = {record.name: record for record in earlier.cases} if earlier else {}
        damaged = {
            name: [path for path, digest in record.files.items() if not self._intact(path, digest)]
            for name, record in known.items()
        }
        kept = {name: record for name, record in known.items() if not damaged[name]}
        pending = [index for index, name in enumerate(self.names) if name not in kept]
        repaired = [path for paths in damaged.values() for path in paths]
        if earlier is not None and complete:
            repaired += [path for path, digest in earlier.files.items() if not self._intact(path, digest)]
        if earlier is not None and complete and not pending and not repaired:
            (self.output / STATE).unlink(missing_ok=True)
            return self._summary(earlier, made=0, repaired=[])

        if earlier is not None and pending:
            there = {**earlier.versions, "device": earlier.device}
            self._refuse(differences(there, {**versions(), "device": self._device()}), "versions")
        header = self._header(pending) if pending or earlier is None else earlier
        inspected = earlier.inspected if earlier is not None and complete else None
        header = header.model_copy(update={"cases": [], "files": {}, "inspected": inspected})
        self.output.mkdir(parents=True, exist_ok=True)
        with alone(self.output):
            self.writer.clear_leftovers()
            lines = [header, *kept.values()]
            atomic_write_text(self.output / STATE, "".join(f"{line.model_dump_json()}\n" for line in lines))
            (self.output / MANIFEST).unlink(missing_ok=True)
            records = kept | self._make(pending, header)
            manifest = self.writer.finish(header, [records[name] for name in self.names])
            (self.output / STATE).unlink()
        return self._summary(manifest, made=len(pending), repaired=repaired)

    def _refuse(self, lines: list[str], what: str) -> None:
        if lines:
            advice = (
                "give another folder, or the same settings"
                if what == "settings"
                else "the rest would not match; restore them, or build anew in another folder"
            )
            shown = "\n".join(f"  {line}" for line in lines[:MOST_LINES])
            more = f"\n  and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
            raise DiffaugError(f"{self.output} was built with other {what}:\n{shown}{more}\n{advice}")

    def _intact(self, path: str, digest: str) -> bool:
        file = self.output / path
        return file.is_file() and sha256_file(file) == digest

    def _summary(self, manifest: Manifest, made: int, repaired: list[str]) -> Build:
        cut = {case.name: case.source.cut for case in manifest.cases if case.source and case.source.cut}
        cases = len(manifest.cases)
        rejected = manifest.inspected.rejected if manifest.inspected else {}
        return Build(self.output, cases, made, cases - made, tuple(repaired), cut, manifest.licence, rejected)

    # -- before anything is written

    def _device(self) -> str:
        return device_name(self.generator.device)

    def _header(self, pending: Sequence[int]) -> Manifest:
        """The manifest without its cases, after a look at all sources and at the disk."""
        image_dtype, voxels = self._survey()
        self._check_disk(pending, image_dtype, voxels)
        card, origin = self.generator.card, self.settings.source
        references = [origin.reference] if origin and origin.reference else []
        return Manifest(
            settings=self.settings,
            licence=combined_licence(card.licence, origin),
            commercial_use=card.commercial_use,
            redistribution=card.redistribution,
            citation=list(dict.fromkeys([*card.citation, *references])),
            caveat=caveat(self.settings),
            label_ids={written: number for number, written in self.writer.label_ids.items()},
            image_dtype=image_dtype,
            versions=versions(),
            device=self._device(),
            audit=card.audit.answer if card.audit else None,
            audit_with_rejection=card.audit is not None and card.audit.rejection,
        )

    def _survey(self) -> _Survey:
        """Open every source that is used, and settle the voxel type of the images."""
        convention = self.generator.card.intensity
        integers = _fits_integers(typical_map(convention)) or self.dataset is not None
        if not self.sources:
            return _Survey("int16" if integers else "float32", [prod(self.generator.grid.shape)])
        problems: list[str] = []
        voxels: list[int] = []
        rounds = 1 if self.dataset is None else 2
        with self.progress.task("checking sources", total=rounds * len(self.sources)) as task:
            if self.dataset is not None:
                check_dataset(self.dataset, lambda _: task.advance())
            for source in self.sources:
                try:
                    real = read_source(source, self.generator, self.label_mapping)
                except DatasetError as error:
                    problems += error.problems
                else:
                    voxels.append(real.label.size)
                    if real.intensity is not None:
                        integers = integers and _fits_integers(real.intensity)
                task.advance()
        if problems:
            raise DatasetError(problems)
        return _Survey("int16" if integers else "float32", voxels)

    def _check_disk(self, pending: Sequence[int], image_dtype: str, voxels: Sequence[int]) -> None:
        """Refuse a disk that has no room for the cases as they are before compression."""
        a_voxel = self.writer.voxel_bytes(image_dtype)
        needed = sum(voxels[index % len(voxels)] * a_voxel for index in pending) + EXTRA_BYTES
        folder = next(
            path for path in (self.output.absolute(), *self.output.absolute().parents) if path.exists()
        )
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DiffaugError(
                f"{folder} has {_size(free)} free; {len(pending)} cases may take {_size(needed)} ({a_voxel} "
                f"bytes a voxel, {max(voxels)} voxels a case at most, before compression): free some space, "
                "or give an output elsewhere"
            )

    # -- making

    def _make(self, pending: Sequence[int], header: Manifest) -> dict[str, CaseRecord]:
        """Make cases and write them, each with its line in the state file."""
        records = {}
        done = self.settings.cases - len(pending)
        with (
            (self.output / STATE).open("a", encoding="utf-8") as state,
            self.progress.task("building", total=self.settings.cases, completed=done) as task,
        ):
            for start in range(0, len(pending), self.batch_size):
                batch = pending[start : start + self.batch_size]
                accepted = Accepted(batch, self.settings.seed, self._cases, self.inspector)
                for index in sorted(accepted.made):
                    record = self.writer.write_case(
                        index, accepted.made[index], header, accepted.seeds[index], accepted.rejected[index]
                    )
                    state.write(f"{record.model_dump_json()}\n")
                    state.flush()
                    os.fsync(state.fileno())
                    records[record.name] = record
                    task.advance()
                accepted.check()
        return records

    def _cases(self, batch: Sequence[int], seeds: Sequence[int]) -> list[Made]:
        """A batch of cases from the generator, in order."""
        make = self._sampled if self.settings.verb == "sample" else self._from_sources
        return make(batch, seeds)

    @property
    def _how(self) -> dict[str, Any]:
        """What every verb is told."""
        parameters = self.settings.parameters
        return {
            "steps": parameters.steps,
            "guidance": parameters.guidance,
            "sampler": parameters.sampler,
            "parameters": parameters.told,
        }

    def _sampled(self, batch: Sequence[int], seeds: Sequence[int]) -> list[Made]:
        """Cases from nothing."""
        generator = self.generator
        sample = generator.sample(len(batch), seed=seeds, **self._how)
        images = sample.image.numpy()
        if not generator.knows_labels:
            return [Made(image, None, sample.affine, None) for image in images]
        for index, label in zip(batch, sample.label, strict=True):
            if not label.any():
                raise DiffaugError(
                    f"{generator.name} made a label map without any structure ({self.names[index]}): a "
                    "generator that has learned its labels does not; look at the figures on its card and "
                    "train it longer (or, where this is rare, build with another seed)"
                )
        pairs = zip(images, sample.label.numpy(), strict=True)
        return [Made(image, label[0], sample.affine, None) for image, label in pairs]

    def _from_sources(self, batch: Sequence[int], seeds: Sequence[int]) -> list[Made]:
        """Painted or varied cases; those of one shape are made together."""
        generator, parameters = self.generator, self.settings.parameters
        sources = [self.sources[index % len(self.sources)] for index in batch]
        reals = [read_source(source, generator, self.label_mapping) for source in sources]
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, real in enumerate(reals):
            by_shape[real.label.shape].append(position)
        images: dict[int, np.ndarray] = {}
        for positions in by_shape.values():
            label = torch.from_numpy(np.stack([reals[p].label for p in positions]))
            affine = np.stack([reals[p].affine for p in positions])
            own = [seeds[p] for p in positions]
            if parameters.strength is None:
                out = generator.paint(label, affine, seed=own, **self._how)
            else:
                image = torch.from_numpy(
                    np.stack([i for p in positions if (i := reals[p].image) is not None])
                )
                out = generator.vary(
                    image,
                    label,
                    affine,
                    strength=parameters.strength,
                    seed=own,
                    allow_label_drift=parameters.allow_label_drift,
                    residual=False,
                    intensity=[m for p in positions if (m := reals[p].intensity) is not None],
                    **self._how,
                )
            images |= dict(zip(positions, out.numpy(), strict=True))
        return [
            Made(images[position], real.label[0], real.affine, self._provenance(source, real))
            for position, (source, real) in enumerate(zip(sources, reals, strict=True))
        ]

    def _provenance(self, source: Source, real: RealCase) -> CaseSource:
        assert self.settings.source is not None
        known = self.settings.source.cases[source.case.name]
        return CaseSource(
            name=source.case.name, patient=known.patient, files=known.files, box=real.box, cut=real.cut
        )


def _fits_integers(intensity: IntensityMap) -> bool:
    """Whether whole numbers of 16 bits hold the volumes of an intensity map well enough."""
    span = intensity.high - intensity.low
    beyond = span * (intensity.clip - 1) / 2
    limits = torch.iinfo(torch.int16)
    inside = (intensity.low - beyond >= limits.min) & (intensity.high + beyond <= limits.max)
    return bool(((span > INTEGER_RANGE) & inside).all())


def _size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
