"""The ``diffaug`` command.

One module per subcommand; none imports anything heavy at the top, so that ``diffaug --help`` answers at once.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffaug.cli.allocator import keep_freed_memory
from diffaug.cli.audit import audit
from diffaug.cli.bank import bank_app
from diffaug.cli.benchmark import benchmark
from diffaug.cli.build import build
from diffaug.cli.checkpoints import export_app, import_app
from diffaug.cli.fit import fit
from diffaug.cli.monai_checkpoints import import_maisi, import_monai_bundle
from diffaug.cli.nnunet import nnunet_app
from diffaug.cli.pretrain import pretrain
from diffaug.cli.splits import splits
from diffaug.cli.verbs import COMMANDS
from diffaug.cli.wording import with_options
from diffaug.cli.zoo import zoo_app
from diffaug.errors import DiffaugError
from diffaug.version import __version__


class _Commands(TyperGroup):
    """Subcommands that end with a message, not with a traceback, where the user's input is at fault."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DiffaugError as error:
            typer.secho(f"diffaug: {with_options(str(error))}", err=True, fg=typer.colors.RED)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False)
app.command()(fit)
app.command()(build)
app.command()(audit)
app.command()(splits)
app.command()(pretrain)
app.command()(benchmark)
app.add_typer(bank_app, name="bank")
app.add_typer(nnunet_app, name="nnunet")
import_app.command("monai-bundle")(import_monai_bundle)
import_app.command("maisi")(import_maisi)
app.add_typer(zoo_app, name="zoo")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")
for verb in COMMANDS:
    app.command(rich_help_panel="Verbs on single files")(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffaug {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Generate and augment labelled 3D medical images with diffusion models."""
    keep_freed_memory()
