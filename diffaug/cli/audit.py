"""``diffaug audit``: does a synthetic dataset copy, is it true to life, and is it varied?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffaug.errors import DatasetError

if TYPE_CHECKING:
    from diffaug.audit.auditing import Part
    from diffaug.datasets.reading import Dataset

_FOLDER = {"exists": True, "file_okay": False}
_FILE = {"exists": True, "dir_okay": False}


def audit(
    synthetic: Annotated[Path, typer.Argument(**_FOLDER, help="Folder of the dataset to audit.")],
    train: Annotated[
        Path,
        typer.Option(
            **_FOLDER, help="Dataset that the generator was fitted to; with a split, its training cases."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="Folder of report.html and report.json.")
    ],
    holdout: Annotated[
        Path | None,
        typer.Option(
            **_FOLDER,
            help="Dataset of other patients' scans; with a split, those that are no training cases.",
            show_default="the held-out cases of --train",
        ),
    ] = None,
    holdout_subset: Annotated[
        list[str] | None,
        typer.Option(help="Only this subset of the split, validation or test; may be repeated."),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            **_FILE,
            help="JSON file: case names of train, validation, test; of a fit that drew its own, "
            "splits.json in its private folder.",
            show_default="splits.json in each dataset, if any",
        ),
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(
            **_FILE, help="CSV with the columns case and patient.", show_default="patients.csv in each"
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of volumes and encoder, for the next audit against the same scans; it holds scans.",
            show_default="private in the output",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            **_FILE, help="CSV with a column case and one per feature: a feature space of your own."
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="A network of MONAI's as feature space: resnet10, resnet18, resnet34 or resnet50."),
    ] = None,
    network_weights: Annotated[
        Path | None, typer.Option(**_FILE, help="The network's state dict, safetensors or torch's.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            **_FOLDER, help="Folder of the generator that made SYNTHETIC: put the verdicts on its card."
        ),
    ] = None,
    utility: Annotated[
        bool,
        typer.Option(
            "--utility", help="Also train segmenters, on synthetic and on real cases (minutes more)."
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as JSON, instead of its page's path.")
    ] = False,
) -> None:
    """Audit SYNTHETIC for copies of training scans, for fidelity and for diversity.

    Everything is compared with scans of patients that the generator never saw: give as many as you can, 40
    patients or more. Writes report.html, which explains itself and shows suspected copies beside the scans
    that they resemble, and report.json. Prints the path of the page; the verdicts go to stderr.
    """
    import torch

    from diffaug.audit.auditing import Options, Part
    from diffaug.audit.auditing import audit as run
    from diffaug.audit.carding import check_card, put_on_card
    from diffaug.datasets.reading import read_dataset
    from diffaug.progress import Progress

    if (network is None) != (network_weights is None):
        raise typer.BadParameter("--network and --network-weights go together: give both, or none")
    dataset = read_dataset(train, patients=patients, split=split)
    others = dataset if holdout is None else read_dataset(holdout, patients=patients)
    training = Part(dataset, dataset.training_cases)
    held_out = _held_out_part(others, holdout_subset, dataset if holdout is None else None)
    progress = Progress()
    if card is not None:
        check_card(card, synthetic, training.cases, held_out.cases, progress)
    report = run(
        Part.whole(synthetic),
        training,
        held_out,
        output,
        cache=cache,
        options=Options(
            features=features,
            network=(network, network_weights) if network and network_weights else None,
            utility=utility,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        ),
        progress=progress,
    )
    if card is not None:
        put_on_card(card, synthetic, report)
    for verdict in report.verdicts:
        progress.note(f"{verdict.answer:7} {verdict.question} {verdict.found}")
    typer.echo(report.model_dump_json() if as_json else output / "report.html")


def _held_out_part(dataset: "Dataset", subsets: list[str] | None, training: "Dataset | None") -> "Part":
    """The cases of the named subsets, or of all but the training one; all cases without a split."""
    from diffaug.audit.auditing import Part

    if dataset.split is None:
        if training is not None:
            raise DatasetError(
                [
                    f"{dataset.root} has no split that says which cases were held out: give --split FILE "
                    "(that of a fit is splits.json in its private folder), or --holdout FOLDER"
                ]
            )
        if subsets:
            raise DatasetError(
                [f"{dataset.root} has no split: leave --holdout-subset out, or add splits.json"]
            )
        return Part(dataset, dataset.cases)
    unknown = [name for name in subsets or [] if name not in ("validation", "test")]
    if unknown:
        raise typer.BadParameter(f"--holdout-subset is validation or test, not {unknown[0]}")
    chosen = {name for subset in subsets or ("validation", "test") for name in dataset.split[subset]}
    return Part(dataset, [case for case in dataset.cases if case.name in chosen])
