"""`fit`: from a labelled dataset to a generator, by itself; interrupted, the same call goes on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffaug.datasets.checking import check_dataset
from diffaug.datasets.reading import Dataset
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json, atomic_write_text, read_json, sha256_file
from diffaug.generators.card import Card, CardGrid, Training
from diffaug.generators.generator import Generator
from diffaug.generators.networks import VERBS
from diffaug.progress import Progress
from diffaug.training.architectures import Plan, make_plan, read_plan, train
from diffaug.training.cases import make_canvases
from diffaug.training.fingerprint import Fingerprint, file_hashes, record_training_scans, take_fingerprint
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.loop import make_accelerator
from diffaug.training.medical_diffusion.perceptual import load_lpips
from diffaug.training.medical_diffusion.presets import find_preset
from diffaug.training.planning import Request
from diffaug.training.report import validation_report
from diffaug.training.trained import Trained
from diffaug.zoo import load

# Share of the patients that is held out where no split file says which.
HELD_OUT = 0.1
PRIVATE = "private"
DEFAULT_ARCHITECTURE = "joint-flow"
PRESET_ARCHITECTURE = "medical-diffusion"
DESCRIPTIONS = {
    "joint-flow": "Joint image and label flow-matching generator",
    "medical-diffusion": "Medical Diffusion generator (VQ-GAN and diffusion, without labels)",
}
DEFAULT_BUDGET = 4 * 3600.0
# Dice of label round trips or of `segment` below which a generator makes labels that are worth nothing.
USELESS = 0.5
_README = """Stays with you: this folder holds your scans (canvases, latents), checkpoints, and
training_scans.json, the salted hashes by which diffaug recognises the scans that trained this generator.
The folder above may be shared without it, once you have examined what the generator makes.
"""


@dataclass(frozen=True)
class Subsets:
    """The cases that fit weights and those that measure them."""

    train: tuple[CaseFiles, ...]
    validation: tuple[CaseFiles, ...]
    counts: dict[str, int]
    patients: dict[str, int] | None


def fit_generator(
    dataset: Dataset,
    output: Path,
    *,
    architecture: str | None = None,
    preset: str | None = None,
    perceptual: Sequence[Path] = (),
    name: str | None = None,
    budget: float | None = None,
    plan: Path | None = None,
    dry_run: bool = False,
    init: Path | str | None = None,
    mirror_axes: tuple[int, ...] | None = None,
    seed: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Plan | Generator:
    """Check, plan, train, measure and save; returns the generator, or for a dry run the plan.

    Args:
        dataset: what to fit; its "train" subset fits weights, its "validation" subset measures. Without a
            split a tenth of the patients is held out.
        output: folder of the generator. `private/` in it holds everything that must not be shared, among it
            the checkpoints that an interrupted fit continues from.
        architecture: "joint-flow", or "medical-diffusion", which knows no labels. Default: that of the preset
            or of the generator to start from, else joint-flow.
        preset: name of a recipe of Medical Diffusion's that fixes grid, intensity, down-sampling and
            augmentation.
        perceptual: files with the weights of LPIPS, for medical-diffusion; without them it trains without
            that loss. Nothing is downloaded. The plan holds their hashes.
        budget: seconds of training to plan for, 4 hours unless given. It fixes numbers of iterations; nothing
            depends on the clock later. Part of the plan, as all of the following are.
        plan: a plan file to train by instead.
        init: name or folder of a generator to start from.
        name, mirror_axes, seed: given beside a plan that says otherwise they are an error. Default: the
            output folder's name, the preset's or none, and 0. mirror_axes are grid axes (0 left-right, 1
            posterior-anterior, 2 inferior-superior) along which a mirrored case is still a plausible one.
        device: "cpu" keeps a GPU out of it; otherwise accelerate's choice (the GPU where there is one).

    Raises:
        DatasetError: everything that is wrong with the data, before any training.
        DiffaugError: a folder that holds another fit, a plan or preset that does not fit the data.
    """
    architecture = _architecture(architecture, preset)
    progress = progress or Progress()
    accelerator = make_accelerator(device)
    private = output / PRIVATE
    start = load(init) if init is not None else None
    if start is not None and architecture is None:
        architecture = start.card.architecture
    hashes = _perceptual_hashes(perceptual)
    saved_plan, asked_plan = output / "plan.json", read_plan(plan) if plan else None
    if asked_plan is not None and asked_plan.init is None and start is not None:
        asked_plan = asked_plan.model_copy(update={"init": start.weights_hash})
    if (output / "card.json").exists() and not (private / "files.json").exists():
        raise DiffaugError(f"{output} holds a generator that was not fitted there: give another --output")
    settled = read_plan(saved_plan) if saved_plan.exists() and not dry_run else asked_plan
    if settled is not None:
        _refuse_other_plan(settled, asked_plan, saved_plan)
        _check_start(settled, start)
        _refuse_other_options(
            settled,
            architecture=architecture,
            preset=preset,
            name=name,
            mirror_axes=mirror_axes,
            seed=seed,
            budget=budget,
        )
    subsets = split_cases(dataset, settled.seed if settled else seed or 0)
    with progress.task("checking cases", total=len(dataset.cases)) as task:
        check_dataset(dataset, lambda _: task.advance())
    if not dataset.patients_given:
        progress.note("No patient table was given: each case is taken for its own patient.")

    if settled is None:
        fingerprint = _fingerprint(dataset, subsets, private, progress, keep=not dry_run)
        request = Request(
            name=name or output.resolve().name,
            fingerprint=fingerprint,
            channels=dataset.channels,
            labels=dataset.labels,
            budget=DEFAULT_BUDGET if budget is None else budget,
            mirror_axes=mirror_axes or (),
            seed=seed or 0,
            init=start,
            preset=preset,
            perceptual=hashes,
        )
        settled = make_plan(architecture or DEFAULT_ARCHITECTURE, request, accelerator)
    _check_plan(settled, dataset)
    _check_perceptual(settled, hashes)
    if settled.autoencoder_training.steps == 0 and start is None:
        raise DiffaugError("autoencoder_training.steps is 0: say with init whose autoencoders to keep")
    if dry_run:
        return settled

    if (output / "card.json").exists():
        _check_same_scans(private / "files.json", subsets)
        progress.note(f"{output} is complete already: nothing to do")
        return Generator.load(output)

    if accelerator.is_main_process:
        private.mkdir(parents=True, exist_ok=True)
        _check_same_scans(private / "files.json", subsets)
        atomic_write_text(private / "README.txt", _README)
        if not saved_plan.exists():
            atomic_write_text(saved_plan, settled.model_dump_json(indent=2) + "\n")
        sidecar = private / "training_scans.json"
        if not sidecar.exists():
            atomic_write_json(sidecar, record_training_scans(subsets.train, progress))
    accelerator.wait_for_everyone()

    training = make_canvases(settled, subsets.train, private / "training", progress)
    validation = make_canvases(settled, subsets.validation, private / "validation", progress)
    trained = train(settled, training, validation, private, accelerator, progress, start, perceptual)
    card = make_card(settled, trained, dataset, subsets, init=start.weights_hash if start else None)
    generator = Generator(card, trained.model, json.loads(settled.model_dump_json()))
    if accelerator.is_main_process:
        atomic_write_json(output / "history.json", trained.histories)
        figures = validation_report(generator, subsets.validation, trained, output, private, progress)
        generator.card = generator.card.model_copy(update={"figures": figures})
        generator.save(output)
        _tell(figures, progress)
    accelerator.wait_for_everyone()
    # As anybody else will load it: with the weights as they were written, and their hash on the card.
    return Generator.load(output)


def _architecture(asked: str | None, preset: str | None) -> str | None:
    """The architecture that was asked for, a preset implying its own."""
    if preset is None:
        return asked
    find_preset(preset)
    if asked not in (None, PRESET_ARCHITECTURE):
        raise DiffaugError(
            f"{preset} is a preset of {PRESET_ARCHITECTURE}, not of {asked}: leave one of them out"
        )
    return PRESET_ARCHITECTURE


def _perceptual_hashes(files: Sequence[Path]) -> tuple[str, ...]:
    """SHA-256 of the files of a perceptual loss, which are read before anything else is done."""
    if not files:
        return ()
    load_lpips(files)
    return tuple(sha256_file(path) for path in files)


def _check_perceptual(settled: Plan, hashes: tuple[str, ...]) -> None:
    """The weights of the perceptual loss are part of the plan, by their hashes."""
    if isinstance(settled, JointFlowPlan):
        if hashes:
            raise DiffaugError(f"a perceptual loss is part of {PRESET_ARCHITECTURE} alone: leave it out")
        return
    planned = settled.autoencoder_training.perceptual
    if sorted(planned) != sorted(hashes):
        there, given = (", ".join(each) or "(none)" for each in (planned, hashes))
        raise DiffaugError(
            f"the plan trains with LPIPS from files with the SHA-256 {there}, given are {given}: give the "
            "plan's with --perceptual, or edit the plan before a fit begins"
        )


def split_cases(dataset: Dataset, seed: int) -> Subsets:
    """The dataset's own split, or one by patient: a tenth of the patients, at least one, is held out."""
    by_name = {case.name: case for case in dataset.cases}
    if dataset.split is not None:
        names = {subset: list(found) for subset, found in dataset.split.items() if found}
    else:
        patients = sorted({case.patient for case in dataset.cases})
        if len(patients) < 2:
            raise DiffaugError(
                f"{dataset.root} has {len(patients)} patient(s); fitting needs at least 2, one to validate on"
            )
        order = np.random.default_rng(seed).permutation(len(patients))
        held = {patients[n] for n in order[: max(1, round(HELD_OUT * len(patients)))]}
        names = {
            "train": [c.name for c in dataset.cases if c.patient not in held],
            "validation": [c.name for c in dataset.cases if c.patient in held],
        }
    if not names.get("validation"):
        raise DiffaugError(
            f'the split of {dataset.root} has no validation cases; add some under "validation"'
        )
    counts = {subset: len(found) for subset, found in names.items()}
    patients_of = {subset: len({by_name[n].patient for n in found}) for subset, found in names.items()}
    return Subsets(
        tuple(by_name[n] for n in names["train"]),
        tuple(by_name[n] for n in names["validation"]),
        counts,
        patients_of if dataset.patients_given else None,
    )


def make_card(plan: Plan, trained: Trained, dataset: Dataset, subsets: Subsets, *, init: str | None) -> Card:
    """The card of a freshly fitted generator; figures and file hashes come when it is measured and saved."""
    networks, histories = trained.networks, trained.histories
    return Card(
        name=plan.name,
        description=f"{DESCRIPTIONS[plan.architecture]} fitted to {dataset.name} "
        f"({len(subsets.train)} training cases).",
        architecture=plan.architecture,
        networks=networks,
        grid=CardGrid(**plan.grid.model_dump()),
        extent=plan.extent,
        channels=plan.channels,
        intensity=plan.intensity,
        labels=plan.labels,
        verbs=[verb for verb in VERBS if verb in networks.verbs],
        defaults=trained.defaults,
        training=Training(
            dataset=dataset.name,
            cases=subsets.counts,
            patients=subsets.patients,
            autoencoder_steps=plan.autoencoder_training.steps,
            denoiser_steps=plan.denoiser_training.steps,
            seconds=sum(history[-1].get("seconds", 0.0) for history in histories.values() if history),
            hardware=_hardware(),
            init=init,
        ),
        licence=dataset.licence or "unknown: the training data's licence was not stated",
        citation=[dataset.reference] if dataset.reference else [],
        files={},
        versions=_versions(),
    )


def _fingerprint(
    dataset: Dataset, subsets: Subsets, private: Path, progress: Progress, keep: bool
) -> Fingerprint:
    file = private / "fingerprint.json"
    if file.exists():
        return Fingerprint.model_validate_json(file.read_text())
    fingerprint = take_fingerprint(dataset, [case.name for case in subsets.train], progress)
    if keep:
        atomic_write_text(file, fingerprint.model_dump_json(indent=2) + "\n")
    return fingerprint


def _refuse_other_plan(settled: Plan, asked: Plan | None, file: Path) -> None:
    if asked is None or asked == settled:
        return
    old, new = _flat(settled.model_dump()), _flat(asked.model_dump())
    lines = [
        f"  {k}: {old.get(k)} there, {new.get(k)} asked"
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k)
    ]
    raise DiffaugError(
        f"{file} holds another plan than the one given:\n"
        + "\n".join(lines)
        + "\nUse another --output, or the same plan."
    )


def _refuse_other_options(settled: Plan, **given: Any) -> None:
    own = {
        "architecture": settled.architecture,
        "preset": getattr(settled, "preset", None),
        "name": settled.name,
        "mirror_axes": settled.augmentation.mirror_axes,
        "seed": settled.seed,
        "budget": settled.budget,
    }
    if wrong := {key: value for key, value in given.items() if value is not None and value != own[key]}:
        lines = [f"  {key}: {own[key]!r} in the plan, {value!r} given" for key, value in wrong.items()]
        raise DiffaugError(
            "the plan decides, and says otherwise:\n"
            + "\n".join(lines)
            + "\nLeave the option out, or edit the plan before a fit begins."
        )


def _check_start(settled: Plan, start: Generator | None) -> None:
    """The weights to start from are part of the plan, and have its networks."""
    if settled.init is not None and start is None:
        raise DiffaugError(
            f"the plan starts from the weights {settled.init}: say with --init which generator that is"
        )
    if start is not None and settled.init != start.weights_hash:
        planned = f"the weights {settled.init}" if settled.init else "random weights"
        raise DiffaugError(
            f"the plan starts from {planned}, {start.name} has {start.weights_hash}: leave --init out, or "
            "use another --output"
        )
    if start is not None:
        networks = start.card.networks
        if networks.architecture != settled.architecture:
            raise DiffaugError(
                f"cannot start from {start.name}: it is a {networks.architecture} generator, the plan is for "
                f"{settled.architecture}"
            )
        parts = [part for part in type(networks).model_fields if part in type(settled).model_fields]
        if other := [part for part in parts if getattr(settled, part) != getattr(networks, part)]:
            raise DiffaugError(
                f"cannot start from {start.name}: its {', '.join(other)} is of another size than the plan's; "
                "make the plan with --init, or leave --init out"
            )


def _tell(figures: dict[str, Any], progress: Progress) -> None:
    """Show the figures of a finished fit, and warn of one that is of no use."""
    for key, value in figures.items():
        progress.note(f"{key}: {value}")
    if figures.get("label_round_trip_dice", 1) < USELESS or figures.get("segment_dice", 1) < USELESS:
        progress.note(
            f"Warning: a Dice below {USELESS} on validation cases: the generator has not learned its labels. "
            "Before you build with it train longer: in another --output, with more steps in the plan or a "
            "larger --budget, perhaps with --init and this one's folder."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _check_plan(plan: Plan, dataset: Dataset) -> None:
    problems = plan.problems()
    if plan.channels != list(dataset.channels):
        problems.append(f"channels are {plan.channels}, the dataset has {list(dataset.channels)}")
    expected = dataset.labels if plan.architecture == DEFAULT_ARCHITECTURE else {}
    if plan.labels != expected:
        problems.append(f"labels are {plan.labels}, {plan.architecture} with this dataset needs {expected}")
    if problems:
        raise DiffaugError("the plan does not fit:\n" + "\n".join(f"  {p}" for p in problems))


def _check_same_scans(file: Path, subsets: Subsets) -> None:
    """An interrupted fit goes on only with the files it began with."""
    hashes = {
        "train": file_hashes(subsets.train),
        "validation": file_hashes(subsets.validation),
    }
    if not file.exists():
        atomic_write_json(file, hashes)
        return
    before = read_json(file)
    changed = [
        name
        for subset in hashes
        for name in sorted(hashes[subset].keys() | before[subset].keys())
        if hashes[subset].get(name) != before[subset].get(name)
    ]
    if changed:
        raise DiffaugError(
            f"{len(changed)} case(s) were added, removed or changed since this fit began, first "
            f"{changed[:3]}: give another "
            f"--output, or put the files back (their hashes are in {file})"
        )


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    import platform

    import diffaug

    return {
        "diffaug": diffaug.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
