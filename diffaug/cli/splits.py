"""``diffaug splits``: folds in which nothing validates that was seen in training."""

from pathlib import Path
from typing import Annotated

import typer

_FOLDER = {"exists": True, "file_okay": False}
_FILE = {"exists": True, "dir_okay": False}


def splits(
    dataset: Annotated[Path, typer.Argument(**_FOLDER, help="Folder of the dataset, such as in nnUNet_raw.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            dir_okay=False,
            help="JSON file, for nnU-Net splits_final.json in the preprocessed dataset's folder.",
        ),
    ],
    folds: Annotated[int, typer.Option(min=2, help="Number of folds.")] = 5,
    generator: Annotated[
        str | None,
        typer.Option(help="Name or folder of a generator: what trained it, only trains."),
    ] = None,
    training_scans: Annotated[
        Path | None,
        typer.Option(
            **_FILE,
            help="Record of the scans that trained it: training_scans.json of its fit.",
            show_default="the generator's own",
        ),
    ] = None,
    synthetic: Annotated[
        list[Path] | None,
        typer.Option(
            **_FOLDER,
            help="Folder that diffaug build wrote, whose cases are in the dataset, too: they only train; may "
            "be repeated.",
        ),
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(
            **_FILE, help="CSV with the columns case and patient.", show_default="patients.csv in the dataset"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there; folds trained by it are lost.")
    ] = False,
) -> None:
    """Write folds by patient, in which neither synthetic cases nor scans that trained a generator validate.

    What was made from a real case trains only where that case's patient does. Prints the file.
    """
    from diffaug.datasets.folds import make_folds
    from diffaug.datasets.manifest import MANIFEST, read_manifest
    from diffaug.datasets.reading import read_dataset
    from diffaug.datasets.training_scans import trained_by, training_scans_of
    from diffaug.errors import DiffaugError
    from diffaug.files import atomic_write_json
    from diffaug.progress import Progress

    if output.exists() and not overwrite:
        raise DiffaugError(
            f"{output} is there already, and trainings may rest on it: give another --output, or --overwrite"
        )
    made_from = {}
    generators = set() if generator is None else {generator}
    for folder in synthetic or []:
        manifest = read_manifest(folder / MANIFEST)
        generators.add(manifest.settings.generator.name)
        for case in manifest.cases:
            made_from[case.name] = case.source.name if case.source else None
    read = read_dataset(dataset, patients=patients, without_patient=set(made_from))
    records = [] if training_scans is None else [training_scans]
    for name in sorted(generators) if training_scans is None else []:
        if record := training_scans_of(name):
            records.append(record)
        elif name == generator:
            raise DiffaugError(
                f"{name} has no record of the scans that trained it: give --training-scans, which its fit "
                "left in private"
            )
        else:
            typer.echo(
                f"which scans trained {name}, that made the synthetic cases, is unknown: if they are here, "
                "they may validate; give --generator FOLDER or --training-scans",
                err=True,
            )
    trained: list[str] = []
    for record in records:
        real = {case.name: list(case.images) for case in read.cases if case.name not in made_from}
        trained += trained_by(record, real, Progress())
    made = make_folds(read, folds, seed=seed, train_only=set(trained), made_from=made_from)
    atomic_write_json(output, made)
    validating = sum(len(fold["val"]) for fold in made)
    typer.echo(
        f"{len(read.cases)} cases: {validating} validate once each, {len(made_from)} synthetic ones and "
        f"{len(read.cases) - validating - len(made_from)} real ones only train",
        err=True,
    )
    typer.echo(output)
