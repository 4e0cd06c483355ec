"""``diffaug pretrain``: a segmentation network pretrained on synthetic cases, or on real ones."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class MethodName(StrEnum):
    """What a stage learns."""

    SUPERVISED = "supervised"
    MASKED = "masked"
    SWIN = "swin"


class NetworkName(StrEnum):
    """Networks of MONAI, nnU-Net and segmentation-models-pytorch-3d."""

    DYNUNET = "dynunet"
    SEGRESNET = "segresnet"
    UNET = "unet"
    SWINUNETR = "swinunetr"
    NNUNET = "nnunet"
    SMP3D = "smp3d"


def pretrain(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", file_okay=False, help="Folder of the weights; the same again resumes."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Dataset, synthetic or real; of one with a split its training cases. May be repeated.",
        ),
    ] = None,
    generator: Annotated[
        list[str] | None,
        typer.Option(help="Name or folder of a generator whose samples are streamed. May be repeated."),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Share of each source, datasets first; repeated as often as there are sources.",
            show_default="equal ones",
        ),
    ] = None,
    method: Annotated[
        list[MethodName] | None,
        typer.Option(
            help="Pairs of image and label (supervised), or images alone: masked autoencoding, or the "
            "self-supervision of Swin UNETR (swin); repeated: one after the other.",
            show_default="supervised",
        ),
    ] = None,
    network: Annotated[NetworkName, typer.Option(help="Which network.")] = NetworkName.DYNUNET,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="Of the network, as name=JSON, such as filters=[32,64,128]; may be repeated."),
    ] = None,
    plans: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="nnU-Net's plans file, for --network nnunet."),
    ] = None,
    configuration: Annotated[str, typer.Option(help="Of the plans file.")] = "3d_fullres",
    steps: Annotated[int, typer.Option(min=1, help="Of each method.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Patches a step.")] = 2,
    learning_rate: Annotated[float, typer.Option(help="The largest one.")] = 1e-3,
    reuse: Annotated[int, typer.Option(min=1, help="How often a streamed sample is drawn.")] = 4,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Of voxels, mm.", metavar="I J K", show_default="median of the data"),
    ] = None,
    patch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            help="Voxels that the network sees at once.",
            metavar="I J K",
            show_default="median size, at most 64^3",
        ),
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="Intensities, such as HU, that become -1 and 1.",
            metavar="LOW HIGH",
            show_default="each case standardised",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Pretrain a segmentation network on synthetic cases, from a folder or straight from a generator.

    Writes weights.safetensors, what MONAI, nnU-Net and segmentation-models-pytorch-3d load, curves.png, and a
    record of sources and licences. Interrupted at any moment, the same command goes on. Prints the weights'
    path.
    """
    import torch

    from diffaug.datasets.reading import read_dataset
    from diffaug.pretraining.plan import Stage
    from diffaug.pretraining.preparing import Asked, make_plan, read_material
    from diffaug.pretraining.pretrain import check_output
    from diffaug.pretraining.pretrain import pretrain as run
    from diffaug.progress import Progress
    from diffaug.segmentation.networks import NetworkPlan
    from diffaug.segmentation.training import Schedule
    from diffaug.training.processes import make_accelerator
    from diffaug.zoo import load

    settings = _settings(setting or [])
    if (network is NetworkName.NNUNET) != (plans is not None):
        raise typer.BadParameter("--plans FILE goes with --network nnunet, and with no other")
    if plans is not None:
        settings |= {"plans": str(plans.absolute()), "configuration": configuration}
    if learning_rate <= 0:
        raise typer.BadParameter(f"--learning-rate must be above 0, got {learning_rate:g}")
    schedule = Schedule(steps=steps, batch=batch, learning_rate=learning_rate)
    datasets = [read_dataset(folder) for folder in data or []]
    generators = [load(name) for name in generator or []]
    asked = Asked(
        network=NetworkPlan(kind=network.value, settings=settings),
        stages=[Stage(method=m.value, schedule=schedule) for m in method or [MethodName.SUPERVISED]],
        datasets=datasets,
        generators=generators,
        shares=share,
        reuse=reuse,
        spacing=spacing,
        patch=patch,
        window=window,
        seed=seed,
    )
    plan = make_plan(asked)
    if dry_run:
        typer.echo(plan.model_dump_json(indent=2))
        return
    check_output(plan, output)
    progress = Progress()
    accelerator = make_accelerator(device)
    for one in generators:
        if torch.device(accelerator.device).type != "cpu":
            one.to(accelerator.device)
    material = read_material(plan, datasets, generators, progress)
    typer.echo(run(plan, material, output, accelerator, progress))


def _settings(pairs: list[str]) -> dict[str, Any]:
    """From `name=JSON`; what is no JSON is text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--setting is name=JSON, such as filters=[32,64,128], not {pair!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
