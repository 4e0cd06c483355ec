"""Does the audit find copies? 20 altered training scans among 180 samples, in several draws; 20 training
scans altered alike, more and more; and two controls: noise, and validation scans in the place of samples.

python benchmarks/memorisation/planted.py --samples BUILT --data SCANS --work CACHE

BUILT is a dataset of at least 180 samples, such as `hippocampus-mr/plain` in the folder in which run.py
worked.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, rotate

from diffaug.audit.auditing import Part, audit
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.files import atomic_write_json
from diffaug.progress import Progress

HERE = Path(__file__).parent
SAMPLES, DRAWS, ALTERED = 180, 5, 20
# Voxels of a shift, share of the range that noise has, exponents of warped intensities, and the original's
# weight in a blend.
SHIFT, NOISE, GAMMAS, BLEND = 4, 0.1, (0.6, 1.6), 0.8

DESCRIPTION = {
    "name": "planted",
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
    "file_ending": ".nii.gz",
}

Volume = NDArray[np.float32]
# An altered image and label map, from those of a case, another image and a source of chance.
Alter = Callable[[Volume, Volume, Volume, np.random.Generator], tuple[Volume, Volume]]


def exact(image: Volume, label: Volume, _: Volume, __: np.random.Generator) -> tuple[Volume, Volume]:
    """As it is."""
    return image, label


def mirrored(image: Volume, label: Volume, _: Volume, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Mirrored along an axis."""
    axis = int(rng.integers(3))
    return np.flip(image, axis), np.flip(label, axis)


def shift(image: Volume, label: Volume, voxels: Sequence[int]) -> tuple[Volume, Volume]:
    """Both shifted by as many voxels along each axis; what comes in is the border."""
    along = zip(image.shape, voxels, strict=True)
    index = np.ix_(*(np.clip(np.arange(n) + amount, 0, n - 1) for n, amount in along))
    return image[index], label[index]


def shifted(image: Volume, label: Volume, _: Volume, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Shifted along all axes; what comes in is the border."""
    return shift(image, label, [int(rng.integers(-SHIFT, SHIFT + 1)) for _ in image.shape])


def noised(image: Volume, label: Volume, _: Volume, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """With Gaussian noise of a tenth of the range."""
    low, high = np.percentile(image, (0.5, 99.5))
    return image + rng.normal(0, NOISE * (high - low), image.shape), label


def warped(image: Volume, label: Volume, _: Volume, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """With other contrast."""
    low, high = np.percentile(image, (0.5, 99.5))
    return low + (high - low) * np.clip((image - low) / (high - low), 0, 1.5) ** rng.choice(GAMMAS), label


def blended(image: Volume, label: Volume, other: Volume, _: np.random.Generator) -> tuple[Volume, Volume]:
    """With a fifth of another case of the same brightness."""
    index = [np.clip(np.arange(n), 0, m - 1) for n, m in zip(image.shape, other.shape, strict=True)]
    return BLEND * image + (1 - BLEND) * other[np.ix_(*index)] * (image.mean() / other.mean()), label


def turned(degrees: float) -> Alter:
    """Turned about the last axis."""

    def alter(image: Volume, label: Volume, _: Volume, __: np.random.Generator) -> tuple[Volume, Volume]:
        return rotate(image, degrees, reshape=False, order=1, mode="mirror"), rotate(
            label, degrees, reshape=False, order=0, mode="mirror"
        )

    return alter


def moved(voxels: int) -> Alter:
    """Shifted by as many voxels along every axis."""

    def alter(image: Volume, label: Volume, _: Volume, __: np.random.Generator) -> tuple[Volume, Volume]:
        return shift(image, label, [voxels] * 3)

    return alter


def stretched(factor: float) -> Alter:
    """Larger about the middle."""

    def alter(image: Volume, label: Volume, _: Volume, __: np.random.Generator) -> tuple[Volume, Volume]:
        offset = (np.array(image.shape) - 1) / 2 * (1 - 1 / factor)
        return affine_transform(image, np.eye(3) / factor, offset, order=1, mode="mirror"), affine_transform(
            label, np.eye(3) / factor, offset, order=0, mode="mirror"
        )

    return alter


ALTERATIONS: dict[str, Alter] = {
    **{f"shifted by {n} voxels": moved(n) for n in (1, 2, 4)},
    **{f"turned by {n} degrees": turned(n) for n in (5, 8, 12, 17)},
    **{f"stretched by {n}": stretched(n) for n in (1.1, 1.2)},
}
KINDS: list[tuple[Alter, int]] = [
    (exact, 3),
    (mirrored, 4),
    (shifted, 4),
    (noised, 3),
    (warped, 3),
    (blended, 3),
]


def main() -> None:
    """Parse the command line, plant and audit, draw by draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    real = read_dataset(options.data / "Task04_Hippocampus")
    assert real.split is not None
    training, held_out = (
        Part(real, [case for case in real.cases if case.name in real.split[subset]])
        for subset in ("train", "validation")
    )
    progress = Progress()
    draws = []
    for draw in range(DRAWS):
        folder = options.work / f"planted-{draw}"
        originals = plant(options.samples, folder, list(training.cases), np.random.default_rng(draw))
        report = audit(
            Part.whole(folder),
            training,
            held_out,
            options.work / f"audit-planted-{draw}",
            cache=options.work / "cache",
            progress=progress,
        )
        suspects = {suspect.synthetic: suspect for suspect in report.suspects}
        found = {
            name: name in suspects and suspects[name].training == original
            for name, original in originals.items()
        }
        others = [name for name in suspects if name not in originals]
        draws.append(
            {
                "found": sum(found.values()),
                "missed": [name for name, ok in found.items() if not ok],
                "clear": sum(suspects[name].clear for name, ok in found.items() if ok),
                "planted": len(originals),
                "false": len(others),
                "false_clear": sum(suspects[name].clear for name in others),
                "samples": SAMPLES,
                "chance": {
                    search.name: {"expected": search.expected, "most": search.most}
                    for search in report.copies.searches
                },
                "answers": {verdict.question: verdict.answer for verdict in report.verdicts},
            }
        )
        progress.note(json.dumps(draws[-1]))
    atomic_write_json(options.results / "planted.json", draws)
    found = {
        name: altered(alter, training, held_out, options.work, progress)
        for name, alter in ALTERATIONS.items()
    }
    atomic_write_json(options.results / "altered.json", found)
    atomic_write_json(options.results / "controls.json", controls(real, options.work, progress))


def altered(alter: Alter, training: Part, held_out: Part, work: Path, progress: Progress) -> dict[str, int]:
    """How many of 20 training scans, altered alike, are found beside their originals, and clear."""
    folder = work / "altered"
    shutil.rmtree(folder, ignore_errors=True)
    originals = {}
    for number, case in enumerate(training.cases[:: len(training.cases) // ALTERED][:ALTERED]):
        loaded = load_case(case)
        assert loaded.label is not None
        image, label = loaded.image[0].astype(np.float32), loaded.label[0]
        name = f"altered_{number:02d}"
        save(folder, name, *alter(image, label, image, np.random.default_rng(number)), loaded.affine)
        originals[name] = case.name
    atomic_write_json(folder / "dataset.json", DESCRIPTION)
    report = audit(
        Part.whole(folder),
        training,
        held_out,
        work / "audit-altered",
        cache=work / "cache",
        progress=progress,
    )
    right = [s for s in report.suspects if s.training == originals[s.synthetic]]
    return {"scans": len(originals), "found": len(right), "clear": sum(s.clear for s in right)}


def controls(real: Dataset, work: Path, progress: Progress) -> dict[str, Any]:
    """Answers for noise and for real scans of other patients: both against halves of the training patients,
    so that no test scan is read."""
    assert real.split is not None
    training = [case for case in real.cases if case.name in real.split["train"]]
    patients = sorted({case.patient for case in training})
    first = set(np.random.default_rng(0).permutation(patients)[: len(patients) // 2])
    halves = [
        Part(real, [case for case in training if (case.patient in first) is side]) for side in (True, False)
    ]
    others = Part(real, [case for case in real.cases if case.name in real.split["validation"]])
    noise = work / "noise"
    rng = np.random.default_rng(1)
    for number, case in enumerate(others.cases):
        loaded = load_case(case)
        assert loaded.label is not None
        image = rng.normal(size=loaded.image[0].shape).astype(np.float32)
        save(noise, f"noise_{number:02d}", image, loaded.label[0], loaded.affine)
    atomic_write_json(noise / "dataset.json", DESCRIPTION)
    found = {}
    for name, samples in (("noise", Part.whole(noise)), ("validation scans", others)):
        report = audit(
            samples, *halves, work / f"audit-{name.split()[0]}", cache=work / "cache", progress=progress
        )
        found[name] = [verdict.model_dump() for verdict in report.verdicts]
        progress.note(f"{name}: " + ", ".join(f"{v.answer}: {v.question}" for v in report.verdicts))
    return found


def plant(samples: Path, folder: Path, training: list[CaseFiles], rng: np.random.Generator) -> dict[str, str]:
    """A dataset of samples and altered training cases; name of each of these -> the case it was."""
    shutil.rmtree(folder, ignore_errors=True)
    built = read_dataset(samples)
    for case in rng.permutation(np.array(built.cases, dtype=object))[:SAMPLES]:
        loaded = load_case(case)
        assert loaded.label is not None
        save(folder, case.name, loaded.image[0], loaded.label[0], loaded.affine)
    order = rng.permutation(len(training))
    originals = {}
    kinds = [kind for kind, count in KINDS for _ in range(count)]
    for number, kind in enumerate(kinds):
        case, other = training[order[number]], training[order[-1 - number]]
        loaded = load_case(case)
        assert loaded.label is not None
        image, label = kind(
            loaded.image[0].astype(np.float32), loaded.label[0], load_case(other).image[0], rng
        )
        name = f"planted_{kind.__name__}_{number:02d}"
        save(folder, name, image, label, loaded.affine)
        originals[name] = case.name
    atomic_write_json(folder / "dataset.json", DESCRIPTION)
    return originals


def save(folder: Path, name: str, image: NDArray[Any], label: NDArray[Any], affine: NDArray[Any]) -> None:
    """A case in nnU-Net's raw layout."""
    volumes = {
        f"imagesTr/{name}_0000": image.astype(np.float32),
        f"labelsTr/{name}": label.astype(np.uint8),
    }
    for path, array in volumes.items():
        file = folder / f"{path}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.ascontiguousarray(array), affine), file)


if __name__ == "__main__":
    main()
