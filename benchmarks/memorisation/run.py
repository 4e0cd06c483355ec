"""Audit generators of hippocampi: what they memorise, and what their samples are worth, with rejection.

A stopped run goes on where it stopped:

python benchmarks/memorisation/run.py --generator hippocampus-mr --data SCANS --work CACHE
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1] / "generator_quality"))
from bench import Bench
from cases import Cases
from figures import segmenter_dice

import diffaug
from diffaug.audit.auditing import Part, audit
from diffaug.audit.detector import FILE, write_detector
from diffaug.audit.encoder import STEPS, trained_encoder
from diffaug.audit.features import encoder_space
from diffaug.audit.inspection import inspect_by
from diffaug.audit.record import Report
from diffaug.audit.volumes import Sets, audit_grid, collect
from diffaug.datasets.building import build_dataset
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import load_case
from diffaug.evaluation.segmenter import predict, standardise
from diffaug.evaluation.statistics import mean_interval
from diffaug.files import atomic_write_json
from diffaug.generators.generator import Generator
from diffaug.generators.grid import Grid, place
from diffaug.progress import Progress
from diffaug.zoo import load

HERE = Path(__file__).parent
# Held-out cases of each measurement. The detector by which copies are rejected always has its thresholds from
# the validation cases.
HELD_OUT = {"validation": ("validation",), "test": ("validation", "test")}
# Samples that are audited, and of the build with rejection those that train a segmenter.
SAMPLES, PAIRS = 200, 500


def main() -> None:
    """Parse the command line, and make what is missing for each generator."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", nargs="+", required=True, help="names or folders of generators")
    parser.add_argument("--subset", choices=HELD_OUT, default="validation", help="the held-out cases")
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for builds, encoder and segmenters")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="cases built with rejection")
    parser.add_argument("--trained-on", type=int, default=PAIRS, help="those of them that train a segmenter")
    parser.add_argument("--steps", type=int, default=12000, help="training steps of the segmenter")
    parser.add_argument("--sampler", help="default: the card's")
    parser.add_argument("--guidance", type=float, help="default: the card's")
    parser.add_argument("--no-utility", action="store_true", help="train no segmenter")
    parser.add_argument("--on", help="audit on the coarser grid of this generator (of images alone)")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data, or set DIFFAUG_DATA")
    for name in options.generator:
        measure(name, options)


def measure(name: str, options: argparse.Namespace) -> None:
    """Audit samples of one generator with and without rejection, and train a segmenter on the latter."""
    progress = Progress()
    generator = guided(load(name), options.guidance)
    work, cache = options.work / generator.name, options.work / "cache"
    real = read_dataset(options.data / "Task04_Hippocampus")
    assert real.split is not None
    subsets = {
        subset: Part(real, [case for case in real.cases if case.name in names])
        for subset, names in real.split.items()
    }
    held_out = Part(real, [case for subset in HELD_OUT[options.subset] for case in subsets[subset].cases])
    how = {"layout": "decathlon", "sampler": options.sampler, "progress": progress}
    build_dataset(generator, work / "plain", cases=SAMPLES, **how)
    detector = work / FILE
    if not detector.exists():
        thresholds(work / "plain", subsets["train"], subsets["validation"], cache, detector, progress)
    inspector = inspect_by(generator, detector, None)
    build_dataset(generator, work / "rejected", cases=options.pairs, inspector=inspector, **how)
    other = load(options.on) if options.on else None
    label = generator.name + (f"-on-{other.name}" if other else "")
    for kind in ("plain", "rejected"):
        file = options.results / options.subset / f"{label}-{kind}.json"
        identity = {"manifest": sha256(work / kind / "manifest.json"), "audit": audit_hash()}
        if file.exists() and json.loads(file.read_text())["identity"] == identity:
            progress.note(f"{file}: there")
            continue
        built = read_dataset(work / kind)
        if other is not None:
            built = resampled(built, other.grid, options.work / label / kind)
        report = audit(
            Part(built, built.cases[:SAMPLES]),
            subsets["train"],
            held_out,
            options.work / label / f"audit-{options.subset}-{kind}",
            cache=cache,
            progress=progress,
        )
        atomic_write_json(
            file,
            {
                "identity": identity,
                "generator": {**named(generator), "name": label},
                "kind": kind,
                "report": shared(report),
            },
        )
    if not options.no_utility:
        utility(name, generator, work / "rejected", options, progress)


def resampled(built: Dataset, grid: Grid, folder: Path) -> Dataset:
    """The first images of a built dataset on another generator's grid, resampled as audits resample scans."""
    for case in built.cases[:SAMPLES]:
        loaded = load_case(case)
        image = torch.from_numpy(loaded.image)[None]
        volume = place(grid, image.shape[2:], loaded.affine).image_to_grid(image)
        file = folder / "imagesTr" / f"{case.name}_0000.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume[0, 0].numpy(), grid.affine), file)
    description = {
        "name": built.name,
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0},
        "file_ending": ".nii.gz",
    }
    atomic_write_json(folder / "dataset.json", description)
    return read_dataset(folder)


def guided(generator: Generator, guidance: float | None) -> Generator:
    """The generator with another guidance of `sample`, by a name of its own; None leaves it as it is."""
    if guidance is not None:
        card = generator.card
        update = {
            "name": f"{card.name}-guidance-{guidance:g}",
            "defaults": card.defaults.model_copy(update={"sample_guidance": guidance}),
        }
        generator.card = card.model_copy(update=update)
    return generator


def thresholds(
    folder: Path, training: Part, held_out: Part, cache: Path, detector: Path, progress: Progress
) -> None:
    """Write the detector of an audit of the samples in a folder, without the rest of the audit."""
    samples = Part.whole(folder)
    grid = audit_grid(samples.dataset)
    sets = Sets(
        *(
            collect(part.dataset, part.cases, grid, cache, progress, name)
            for name, part in (("synthetic", samples), ("training", training), ("held-out", held_out))
        )
    )
    encoder = trained_encoder(sets.training, cache, STEPS, "cpu", progress)
    write_detector(encoder, encoder_space(encoder, encoder, sets, progress), sets, grid, detector)


def utility(
    name: str, generator: Generator, folder: Path, options: argparse.Namespace, progress: Progress
) -> None:
    """Dice of the reference segmenter trained on a built dataset, labelled by the judge where it has none."""
    count, steps = options.trained_on, options.steps
    bench = Bench(name, options.subset, options.data, options.work, steps, count, 1)
    file = options.results / options.subset / f"{generator.name}-dice-{count}-{steps}.json"
    identity = {
        "weights": generator.weights_hash,
        "manifest": sha256(folder / "manifest.json"),
        "segmenter": bench.segmenter_hash,
        "steps": steps,
    }
    if file.exists() and json.loads(file.read_text())["identity"] == identity:
        progress.note(f"{file}: there")
        return
    cases = read_built(folder, bench, count)
    kept = f"built-{sha256(folder / 'manifest.json')[:16]}-{count}-steps{steps}"
    model = bench.kept(kept, cases, seed=0, steps=steps)
    held_out = bench.held_out
    scores = np.nanmean(segmenter_dice(model, held_out.images, held_out.labels), 1)
    found = mean_interval(scores, held_out.patients)
    atomic_write_json(
        file,
        {
            "identity": identity,
            "generator": named(generator),
            "cases": len(cases),
            "steps": steps,
            "dice": found._asdict(),
        },
    )
    progress.note(f"{file}: {found}")


def read_built(folder: Path, bench: Bench, count: int) -> Cases:
    """The first cases of a built dataset, on the benchmark's grid as they are."""
    loaded = [load_case(case) for case in read_dataset(folder).cases[:count]]
    images = torch.stack([torch.from_numpy(case.image) for case in loaded])
    if loaded[0].label is None:
        labels = predict(bench.judge, standardise(images)).short()
    else:
        labels = torch.stack([torch.from_numpy(case.label) for case in loaded if case.label is not None])
    names = tuple(f"{index:05d}" for index in range(len(loaded)))
    return Cases(names, names, images, labels)


def named(generator: Generator) -> dict[str, Any]:
    """What the table says of a generator."""
    card = generator.card
    return {"name": card.name, "architecture": card.architecture, "steps": card.training.denoiser_steps}


def audit_hash() -> str:
    """Identity of the code that audits."""
    root = Path(diffaug.__file__).parent
    files = sorted([*(root / "audit").glob("*.py"), *(root / "evaluation").glob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def shared(report: Report) -> dict[str, Any]:
    """A report for the repository: without the names of scans."""
    content = json.loads(report.model_dump_json())
    for suspect in content["suspects"]:
        del suspect["training"]
    return content


def sha256(file: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
