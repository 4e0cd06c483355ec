"""``diffaug bank``: variations made ahead of training."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from diffaug.cli.options import LabelMapping, parse_mapping

bank_app = typer.Typer(
    no_args_is_help=True, help="Make variations ahead of training, for transforms to draw."
)


class OperationName(StrEnum):
    """What is done to each case."""

    VARIATION = "variation"
    INPAINTING = "inpainting"
    REPAINT = "repaint"


class Region(StrEnum):
    """Regions that inpainting makes anew."""

    ELLIPSOID = "ellipsoid"
    BOX = "box"
    LABEL = "label"
    AROUND = "around"


@bank_app.command("build")
def build_bank(
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Dataset with label maps; with a split, its training cases."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", file_okay=False, help="Folder of the bank; the same again resumes."),
    ],
    generator: Annotated[
        str, typer.Option(help="Name of a generator in the zoo, or a folder that fit wrote.")
    ] = "hippocampus-mr",
    per_case: Annotated[int, typer.Option(min=1, help="Variations of each case.")] = 8,
    operation: Annotated[
        OperationName, typer.Option(help="Vary, inpaint a region, or deform and repaint.")
    ] = OperationName.VARIATION,
    strength: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Strengths of variation, 0 to 1.", show_default="the card's"),
    ] = None,
    region: Annotated[
        Region | None, typer.Option(help="What inpainting makes anew.", show_default="ellipsoid")
    ] = None,
    labels: Annotated[
        list[int] | None,
        typer.Option(help="A label id that the regions label and around are about; may be repeated."),
    ] = None,
    amplitude: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Largest displacement of repaint, mm.",
            show_default="2 to 7.5 % of the grid",
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="One that the generator's architecture has.", show_default="the card's"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps.", show_default="the card's")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance on the label.", show_default="the card's")
    ] = None,
    label_mapping: LabelMapping = None,
    allow_label_drift: Annotated[
        bool, typer.Option("--allow-label-drift", help="Also where no label map is kept true.")
    ] = False,
    split: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON file: case names of train, validation, test; or nnU-Net's splits_final.json.",
            show_default="splits.json in the dataset, if any",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bank.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
    ] = None,
) -> None:
    """Make PER_CASE variations of every training case, on its own grid and in its own units.

    Training then draws them at memory-map speed, without the generator: RandomFromBank in TorchIO,
    RandFromBankd in MONAI. Interrupted at any moment, the same command goes on. Prints the bank's folder.
    """
    import torch

    from diffaug.bank import building
    from diffaug.datasets.reading import read_dataset
    from diffaug.progress import Progress

    ranges: dict[OperationName, dict[str, Any]] = {
        OperationName.VARIATION: {"strength": strength},
        OperationName.INPAINTING: {"region": region and region.value, "labels": labels},
        OperationName.REPAINT: {"amplitude": amplitude},
    }
    for other, own in ranges.items():
        if other is not operation and (given := [name for name, value in own.items() if value is not None]):
            raise typer.BadParameter(f"--{given[0]} is for --operation {other.value}, not {operation.value}")
    made = building.OPERATIONS[operation.value](
        generator,
        **{name: value for name, value in ranges[operation].items() if value is not None},
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        label_mapping=parse_mapping(label_mapping, generator),
        allow_label_drift=allow_label_drift,
    )
    done = building.build_bank(
        made,
        read_dataset(data, split=split),
        output,
        per_case=per_case,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        progress=Progress(),
    )
    typer.echo(f"{done.made + done.kept} cases: {done.made} made, {done.kept} kept from before", err=True)
    typer.echo(output)
