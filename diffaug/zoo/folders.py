"""Folders that come into being whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffaug.errors import DiffaugError


def check_new(output: Path) -> None:
    """Raise a DiffaugError where `output` exists and is no empty folder, or cannot be made."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DiffaugError(f"{output} exists and is no empty folder: give another one, or remove it first")
    parent = next(each for each in output.absolute().parents if each.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise DiffaugError(f"{output} cannot be made, since {parent} is no folder to write in")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`, which takes its name when the block ends without an error.

    Raises:
        DiffaugError: `output` exists and is no empty folder, or cannot be made.
    """
    check_new(output)
    output = output.resolve()
    temporary = output.with_name(f".tmp-{output.name}")
    # What a killed process left.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DiffaugError(f"{output} cannot be made: {error}") from error
    try:
        yield temporary
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
