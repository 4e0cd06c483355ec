"""``diffaug nnunet``: what connects a bank with nnU-Net's own commands."""

from pathlib import Path
from typing import Annotated

import typer

from diffaug.cli.options import LabelMapping, parse_mapping

nnunet_app = typer.Typer(no_args_is_help=True, help="Train nnU-Net with variations.")


@nnunet_app.command("trainer-dir")
def trainer_dir() -> None:
    """Print the folder of the trainers: export nnUNet_extTrainer=$(diffaug nnunet trainer-dir)."""
    import diffaug

    typer.echo(Path(diffaug.__file__).parent / "nnunet" / "shim")


@nnunet_app.command("prepare")
def prepare(
    dataset: Annotated[str, typer.Argument(help="Id or name of the dataset in nnU-Net, such as 4.")],
    bank: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Bank of the raw dataset, for nnUNetTrainerDiffAug."),
    ] = None,
    generator: Annotated[
        str | None, typer.Option(help="Name or folder of a generator, for nnUNetTrainerDiffAugGPU.")
    ] = None,
    plans: Annotated[
        str | None,
        typer.Option(help="As for nnUNetv2_train, with a bank.", show_default="nnUNetPlans"),
    ] = None,
    configuration: Annotated[
        str | None,
        typer.Option(help="As for nnUNetv2_train, with a bank.", show_default="3d_fullres"),
    ] = None,
    probability: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="That a variation comes instead of a training case, or of a patch.",
            show_default="0.5 from a bank, 0.3 by a generator",
        ),
    ] = None,
    strength: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Strengths, with a generator.", show_default="the card's"),
    ] = None,
    label_mapping: LabelMapping = None,
    training_scans: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Record of the scans that trained the generator: training_scans.json of its fit.",
            show_default="that of the generator, where it is at hand",
        ),
    ] = None,
) -> None:
    """Tell the trainers what varies DATASET: a bank, which is preprocessed as cases are, or a generator.

    Run nnUNetv2_plan_and_preprocess first. Interrupted, the same command goes on. Prints the file of the
    settings, diffaug.json beside the preprocessed data.
    """
    from diffaug.nnunet.preparing import prepare_bank, prepare_online
    from diffaug.progress import Progress

    if (bank is None) == (generator is None):
        raise typer.BadParameter("give either --bank or --generator")
    for_other: dict[str, object] = {"plans": plans, "configuration": configuration}
    if bank is not None:
        for_other = {"strength": strength, "label-mapping": label_mapping}
    if given := [name for name, value in for_other.items() if value is not None]:
        other = "--generator" if bank is not None else "--bank"
        raise typer.BadParameter(f"--{given[0]} goes with {other} (a bank has been made with its own)")
    name = int(dataset) if dataset.isdecimal() else dataset
    if bank is not None:
        done = prepare_bank(
            name,
            bank,
            plans=plans or "nnUNetPlans",
            configuration=configuration or "3d_fullres",
            probability=0.5 if probability is None else probability,
            training_scans=training_scans,
            progress=Progress(),
        )
        typer.echo(f"{done.made} variations preprocessed, {done.kept} kept from before", err=True)
        _tell(done.trained_generator)
        typer.echo(done.settings)
        return
    file, choice = prepare_online(
        name,
        str(generator),
        probability=0.3 if probability is None else probability,
        strength=strength,
        label_mapping=parse_mapping(label_mapping, generator),
        training_scans=training_scans,
        progress=Progress(),
    )
    _tell(choice.trained_generator)
    typer.echo(file)


@nnunet_app.command("pretrain-recipe")
def pretrain_recipe(
    finetuning: Annotated[
        str, typer.Argument(help="Id or name of the dataset that is trained on in the end; planned already.")
    ],
    pretraining: Annotated[
        str, typer.Argument(help="Id or name of the dataset that comes first, such as a synthetic one.")
    ],
    plans: Annotated[str, typer.Option(help="Plans of FINETUNING.")] = "nnUNetPlans",
    configuration: Annotated[str, typer.Option(help="That will be trained.")] = "3d_fullres",
    processes: Annotated[int, typer.Option(min=1, help="Of the preprocessing.")] = 1,
) -> None:
    """Preprocess PRETRAINING by the plans of FINETUNING, so that one network fits both.

    Prints the two commands that follow: training on the one, and training on the other from its weights.
    """
    import contextlib
    import sys

    from diffaug.nnunet.recipe import prepare_pretraining

    first, second = (int(name) if name.isdecimal() else name for name in (finetuning, pretraining))
    # nnU-Net talks on stdout, which is for the commands alone.
    with contextlib.redirect_stdout(sys.stderr):
        recipe = prepare_pretraining(
            first, second, plans=plans, configuration=configuration, processes=processes
        )
    typer.echo("\n".join(recipe.commands))


def _tell(trained: list[str] | None) -> None:
    """What the leak guard knows."""
    if trained is None:
        typer.echo("it is unknown which scans trained the generator: give --training-scans", err=True)
    elif trained:
        typer.echo(
            f"{len(trained)} cases trained the generator: the trainer refuses to validate on them", err=True
        )
