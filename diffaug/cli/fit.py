"""``diffaug fit``: fit a generator to a labelled dataset."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class Architecture(StrEnum):
    """What can be fitted."""

    JOINT_FLOW = "joint-flow"
    MEDICAL_DIFFUSION = "medical-diffusion"


class Preset(StrEnum):
    """Published recipes that can be fitted."""

    KNEE_MRNET = "knee-mrnet"
    BRAIN_ADNI = "brain-adni"
    BREAST_DUKE = "breast-duke"
    CHEST_LIDC = "chest-lidc"


class Extent(StrEnum):
    """What a generator makes."""

    OBJECT = "object"
    PATCH = "patch"


class Axis(StrEnum):
    """Anatomical axes along which a mirrored case is still a plausible one, or none of them."""

    NONE = "none"
    LEFT_RIGHT = "left-right"
    POSTERIOR_ANTERIOR = "posterior-anterior"
    INFERIOR_SUPERIOR = "inferior-superior"


# Axes of a grid in RAS orientation.
_GRID_AXES = {Axis.LEFT_RIGHT: 0, Axis.POSTERIOR_ANTERIOR: 1, Axis.INFERIOR_SUPERIOR: 2}


def parse_duration(text: str) -> float:
    """Seconds in a duration such as ``4h``, ``90m`` or ``1d12h``; raises BadParameter for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or seconds <= 0:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 4h, 90m or 1d12h")
    return seconds


def fit(
    dataset: Annotated[
        Path,
        typer.Argument(
            exists=True,
            file_okay=False,
            help="Folder in the decathlon's layout or nnU-Net raw; any folder with --images and --labels.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", file_okay=False, help="Folder of the generator; the same again resumes."
        ),
    ],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images, in DATASET or elsewhere, for data in no known layout."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Folder of label maps named as the images.")] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            help="JSON file: case names of train, validation, test.",
            show_default="DATASET/splits.json, if any",
        ),
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns case and patient.",
            show_default="DATASET/patients.csv, if any, else one case a patient",
        ),
    ] = None,
    architecture: Annotated[
        Architecture | None,
        typer.Option(
            help="Images and label maps together, or the VQ-GAN and diffusion of Khader et al. 2023, which "
            "know no labels.",
            show_default="joint-flow, or the preset's",
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="Grid, intensities and down-sampling of a data set of Khader et al. 2023; implies their "
            "architecture."
        ),
    ] = None,
    perceptual: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Weights of LPIPS for medical-diffusion: the file of VGG16 and that of the linear heads, or "
            "a .ckpt of the original; may be repeated.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="Training time to plan for, such as 90m or 1d12h.", show_default="4h"
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Train by this (edited) plan.json.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    init: Annotated[
        str | None,
        typer.Option(help="Start from the weights of this generator: a name in the zoo, or a folder."),
    ] = None,
    mirror: Annotated[
        list[Axis] | None,
        typer.Option(
            help="Mirror cases along this axis at random; may be repeated.",
            show_default="the preset's, or none",
        ),
    ] = None,
    extent: Annotated[
        Extent | None,
        typer.Option(help="One structure in its box, or patches of larger volumes.", show_default="object"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name on the card.", show_default="the output folder's name")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of everything random.", show_default="0")
    ] = None,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit/--no-audit",
            help="End with an audit: do samples copy training scans?",
        ),
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
    ] = None,
) -> None:
    """Fit a generator to the labelled scans of DATASET.

    Checks every file, plans the networks and the training from the data, the machine and the budget, trains,
    measures, writes the card, and audits what it makes. Interrupted at any moment, the same command goes on
    where it stopped.
    """
    from diffaug.datasets.reading import read_dataset
    from diffaug.training.fit import fit_generator
    from diffaug.training.plan import PlanBase

    result = fit_generator(
        read_dataset(dataset, images=images, labels=labels, split=split, patients=patients),
        output,
        architecture=architecture.value if architecture else None,
        preset=preset.value if preset else None,
        perceptual=perceptual or (),
        name=name,
        budget=None if budget is None else parse_duration(budget),
        plan=plan,
        dry_run=dry_run,
        init=init,
        mirror_axes=_mirror_axes(mirror),
        extent=extent.value if extent else None,
        seed=seed,
        device=device,
        audit=audit,
    )
    if isinstance(result, PlanBase):
        typer.echo(result.model_dump_json(indent=2))
    else:
        typer.echo(output)


def _mirror_axes(axes: list[Axis] | None) -> tuple[int, ...] | None:
    if not axes:
        return None
    if Axis.NONE in axes and len(set(axes)) > 1:
        raise typer.BadParameter("none goes with no other axis", param_hint="--mirror")
    return tuple(sorted({_GRID_AXES[axis] for axis in axes if axis is not Axis.NONE}))
