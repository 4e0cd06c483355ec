"""``diffaug import monai-bundle`` and ``maisi``: generators from the files of MONAI's and NVIDIA's."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from diffaug.zoo.monai.importing import Geometry, Imported

Number = TypeVar("Number", int, float)


class Bundle(StrEnum):
    """Published bundles whose grid, units and licence are known."""

    BRATS = "brats-flair-ldm"
    BRAIN = "brain-t1-ldm"


class Maisi(StrEnum):
    """Published generators of the MAISI family."""

    CT = "maisi-ct"
    FLOW_CT = "nv-generate-ct"
    MR = "nv-generate-mr"
    BRAIN = "nv-generate-mr-brain"


_Output = Annotated[
    Path, typer.Option("--output", "-o", file_okay=False, help="New folder of the generator.")
]
Shape = Annotated[
    str | None,
    typer.Option(metavar="I,J,K", help="Voxels of the volumes to make.", show_default="as published"),
]
Spacing = Annotated[
    str | None, typer.Option(metavar="I,J,K", help="Size of a voxel, in mm.", show_default="as published")
]
LatentWindow = Annotated[
    str | None,
    typer.Option(
        metavar="I,J,K",
        help="Points of the latent that the autoencoder works on at once, to save memory.",
        show_default="all",
    ),
]
_Name = Annotated[str | None, typer.Option(help="Name on the card.", show_default="the output folder's name")]


def import_monai_bundle(
    bundle: Annotated[Path, typer.Argument(exists=True, help="The bundle's folder, or the zip of one.")],
    output: _Output,
    template: Annotated[
        Bundle | None,
        typer.Option(help="Whose grid, units and licence it has.", show_default="found by its networks"),
    ] = None,
    shape: Shape = None,
    spacing: Spacing = None,
    window: LatentWindow = None,
    name: _Name = None,
) -> None:
    """Make a generator of a MONAI BUNDLE of a latent diffusion model.

    Networks are those that the bundle's configuration defines; what no file says is a template's. Nothing in
    the bundle is executed.
    """
    from diffaug.zoo.monai import import_monai_bundle as convert

    geometry = parse_geometry(shape, spacing, window)
    chosen = template.value if template else None
    _tell(convert(bundle, output, template=chosen, geometry=geometry, name=name), output)


def import_maisi(
    autoencoder: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="The autoencoder's file, such as autoencoder_v1.pt."),
    ],
    denoiser: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="The U-Net's file, such as diff_unet_3d_rflow-ct.pt."),
    ],
    template: Annotated[Maisi, typer.Option(help="Which generator it is.")],
    output: _Output,
    control: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="ControlNet's file: the generator then paints label maps."
        ),
    ] = None,
    label_dict: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="With --control: label_dict.json, which names its ids."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSON with definitions of networks other than the published."
        ),
    ] = None,
    shape: Shape = None,
    spacing: Spacing = None,
    window: LatentWindow = None,
    name: _Name = None,
) -> None:
    """Make a generator of the files of MAISI or NV-Generate.

    Nothing in the files is executed.
    """
    from diffaug.zoo.monai import import_maisi as convert

    made = convert(
        autoencoder,
        denoiser,
        output,
        template=template.value,
        control=control,
        label_dict=label_dict,
        config=config,
        geometry=parse_geometry(shape, spacing, window),
        name=name,
    )
    _tell(made, output)


def parse_geometry(shape: str | None, spacing: str | None, window: str | None) -> "Geometry":
    """What the three options say; raises BadParameter for what is no three numbers."""
    from diffaug.zoo.monai.importing import Geometry

    return Geometry(
        _three(shape, "--shape", int), _three(spacing, "--spacing", float), _three(window, "--window", int)
    )


def _three(
    text: str | None, option: str, kind: Callable[[str], Number]
) -> tuple[Number, Number, Number] | None:
    """Three numbers above 0, or None; raises BadParameter for anything else."""
    if text is None:
        return None
    try:
        i, j, k = (kind(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not I,J,K", param_hint=option) from error
    if not all(0 < n < float("inf") for n in (i, j, k)):
        raise typer.BadParameter(f"{text!r} must be above 0", param_hint=option)
    return i, j, k


def _tell(made: "Imported", output: Path) -> None:
    notes: Iterable[str] = [made.generator.card.description, f"licence: {made.generator.card.licence}"]
    for note in [*notes, *made.notes]:
        typer.echo(note, err=True)
    typer.echo(output)
