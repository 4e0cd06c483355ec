"""``diffaug import`` and ``diffaug export``: generators from and to other people's checkpoint files."""

from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

import_app = typer.Typer(no_args_is_help=True, help="Make a generator of other people's checkpoints.")
export_app = typer.Typer(no_args_is_help=True, help="Write a generator as checkpoints of other software.")


class Weights(StrEnum):
    """The two sets of weights in a denoiser's checkpoint."""

    EMA = "ema"
    MODEL = "model"


class Preset(StrEnum):
    """Networks whose grid and intensities are known."""

    DIFFTUMOR = "difftumor"


class Extent(StrEnum):
    """What the volumes show: one structure in its box, or a piece of any place."""

    OBJECT = "object"
    PATCH = "patch"


class Outside(StrEnum):
    """What images show beyond the end of a scan."""

    MIRROR = "mirror"
    BACKGROUND = "background"


class Axis(StrEnum):
    """The grid's axes, in their order."""

    I = "I"
    J = "J"
    K = "K"


# A plane's axes keep their order.
_NETWORK_AXES = {Axis.I: (0, 1, 2), Axis.J: (1, 0, 2), Axis.K: (2, 0, 1)}


def parse_numbers(text: str, example: str, option: str) -> tuple[float, ...]:
    """As many comma-separated numbers as the example has; raises BadParameter for anything else."""
    count = len(example.split(","))
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(isfinite, numbers)):
        raise typer.BadParameter(
            f"{text!r} is not {count} numbers; write them like {example}", param_hint=option
        )
    return numbers


@import_app.command("medical-diffusion")
def import_medical_diffusion(
    denoiser: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The denoiser's file, such as model-78.pt.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="New folder of the generator.")
    ],
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The VQ-GAN's Lightning file, such as latest_checkpoint.ckpt.",
            show_default="the copy in --denoiser",
        ),
    ] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="Whose networks they are: settles what files do not say.")
    ] = None,
    weights: Annotated[
        Weights, typer.Option(help="The denoiser's averaged weights (ema), or the others.")
    ] = Weights.EMA,
    shape: Annotated[
        str | None, typer.Option(metavar="I,J,K", help="Voxels of the volumes that the networks make.")
    ] = None,
    spacing: Annotated[str | None, typer.Option(metavar="I,J,K", help="Size of a voxel, in mm.")] = None,
    orientation: Annotated[
        str | None, typer.Option(metavar="CODES", help="Where the axes point.", show_default="RAS")
    ] = None,
    depth_axis: Annotated[
        Axis | None,
        typer.Option(
            help="Which axis is the networks' depth; the others are height and width.", show_default="K"
        ),
    ] = None,
    outside: Annotated[
        Outside | None,
        typer.Option(
            help="What scans smaller than the grid have beyond their end: a mirror image, or -1.",
            show_default="mirror",
        ),
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOW,HIGH", help="Values (such as HU) that are -1 and 1 to the networks; one a channel."
        ),
    ] = None,
    percentiles: Annotated[
        str | None,
        typer.Option(metavar="LOW,HIGH", help="Or percentiles of each volume; 0,100 is its own range."),
    ] = None,
    typical: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="With --percentiles: their values in volumes made from nothing; one a channel.",
            show_default="0,1000",
        ),
    ] = None,
    channel: Annotated[
        list[str] | None, typer.Option(help="Name of a channel; may be repeated.", show_default="CT or MR")
    ] = None,
    extent: Annotated[
        Extent | None, typer.Option(help="One structure, or a piece of any place.", show_default="object")
    ] = None,
    downsampling: Annotated[
        str | None,
        typer.Option(metavar="D,H,W", help="Of the VQ-GAN.", show_default="what --autoencoder says"),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(min=1, help="Of the VQ-GAN's group norm.", show_default="what --autoencoder says"),
    ] = None,
    padding: Annotated[
        str | None, typer.Option(help="Of the VQ-GAN's encoder.", show_default="what --autoencoder says")
    ] = None,
    denoiser_groups: Annotated[
        int | None, typer.Option(min=1, help="Of the U-Net's group norm.", show_default="8")
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option("--clip/--no-clip", help="Samplers clip the clean latent.", show_default="clip"),
    ] = None,
    bfloat16: Annotated[
        bool | None,
        typer.Option(
            "--bfloat16/--float32",
            help="Compute in mixed precision where the hardware has it: faster, not the original's numbers.",
            show_default="float32",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ancestral (not without clipping), ddim or dpm-solver++.",
            show_default="ancestral; ddim without clipping",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler.", show_default="all if ancestral")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name on the card.", show_default="the output folder's name")
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights and of what they make.", show_default="unknown")
    ] = None,
    citation: Annotated[
        list[str] | None, typer.Option(help="Whom to cite; may be repeated.", show_default="Khader et al.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="What the networks were trained on.", show_default="unknown")
    ] = None,
) -> None:
    """Make a generator of Medical Diffusion's or DiffTumor's checkpoints.

    Sizes are read from the files. What no file says (grid, intensities, sometimes more) is asked for, with
    the choices. Nothing in the files is executed.
    """
    from pydantic import ValidationError

    from diffaug.zoo.medical_diffusion import Choices
    from diffaug.zoo.medical_diffusion import import_medical_diffusion as convert
    from diffaug.zoo.medical_diffusion.choices import problems

    try:
        choices = Choices.model_validate(
            {
                "shape": shape and parse_numbers(shape, "64,64,64", "--shape"),
                "spacing": spacing and parse_numbers(spacing, "1,1,1", "--spacing"),
                "orientation": orientation and tuple(orientation.upper()),
                "axes": depth_axis and _NETWORK_AXES[depth_axis],
                "outside": outside,
                "intensity": _intensity(window or [], percentiles, typical or []),
                "channels": channel,
                "extent": extent,
                "downsampling": downsampling and parse_numbers(downsampling, "2,2,2", "--downsampling"),
                "groups": groups,
                "padding": padding,
                "denoiser_groups": denoiser_groups,
                "clip": clip,
                "bfloat16": bfloat16,
                "sampler": sampler,
                "steps": steps,
                "licence": licence,
                "citation": citation,
                "dataset": dataset,
            }
        )
    except ValidationError as error:
        raise typer.BadParameter(problems(error, "--")) from error
    generator = convert(
        denoiser,
        output,
        autoencoder=autoencoder,
        weights=weights.value,
        preset="difftumor" if preset else None,
        name=name,
        choices=choices,
    )
    typer.echo(generator.card.description, err=True)
    typer.echo(output)


@export_app.command("medical-diffusion")
def export_medical_diffusion(
    generator: Annotated[
        str, typer.Argument(help="Name of a generator in the zoo, or a generator's folder.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="New folder of the checkpoint files.")
    ],
) -> None:
    """Write a medical-diffusion GENERATOR as vqgan.ckpt and model-0.pt, in the authors' layout."""
    from diffaug import zoo
    from diffaug.zoo.medical_diffusion import export_medical_diffusion as convert

    for note in convert(zoo.load(generator), output):
        typer.echo(note, err=True)
    typer.echo(output)


def _intensity(window: list[str], percentiles: str | None, typical: list[str]) -> Any:
    """The intensity convention that the options say; None for none of them."""
    from diffaug.zoo.medical_diffusion import choices

    if window and (percentiles or typical):
        raise typer.BadParameter("--window goes with neither --percentiles nor --typical: give one of them")
    if typical and not percentiles:
        raise typer.BadParameter("--typical goes with --percentiles: say which, such as 0,100")
    if window:
        return choices.window([_pair(text, "--window") for text in window])
    if percentiles:
        pairs = [_pair(text, "--typical") for text in typical] or [(0.0, 1000.0)]
        low, high = _pair(percentiles, "--percentiles")
        if not 0 <= low < 50 < high <= 100:
            raise typer.BadParameter(
                f"{percentiles!r} must be a percentile below 50 and one above", param_hint="--percentiles"
            )
        return choices.percentiles(low, high, pairs)
    return None


def _pair(text: str, option: str) -> tuple[float, float]:
    low, high = parse_numbers(text, "0,100", option)
    if low >= high:
        raise typer.BadParameter(f"{text!r} must be the lower number, then the higher", param_hint=option)
    return low, high
