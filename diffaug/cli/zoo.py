"""``diffaug zoo``: which generators there are, and getting them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffaug.cli.monai_checkpoints import LatentWindow, Shape, Spacing, parse_geometry

if TYPE_CHECKING:
    from diffaug.zoo.catalogue import Listed

zoo_app = typer.Typer(no_args_is_help=True, help="Generators by name: list, look at, get, and name your own.")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@zoo_app.command("list")
def list_generators(as_json: _Json = False) -> None:
    """List the generators there are: bundled, pulled, registered, and those that can be pulled."""
    from diffaug.zoo.catalogue import catalogue

    found = catalogue()
    if as_json:
        typer.echo(json.dumps([_plain(each) for each in found]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("name", no_wrap=True)
    for title in ("makes", "grid", "verbs", "weights", "memory", "licence", "commercial", "here"):
        table.add_column(title)
    for each in found:
        table.add_row(
            each.name,
            each.makes,
            f"{_times(each.shape)}, {_spacing(each.spacing)} mm",
            " ".join(verb for verb in each.verbs if verb not in ("encode", "decode")),
            _size(each.weights_bytes),
            _size(each.memory_bytes),
            # What licences add to their names is in `zoo show`.
            re.split(r"[:(]", each.licence)[0].strip(),
            _yes(each.commercial_use),
            each.state,
        )
    console = Console()
    # A table that is piped or on a narrow terminal keeps its names whole.
    console.width = max(console.width, 120)
    console.print(table)


@zoo_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="Name, or a generator's folder.")], as_json: _Json = False
) -> None:
    """Show what is known of a generator: grid, verbs, parameters, licence, citation, files."""
    from diffaug.zoo.catalogue import describe

    found = describe(name)
    if as_json:
        typer.echo(json.dumps(_plain(found)))
        return
    lines = {
        "makes": found.makes,
        "grid": f"{_times(found.shape)} voxels of {_spacing(found.spacing)} mm",
        "extent": found.extent,
        "verbs": ", ".join(found.verbs),
        "parameters": "; ".join(f"{key}: {text}" for key, text in found.parameters.items()) or "none",
        "labels": ", ".join(f"{key} {text}" for key, text in found.labels.items())
        or ("those of label_dict.json, and 200 body" if "paint" in found.verbs else "none"),
        "weights": _size(found.weights_bytes),
        "memory": f"about {_size(found.memory_bytes)} at this grid",
        "licence": found.licence,
        "commercial use": _yes(found.commercial_use),
        "redistribution": _yes(found.redistribution),
        "citation": "; ".join(found.citation),
        "here": found.state,
        "folder": str(found.folder or "-"),
        "files": "; ".join(f"{key} ({text})" for key, text in found.files.items()),
    }
    width = max(map(len, lines))
    typer.echo("\n".join(f"{key:<{width}}  {text}" for key, text in {"name": found.name, **lines}.items()))


@zoo_app.command("pull")
def pull_generator(
    name: Annotated[str, typer.Argument(help="Of a published generator.")],
    accept_unpinned: Annotated[
        bool,
        typer.Option(
            "--accept-unpinned",
            help="Take files without a published hash; that of what comes is checked ever after.",
        ),
    ] = False,
    shape: Shape = None,
    spacing: Spacing = None,
    window: LatentWindow = None,
) -> None:
    """Download a published generator and import it; broken downloads go on where they stopped.

    Files come from where they were published, or from DIFFAUG_ZOO_MIRROR: a folder or URL.
    """
    from diffaug.zoo.pulling import pull

    folder = pull(
        name,
        accept_unpinned=accept_unpinned,
        geometry=parse_geometry(shape, spacing, window),
        say=lambda note: typer.echo(note, err=True),
    )
    typer.echo(folder)


@zoo_app.command("where")
def where(
    name: Annotated[str | None, typer.Argument(help="Of a generator.", show_default="the zoo itself")] = None,
) -> None:
    """Print the folder of a generator, or of all that was pulled (DIFFAUG_ZOO)."""
    from diffaug.zoo import folder_of
    from diffaug.zoo.home import home

    typer.echo(home() if name is None else folder_of(name))


@zoo_app.command("register")
def register_folder(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A generator's folder.")],
    name: Annotated[
        str | None, typer.Option(help="Under which it loads.", show_default="the name on its card")
    ] = None,
) -> None:
    """Let a generator of your own load by a name; its folder stays where it is."""
    from diffaug.zoo.catalogue import register_own

    typer.echo(register_own(folder, name))


@zoo_app.command("unregister")
def unregister_folder(name: Annotated[str, typer.Argument(help="That was registered.")]) -> None:
    """Forget the name of a generator of your own; its folder stays."""
    from diffaug.zoo.home import unregister

    unregister(name)


def _plain(found: "Listed") -> dict[str, Any]:
    plain = found._asdict()
    return plain | {"folder": str(found.folder) if found.folder else None}


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _spacing(spacing: tuple[float, ...]) -> str:
    same = len(set(spacing)) == 1
    return f"{spacing[0]:g}" if same else " x ".join(f"{n:g}" for n in spacing)


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not stated"}[value]
