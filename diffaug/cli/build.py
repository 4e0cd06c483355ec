"""``diffaug build``: write a synthetic dataset."""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diffaug.cli.options import LabelMapping, ToldParameters, parse_mapping, parse_told


class Verb(StrEnum):
    """What each case is made by."""

    SAMPLE = "sample"
    PAINT = "paint"
    VARY = "vary"


class Layout(StrEnum):
    """Folder layouts that can be written."""

    NNUNET = "nnunet"
    DECATHLON = "decathlon"


def build(
    generator: Annotated[
        str, typer.Argument(help="Name of a generator in the zoo, or a folder that fit wrote.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", file_okay=False, help="Folder of the dataset; the same again resumes."
        ),
    ],
    cases: Annotated[int, typer.Option(min=1, help="Number of cases to make.")],
    verb: Annotated[
        Verb, typer.Option(help="Sample new anatomy, paint images for label maps, or vary real cases.")
    ] = Verb.SAMPLE,
    source: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of label maps (paint) or dataset folder (vary)."
        ),
    ] = None,
    layout: Annotated[Layout, typer.Option(help="nnU-Net raw or the decathlon's layout.")] = Layout.NNUNET,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the dataset; a case's own seed is derived from it.")
    ] = 0,
    sampler: Annotated[
        str | None,
        typer.Option(help="One that the generator's architecture has.", show_default="the card's"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Sampler steps.", show_default="the card's, or what is usual for the sampler"
        ),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance on the label.", show_default="the card's")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="Strength of vary.", show_default="the card's")
    ] = None,
    parameter: ToldParameters = None,
    label_mapping: LabelMapping = None,
    allow_label_drift: Annotated[
        bool,
        typer.Option(
            "--allow-label-drift",
            help="Vary with a generator that knows no labels: label maps are copied, the anatomy may move.",
        ),
    ] = False,
    reject_copies: Annotated[
        bool,
        typer.Option(
            "--reject-copies",
            help="Make again what resembles a training scan, or lies beyond the range of real ones.",
        ),
    ] = False,
    detector: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Copy detector that an audit wrote, for --reject-copies.",
            show_default="the generator's own",
        ),
    ] = None,
    segmenter: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Independent segmenter (of an audit with --utility) that labels must agree with, for "
            "--reject-copies.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Cases made at once; does not change their bytes.")
    ] = 8,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
    ] = None,
    nnssl: Annotated[
        bool,
        typer.Option("--nnssl", help="Also write pretrain_data.json, which nnssl reads."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was done as JSON, instead of the folder.")
    ] = False,
) -> None:
    """Write a synthetic dataset of CASES cases made by GENERATOR.

    Images and, where the generator knows labels, label maps are NIfTI files; manifest.json records where each
    case comes from, under which licence, and how to make it again; montage.png shows the first cases.
    Interrupted at any moment, the same command goes on where it stopped. Prints the folder of the dataset;
    all else goes to stderr.
    """
    import torch

    from diffaug.datasets.building import build_dataset
    from diffaug.progress import Progress
    from diffaug.zoo import folder_of, load

    if not reject_copies and (detector or segmenter):
        raise typer.BadParameter("--detector and --segmenter are for --reject-copies: give that, too")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(generator).to(device)
    progress = Progress()
    if note := loaded.card.audit_note(rejecting=reject_copies):
        progress.note(note)
    inspector = None
    if reject_copies:
        from diffaug.audit.inspection import find_detector, inspect_by

        own = detector or find_detector(folder_of(generator), loaded.name)
        inspector = inspect_by(loaded, own, segmenter, allow_label_drift=allow_label_drift)
    done = build_dataset(
        loaded,
        output,
        cases=cases,
        verb=verb.value,
        source=source,
        layout=layout.value,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        strength=strength,
        label_mapping=parse_mapping(label_mapping, generator),
        allow_label_drift=allow_label_drift,
        parameters=parse_told(parameter),
        batch_size=batch_size,
        inspector=inspector,
        progress=progress,
    )
    if nnssl:
        from diffaug.datasets.nnssl import write_nnssl
        from diffaug.datasets.reading import read_dataset

        write_nnssl(read_dataset(done.output))
    for path in done.repaired:
        typer.echo(f"{path} was missing or altered and was made again", err=True)
    if done.rejected:
        counts = ", ".join(f"{name} {count}" for name, count in done.rejected.items())
        typer.echo(f"candidates rejected and made again: {counts}", err=True)
    if done.cut:
        typer.echo(
            f"{len(done.cut)} cases: the label reaches beyond the generator's grid and was cut off there "
            "with the image; manifest.json says by how much",
            err=True,
        )
    if not done.made and not done.repaired:
        typer.echo(f"complete already: {done.cases} cases, all hashes right, nothing to do", err=True)
    else:
        typer.echo(f"{done.cases} cases: {done.made} made, {done.kept} kept from before", err=True)
    typer.echo(json.dumps({**asdict(done), "output": str(done.output)}) if as_json else done.output)
