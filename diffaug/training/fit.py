"""`fit`: from a labelled dataset to a generator, by itself; interrupted, the same call goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from diffaug.datasets.checking import check_dataset
from diffaug.datasets.manifest import versions
from diffaug.datasets.reading import Dataset
from diffaug.datasets.training_scans import FILE as TRAINING_SCANS
from diffaug.datasets.training_scans import record_training_scans
from diffaug.errors import DiffaugError
from diffaug.files import PRIVATE, atomic_write_json, atomic_write_text, read_json, sha256_file
from diffaug.generators.card import Card, CardGrid, Training
from diffaug.generators.generator import Generator
from diffaug.generators.verbs import VERBS
from diffaug.progress import Progress
from diffaug.training.architectures import CITATIONS, Plan, make_plan, read_plan, train
from diffaug.training.cases import VALIDATION_PLACES, Canvases, check_extents, make_canvases
from diffaug.training.checks import (
    check_options,
    check_perceptual,
    check_plan,
    check_same_plan,
    check_same_scans,
    check_start,
)
from diffaug.training.closing import closing_audit
from diffaug.training.fingerprint import Fingerprint, file_hashes, take_fingerprint
from diffaug.training.medical_diffusion.perceptual import load_lpips
from diffaug.training.medical_diffusion.presets import find_preset
from diffaug.training.planning import Request
from diffaug.training.processes import decide, make_accelerator
from diffaug.training.report import validation_report
from diffaug.training.subsets import Subsets, split_cases
from diffaug.training.trained import Trained
from diffaug.zoo import load

DEFAULT_ARCHITECTURE = "joint-flow"
PRESET_ARCHITECTURE = "medical-diffusion"
DESCRIPTIONS = {
    "joint-flow": "Joint image and label flow-matching generator",
    "medical-diffusion": "Medical Diffusion generator (VQ-GAN and diffusion, without labels)",
}
DEFAULT_BUDGET = 4 * 3600.0
# Dice of label round trips or of `segment` below which a generator makes labels that are worth nothing.
USELESS = 0.5
# Noise loss above which a denoiser makes noise: 0.8 is none found; a useful one has less than 0.2.
USELESS_NOISE = 0.4
# Steps of a denoiser below which a plan is warned of.
FEW_STEPS = 500
_README = """Stays with you: this folder holds your scans (canvases, latents), checkpoints, and
training_scans.json, the salted hashes by which diffaug recognises the scans that trained this generator.
The folder above may be shared without it, once you have examined what the generator makes.
"""


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
    extent: Literal["object", "patch"] | None = None,
    seed: int | None = None,
    device: str | None = None,
    audit: bool = True,
    progress: Progress | None = None,
) -> Plan | Generator:
    """Check, plan, train, measure, save and audit; returns the generator, or for a dry run the plan.

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
        extent: "object" (default) for a generator that makes one structure in its box, or "patch" for one
            that makes texture anywhere, in windows that share their noise: for volumes too large for one
            grid.
        audit: whether to end with an audit of 100 samples (about ten minutes on two cores for the
            hippocampus), where at least eight training and eight held-out patients are there.
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
    if perceptual and architecture == "joint-flow":
        raise DiffaugError("joint-flow has no perceptual loss, medical-diffusion has: leave --perceptual out")
    hashes = _perceptual_hashes(perceptual)
    saved_plan, asked_plan = output / "plan.json", read_plan(plan) if plan else None
    if asked_plan is not None and asked_plan.init is None and start is not None:
        asked_plan = asked_plan.model_copy(update={"init": start.weights_hash})
    if (output / "card.json").exists() and not (private / "files.json").exists():
        raise DiffaugError(f"{output} holds a generator that was not fitted there: give another --output")
    settled = read_plan(saved_plan) if saved_plan.exists() and not dry_run else asked_plan
    if settled is not None:
        check_same_plan(settled, asked_plan, saved_plan)
        check_start(settled, start)
        check_options(
            settled,
            architecture=architecture,
            preset=preset,
            name=name,
            mirror_axes=mirror_axes,
            seed=seed,
            budget=budget,
            extent=extent,
        )
    subsets = split_cases(dataset, settled.seed if settled else seed or 0)
    with progress.task("checking cases", total=len(dataset.cases)) as task:
        check_dataset(dataset, lambda _: task.advance())
    if not dataset.patients_given:
        progress.note("No patient table was given: each case is taken for its own patient.")

    if settled is None:

        def plan_it() -> Plan:
            request = Request(
                name=name or output.resolve().name,
                fingerprint=_fingerprint(dataset, subsets, private, progress, keep=not dry_run),
                channels=dataset.channels,
                labels=dataset.labels,
                budget=DEFAULT_BUDGET if budget is None else budget,
                mirror_axes=mirror_axes,
                seed=seed or 0,
                init=start,
                preset=preset,
                perceptual=hashes,
                extent=extent or "object",
            )
            with progress.console.status("timing training steps"):
                planned = make_plan(architecture or DEFAULT_ARCHITECTURE, request, accelerator)
            if planned.denoiser_training.steps < FEW_STEPS:
                progress.note(
                    f"Warning: a budget of {planned.budget:.0f} s buys {planned.denoiser_training.steps} "
                    "steps of the denoiser here; a useful fit needs thousands: take a larger --budget, or a "
                    "faster machine."
                )
            if preset is None and start is None:
                _tell_coarser(planned, request.fingerprint, progress)
            return planned

        settled = decide(accelerator, plan_it)
    elif (recipe := getattr(settled, "preset", None)) is not None and not saved_plan.exists():

        def check_recipe() -> None:
            fingerprint = _fingerprint(dataset, subsets, private, progress, keep=not dry_run)
            find_preset(recipe).check(fingerprint, dataset.channels)

        decide(accelerator, check_recipe)
    check_plan(settled, dataset, accelerator)
    check_extents(settled, [*subsets.train, *subsets.validation])
    check_perceptual(settled, hashes)
    if settled.autoencoder_training.steps == 0 and start is None:
        raise DiffaugError("autoencoder_training.steps is 0: say with init whose autoencoders to keep")
    if dry_run:
        return settled

    def close() -> None:
        closing_audit(output, dataset, subsets, private, accelerator.device.type, progress)

    if (output / "card.json").exists():
        check_same_scans(private / "files.json", subsets)
        if audit and Generator.load(output).card.audit is None:
            decide(accelerator, close)
        progress.note(f"{output} is complete already")
        return Generator.load(output)

    def read_cases() -> tuple[Canvases, Canvases]:
        return (
            make_canvases(settled, subsets.train, private / "training", progress),
            make_canvases(
                settled, subsets.validation, private / "validation", progress, places=VALIDATION_PLACES
            ),
        )

    def begin() -> None:
        private.mkdir(parents=True, exist_ok=True)
        check_same_scans(private / "files.json", subsets)
        atomic_write_text(private / "README.txt", _README)
        if not saved_plan.exists():
            atomic_write_text(saved_plan, settled.model_dump_json(indent=2) + "\n")
        # The split that was drawn, for an audit.
        names = {name: [case.name for case in getattr(subsets, name)] for name in ("train", "validation")}
        if dataset.split is None:
            atomic_write_json(private / "splits.json", names)
        sidecar = private / TRAINING_SCANS
        if not sidecar.exists():
            atomic_write_json(sidecar, record_training_scans(subsets.train, progress))
        read_cases()

    decide(accelerator, begin)
    training, validation = read_cases()
    trained = train(settled, training, validation, private, accelerator, progress, start, perceptual)
    card = make_card(
        settled,
        trained,
        dataset,
        subsets,
        init=start.weights_hash if start else None,
        fingerprint=_fingerprint(dataset, subsets, private, progress, keep=accelerator.is_main_process),
    )
    generator = Generator(card, trained.model, json.loads(settled.model_dump_json()))
    if accelerator.is_main_process:
        atomic_write_json(output / "history.json", trained.histories)
        figures = validation_report(generator, subsets.validation, trained, output, private, progress)
        unlike = figures.get("reconstruction_error", {}).get("unlike_above")
        generator.card = generator.card.model_copy(update={"figures": figures, "unlike_above": unlike})
        generator.save(output)
        _tell(figures, progress)
    if audit:
        decide(accelerator, close)
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


def make_card(
    plan: Plan,
    trained: Trained,
    dataset: Dataset,
    subsets: Subsets,
    *,
    init: str | None,
    fingerprint: Fingerprint,
) -> Card:
    """The card of a freshly fitted generator; figures and file hashes come when it is measured and saved."""
    networks, histories = trained.networks, trained.histories
    labelled = sum(case.label is not None for case in subsets.train)
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
        label_volumes={
            label: (volumes[1], volumes[3])
            for label, volumes in fingerprint.label_volumes_mm3.items()
            if label in plan.labels
        },
        verbs=[verb for verb in VERBS if verb in networks.verbs],
        defaults=trained.defaults,
        training=Training(
            dataset=dataset.name,
            cases=subsets.counts,
            patients=subsets.patients,
            labelled=labelled if 0 < labelled < len(subsets.train) else None,
            autoencoder_steps=plan.autoencoder_training.steps,
            denoiser_steps=plan.denoiser_training.steps,
            seconds=sum(history[-1].get("seconds", 0.0) for history in histories.values() if history),
            hardware=_hardware(),
            init=init,
        ),
        licence=dataset.licence or "unknown: the training data's licence was not stated",
        citation=[*([dataset.reference] if dataset.reference else []), *CITATIONS[plan.architecture]],
        files={},
        versions=versions(),
    )


def _fingerprint(
    dataset: Dataset, subsets: Subsets, private: Path, progress: Progress, keep: bool
) -> Fingerprint:
    """The fingerprint of the training cases, or the one that an earlier call kept of the same files."""
    file, hashes = private / "fingerprint.json", file_hashes(subsets.train)
    if file.exists():
        kept = read_json(file)
        # One of an earlier version, with other fields, is taken anew.
        if kept.get("files") == hashes and kept["fingerprint"].keys() == Fingerprint.model_fields.keys():
            return Fingerprint.model_validate(kept["fingerprint"])
    fingerprint = take_fingerprint(dataset, [case.name for case in subsets.train], progress)
    if keep:
        atomic_write_json(file, {"files": hashes, "fingerprint": fingerprint.model_dump(mode="json")})
    return fingerprint


def _tell_coarser(plan: Plan, fingerprint: Fingerprint, progress: Progress) -> None:
    """Say so where the grid is coarser than the scans."""
    sizes = plan.grid.spacing, fingerprint.spacing_median
    if any(a > 1.01 * b for a, b in zip(*sizes, strict=True)):
        planned, own = (" x ".join(f"{s:.3g}" for s in each) for each in sizes)
        progress.note(
            f"The grid's voxels are {planned} mm, the median scan's {own} mm: finer ones would not fit."
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
    if figures.get("noise_loss", 0) > USELESS_NOISE:
        progress.note(
            f"Warning: a noise loss above {USELESS_NOISE} on validation cases (0.8 is no noise found): the "
            "denoiser has learned next to nothing, and what it makes is noise. Train longer: in another "
            "--output, with more steps in the plan or a larger --budget."
        )


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
