"""The manifest of a built dataset: where each case comes from, under which licence, and how to make it again.

It holds no date and no path outside the dataset, so that equal builds have equal bytes wherever and whenever
they ran.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json
from diffaug.generators.card import CardGrid
from diffaug.generators.intensity import IntensityConvention
from diffaug.version import __version__

MANIFEST = "manifest.json"
# Characters of a value that a message shows.
SHOWN = 60

Verb = Literal["sample", "paint", "vary"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GeneratorRecord(_Part):
    """The generator, as far as it decides the bytes of a case: `weights` is the hash of its weights."""

    name: str
    weights: str
    channels: list[str]
    labels: dict[int, str]
    grid: CardGrid
    intensity: IntensityConvention


class Parameters(_Part):
    """How the verb was applied; `strength` is that of `vary`, None for the other verbs.

    With `allow_label_drift` the label map is a copy, and nothing kept the image to it. `told` is what else
    the generator was told, by the card's `parameters`.
    """

    sampler: str
    shift: float
    steps: int
    guidance: float
    strength: float | None
    allow_label_drift: bool = False
    told: dict[str, float | str] = {}


class SourceCase(_Part):
    """A real case that something was made from: SHA-256 of its files, by their path in the source folder.

    `patient` is None where no table of the source dataset says who the patient is.
    """

    patient: str | None
    files: dict[str, str]


class SourceRecord(_Part):
    """What was painted (a folder of label maps) or varied (a dataset), with the cases used, in order.

    `subset` is "train" where the dataset has a split, whose other cases are then left alone. `labels` names
    the ids of label maps that are copied; it is empty where the generator's vocabulary counts.
    """

    name: str
    licence: str | None
    reference: str | None
    subset: Literal["train"] | None
    labels: dict[int, str] = {}
    cases: dict[str, SourceCase]


class InspectionRecord(_Part):
    """What candidates were looked at by, before they became cases.

    Attributes:
        detector: SHA-256 of the copy detector.
        segmenter: SHA-256 of the independent segmenter that labels had to agree with, or None.
        checks: name -> what is refused, in words.
        real: share of real held-out cases that each check refuses, or None where that was not measured.
    """

    detector: str
    segmenter: str | None
    checks: dict[str, str]
    real: dict[str, float | None]


class Settings(_Part):
    """What was asked for. Equal settings, versions and device give equal bytes."""

    name: str
    layout: Literal["nnunet", "decathlon"]
    cases: int
    verb: Verb
    seed: int
    generator: GeneratorRecord
    parameters: Parameters
    label_mapping: dict[int, int]
    source: SourceRecord | None
    inspection: InspectionRecord | None = None

    @property
    def labels(self) -> dict[int, str]:
        """Id -> name in the label maps, before the layout numbers them; empty where there are none."""
        if self.source is not None and self.parameters.allow_label_drift:
            return self.source.labels
        return self.generator.labels


class CaseSource(SourceCase):
    """The source of one case: its name, and the half-open voxel bounds in it that the case shows.

    `cut` counts the label's voxels outside these bounds, beyond the generator's grid.
    """

    name: str
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    cut: int


class Rejected(_Part):
    """A candidate that was refused, and by which checks."""

    seed: int
    reasons: list[str]


class CaseRecord(_Part):
    """One case of a built dataset, complete in itself.

    `files` holds SHA-256 by path in the dataset, `rejected` the candidates refused before this one; a
    finished manifest gives only their numbers, since they can be made again from their seeds.
    """

    name: str
    generator: str
    weights: str
    verb: Verb
    seed: int
    parameters: Parameters
    source: CaseSource | None
    licence: str
    files: dict[str, str]
    rejected: list[Rejected] = []


class Inspected(_Part):
    """Numbers of an inspected build: candidates made, and those that each check refused."""

    candidates: int
    rejected: dict[str, int]


class Manifest(_Part):
    """A whole dataset.

    Attributes:
        licence: of the dataset, in words where generator and source differ.
        commercial_use, redistribution: whether the generator's licence allows them; None: not stated.
        citation: what to cite, the generator's and the source's.
        caveat: what the label maps are not, in words; empty where the images show them.
        label_ids: id in the dataset -> id in the vocabulary of the generator, or of the source whose label
            maps are copied; empty where there are no label maps.
        image_dtype: of the voxels on disk.
        versions: of whatever decides bytes.
        device: what the networks ran on.
        audit: answer of the generator's own audit (pass, unclear or fail), or None where its card has none.
        audit_with_rejection: whether copies had been refused among the samples of that audit.
        inspected: numbers of candidates, where they were looked at.
        files: SHA-256 of the files that belong to no case.
    """

    format: Literal[1] = 1
    settings: Settings
    licence: str
    commercial_use: bool | None = None
    redistribution: bool | None = None
    citation: list[str]
    caveat: str = ""
    label_ids: dict[int, int]
    image_dtype: Literal["int16", "float32"]
    versions: dict[str, str]
    device: str
    audit: str | None = None
    audit_with_rejection: bool = False
    inspected: Inspected | None = None
    files: dict[str, str] = Field(default={})
    cases: list[CaseRecord] = Field(default=[])


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a built dataset.

    Raises:
        DiffaugError: it cannot be read, or is no manifest of this format.
    """
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DiffaugError(f"cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DiffaugError(
            f"{path} is no manifest that diffaug {__version__} understands ({where}: {first['msg']}):"
            " it is damaged, or was written by something else"
        ) from error


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all."""
    atomic_write_json(path, plain(manifest))


def plain(record: BaseModel) -> dict[str, Any]:
    """A record as plain JSON types."""
    return json.loads(record.model_dump_json())


def versions() -> dict[str, str]:
    """Versions of whatever decides the bytes of a case."""
    return {
        "diffaug": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """What a record says about a device: "cpu", or the kind of GPU."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def combined_licence(generator: str, source: SourceRecord | None) -> str:
    """The licence of what `generator` (its licence) made, from `source` if there is one."""
    if source is None or _bare(source.licence) == _bare(generator):
        return generator
    terms = source.licence or "not stated, ask its owner"
    return f"{generator} (generator); {terms} (source: {source.name})"


def _bare(licence: str | None) -> str:
    """A licence's name without its punctuation: "CC-BY-SA 4.0" and "CC-BY-SA-4.0" are the same."""
    return "".join(c for c in (licence or "").lower() if c.isalnum())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per value in which two records of plain JSON types differ: key, old and new value."""
    before, after = _flat(old), _flat(new)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, _ABSENT) != after.get(key, _ABSENT):
            lines.append(
                f"{key}: {_shown(before.get(key, _ABSENT))} there, {_shown(after.get(key, _ABSENT))} now"
            )
    return lines


_ABSENT = object()


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
