"""The verbs on single files: ``diffaug sample``, ``paint``, ``vary``, ``inpaint``, ``segment``, ``encode``,
``decode``.

Each reads files, checks them, calls the Generator's verb of the same name, and writes what that gives.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, overload

import typer

from diffaug.cli.options import LabelMapping, ToldParameters, parse_mapping, parse_told

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from diffaug.cli.job import Job
    from diffaug.datasets.scans import Scan
    from diffaug.generators.card import Card
    from diffaug.generators.generator import Generator
    from diffaug.generators.grid import Box

_GeneratorName = Annotated[
    str, typer.Argument(help="Name of a generator in the zoo, or a generator's folder.", metavar="GENERATOR")
]
_Images = Annotated[
    list[Path],
    typer.Argument(
        exists=True,
        dir_okay=False,
        metavar="IMAGE",
        help="NIfTI file of the image; of several channels one file each, or one 4D file.",
    ),
]
_MadeImages = Annotated[
    list[Path],
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="NIfTI file to write; of several channels one 4D file, or repeated, one file each.",
    ),
]
_ChangedImages = Annotated[
    list[Path],
    typer.Option("--output", "-o", metavar="FILE", help="NIfTI file to write; repeated, one for each IMAGE."),
]
_Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")]
_Label = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="Its label map, on the same voxels: stays true."),
]
_Drift = Annotated[
    bool, typer.Option("--allow-label-drift", help="Do without a label that stays true: anatomy may move.")
]
_Box = Annotated[
    str | None,
    typer.Option(
        "--box",
        metavar="I0:I1,J0:J1,K0:K1",
        help="Where in a larger scan: half-open voxel bounds.",
        show_default="around the label",
    ),
]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
_Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Sampler steps.", show_default="the card's, or what is usual for the sampler"),
]
_Guidance = Annotated[
    float | None, typer.Option(min=0, help="Guidance on the label; 1 is none.", show_default="the card's")
]
_Sampler = Annotated[
    str | None, typer.Option(help="Sampler, of those that the generator has.", show_default="the card's")
]
_Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda.", show_default="the fastest there is")
]
_Force = Annotated[bool, typer.Option("--force", help="Replace outputs that exist.")]
_Json = Annotated[
    bool, typer.Option("--json", help="Print what was done, and by what, as JSON instead of the path.")
]


def parse_box(text: str) -> "Box":
    """The bounds in ``I0:I1,J0:J1,K0:K1``, such as ``10:50,0:56,4:44``; raises BadParameter for anything
    else."""
    match = re.fullmatch(",".join([r"(\d+):(\d+)"] * 3), text)
    if not match:
        raise typer.BadParameter(f"{text!r} is not a box; write it like 10:50,0:56,4:44")
    i0, i1, j0, j1, k0, k1 = map(int, match.groups())
    return (i0, i1), (j0, j1), (k0, k1)


def sample(
    generator: _GeneratorName,
    output: _MadeImages,
    label_output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="NIfTI file to write the label map to.")
    ] = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance: _Guidance = None,
    sampler: _Sampler = None,
    parameter: ToldParameters = None,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Make a case from nothing, on the generator's grid: an image and its label map."""
    from diffaug.cli.job import Job
    from diffaug.datasets.layouts import plain_nifti_bytes
    from diffaug.errors import LabelError

    job = Job(
        verb="sample",
        generator=generator,
        outputs=[*output, *([label_output] if label_output else [])],
        settings={
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "parameters": parse_told(parameter),
        },
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    _check_made_images(output, card)
    if label_output and not card.labels:
        raise LabelError(f"{card.name} knows no labels: leave out --label-output {label_output}")

    def make(loaded: "Generator") -> list[bytes]:
        made = loaded.sample(1, **job.settings)
        arrays = _arrays(made.image, output)
        if label_output:
            arrays.append(made.label[0, 0].numpy())
        return [plain_nifti_bytes(array, made.affine, _note(job, card)) for array in arrays]

    job.run(make)


def paint(
    generator: _GeneratorName,
    label: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, metavar="LABEL", help="NIfTI file of the label map."),
    ],
    output: _MadeImages,
    label_mapping: LabelMapping = None,
    box: _Box = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance: _Guidance = None,
    sampler: _Sampler = None,
    parameter: ToldParameters = None,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Make an image that shows the anatomy of a label map, on the label map's voxels."""
    from diffaug.cli.job import Job
    from diffaug.datasets.scans import nifti_beside, read_label

    job = Job(
        verb="paint",
        generator=generator,
        outputs=output,
        settings={
            "label_mapping": _mapping(label_mapping, label, generator),
            "box": _bounds(box),
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "parameters": parse_told(parameter),
        },
        inputs=[label],
        label=label,
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    _check_made_images(output, card)
    scan = read_label(label)
    _check_case(job, card, scan, scan.image)

    def make(loaded: "Generator") -> list[bytes]:
        painted = loaded.paint(_tensor(scan.image), scan.affine, **job.settings)
        return [nifti_beside(label, array, _note(job, card)) for array in _arrays(painted, output)]

    job.run(make)


def vary(
    generator: _GeneratorName,
    image: _Images,
    output: _ChangedImages,
    label: _Label = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="0 changes nothing, 1 keeps the label.", show_default="the card's"),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Write the plain decode, without the scan's own noise.")
    ] = False,
    allow_label_drift: _Drift = False,
    label_mapping: LabelMapping = None,
    box: _Box = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance: _Guidance = None,
    sampler: _Sampler = None,
    parameter: ToldParameters = None,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Make another image of the same anatomy.

    Shape, affine, header and voxel type stay as they are, and so do the voxels beyond the generator's grid.
    """
    from diffaug.cli.job import Job
    from diffaug.datasets.scans import read_label_of

    job = Job(
        verb="vary",
        generator=generator,
        outputs=output,
        settings={
            "strength": strength,
            "residual": not plain,
            "allow_label_drift": allow_label_drift,
            "label_mapping": _mapping(label_mapping, label, generator),
            "box": _bounds(box),
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "parameters": parse_told(parameter),
        },
        inputs=[*image, *([label] if label else [])],
        label=label,
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    _check_changed_images(output, image)
    scan = _read_image(image, card)
    anatomy = read_label_of(scan, label) if label else None
    _check_case(job, card, scan, anatomy)

    def make(loaded: "Generator") -> list[bytes]:
        varied = loaded.vary(_tensor(scan.image), _tensor(anatomy), scan.affine, **job.settings)
        return scan.with_voxels(varied[0].numpy())

    job.run(make)


def inpaint(
    generator: _GeneratorName,
    image: _Images,
    output: _ChangedImages,
    mask: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="NIfTI file: not 0 where the image is made anew."),
    ],
    label: _Label = None,
    allow_label_drift: _Drift = False,
    label_mapping: LabelMapping = None,
    box: _Box = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    guidance: _Guidance = None,
    sampler: _Sampler = None,
    parameter: ToldParameters = None,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Make a region anew and keep the rest.

    Shape, affine, header and voxel type stay as they are, and so do the voxels outside the mask.
    """
    from diffaug.cli.job import Job
    from diffaug.datasets.scans import read_label_of, read_mask_of
    from diffaug.errors import DiffaugError

    job = Job(
        verb="inpaint",
        generator=generator,
        outputs=output,
        settings={
            "allow_label_drift": allow_label_drift,
            "label_mapping": _mapping(label_mapping, label, generator),
            "box": _bounds(box),
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "parameters": parse_told(parameter),
        },
        inputs=[*image, mask, *([label] if label else [])],
        label=label,
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    _check_changed_images(output, image)
    scan = _read_image(image, card)
    region = read_mask_of(scan, mask)
    if not region.any():
        raise DiffaugError(f"{mask} is 0 everywhere: mark the voxels that are to be made anew")
    anatomy = read_label_of(scan, label) if label else None
    _check_case(job, card, scan, anatomy)

    def make(loaded: "Generator") -> list[bytes]:
        inpainted = loaded.inpaint(
            _tensor(scan.image), _tensor(region), _tensor(anatomy), scan.affine, **job.settings
        )
        return scan.with_voxels(inpainted[0].numpy())

    job.run(make)


def segment(
    generator: _GeneratorName,
    image: _Images,
    output: _Output,
    box: _Box = None,
    seed: _Seed = 0,
    steps: _Steps = None,
    sampler: _Sampler = None,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Write the generator's own opinion of an image's labels, on the image's voxels."""
    from diffaug.cli.job import Job
    from diffaug.datasets.scans import nifti_beside

    job = Job(
        verb="segment",
        generator=generator,
        outputs=[output],
        settings={"box": _bounds(box), "seed": seed, "steps": steps, "sampler": sampler},
        inputs=image,
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    scan = _read_image(image, card)
    _check_case(job, card, scan)

    def make(loaded: "Generator") -> list[bytes]:
        labels = loaded.segment(_tensor(scan.image), scan.affine, **job.settings)
        return [nifti_beside(image[0], labels[0, 0].numpy(), _note(job, card))]

    job.run(make)


def encode(
    generator: _GeneratorName,
    image: _Images,
    output: _Output,
    box: _Box = None,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Write the latent of an image, as a .safetensors file."""
    from diffaug.cli.job import Job
    from diffaug.generators.latents import latent_bytes

    job = Job(
        verb="encode",
        generator=generator,
        outputs=[output],
        settings={"box": _bounds(box)},
        inputs=image,
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    scan = _read_image(image, card)
    _check_case(job, card, scan)

    def make(loaded: "Generator") -> list[bytes]:
        return [latent_bytes(loaded.encode(_tensor(scan.image), scan.affine, **job.settings), loaded)]

    job.run(make)


def decode(
    generator: _GeneratorName,
    latent: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, metavar="LATENT", help="What encode wrote."),
    ],
    output: _MadeImages,
    device: _Device = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Make the image of a latent, on the generator's grid."""
    from diffaug.cli.job import Job
    from diffaug.datasets.layouts import plain_nifti_bytes
    from diffaug.generators.latents import read_latent

    job = Job(
        verb="decode",
        generator=generator,
        outputs=output,
        settings={},
        inputs=[latent],
        device=device,
        force=force,
        as_json=as_json,
    )
    card = job.check()
    _check_made_images(output, card)
    stored = read_latent(latent)

    def make(loaded: "Generator") -> list[bytes]:
        arrays = _arrays(loaded.decode(stored.of(loaded)), output)
        return [plain_nifti_bytes(array, loaded.grid.affine, _note(job, card)) for array in arrays]

    job.run(make)


COMMANDS: tuple[Callable[..., None], ...] = (sample, paint, vary, inpaint, segment, encode, decode)


def _mapping(given: list[str] | None, label: Path | None, generator: str) -> dict[int, int] | None:
    if given and not label:
        raise typer.BadParameter(
            "it renames the ids of --label: give that, too", param_hint="--label-mapping"
        )
    return parse_mapping(given, generator)


def _bounds(text: str | None) -> "Box | None":
    return None if text is None else parse_box(text)


def _check_made_images(outputs: Sequence[Path], card: "Card") -> None:
    """Refuse a number of files in which the generator's images cannot be written."""
    from diffaug.errors import DiffaugError

    if len(outputs) not in (1, len(card.channels)):
        raise DiffaugError(
            f"{card.name} makes images of {len(card.channels)} channels ({', '.join(card.channels)}), but "
            f"--output is given {len(outputs)} times: give it once, or once per channel"
        )


def _check_changed_images(outputs: Sequence[Path], images: Sequence[Path]) -> None:
    from diffaug.errors import DiffaugError

    if len(outputs) != len(images):
        raise DiffaugError(
            f"--output is given {len(outputs)} times for {len(images)} image files: give one for each"
        )


def _read_image(files: Sequence[Path], card: "Card") -> "Scan":
    """The image, with the generator's number of channels."""
    from diffaug.datasets.scans import read_scan
    from diffaug.errors import DiffaugError

    scan = read_scan(files)
    if len(scan.image) != len(card.channels):
        raise DiffaugError(
            f"{', '.join(map(str, files))}: {len(scan.image)} channels, but {card.name} works on "
            f"{len(card.channels)} ({', '.join(card.channels)}): give one file per channel, or one 4D file"
        )
    return scan


def _check_case(job: "Job", card: "Card", scan: "Scan", label: "np.ndarray | None" = None) -> None:
    """Refuse, before the weights are loaded, what the card says that the verb cannot take."""
    import numpy as np
    import torch

    from diffaug.generators.cases import require_label
    from diffaug.generators.grid import place
    from diffaug.generators.labels import Vocabulary

    with job.explained():
        if job.settings.get("allow_label_drift") is False:
            require_label(card, label is not None)
        if label is not None and card.labels:
            ids = torch.from_numpy(np.unique(label))
            Vocabulary(card.labels).indices(ids, job.settings["label_mapping"])
        box = job.settings.get("box")
        # Without a label or box, inpainting takes place around its mask.
        if job.verb != "inpaint" or box or label is not None:
            foreground = None if label is None else torch.from_numpy(label[0] != 0)
            place(card.to_grid(), scan.image.shape[1:], scan.affine, foreground=foreground, box=box)


@overload
def _tensor(array: "np.ndarray") -> "Tensor": ...
@overload
def _tensor(array: "np.ndarray | None") -> "Tensor | None": ...
def _tensor(array: "np.ndarray | None") -> "Tensor | None":
    """A batch of one."""
    import torch

    return None if array is None else torch.from_numpy(array)[None]


def _arrays(image: "Tensor", outputs: Sequence[Path]) -> "list[np.ndarray]":
    """The arrays of the files in which an image `(1, C, I, J, K)` is written."""
    channels = image[0].numpy()
    if len(outputs) == len(channels):
        return list(channels)
    return [channels.transpose(1, 2, 3, 0)]


def _note(job: "Job", card: "Card") -> str:
    """The description in the headers of files that are all made."""
    return f"synthetic: {card.name} {job.verb}"
