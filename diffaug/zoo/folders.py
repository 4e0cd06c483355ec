"""Folders that come into being whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffaug.errors import DiffaugError


def check_new(output: Path) -> None:
    """Raise a DiffaugError where `output` exists and is no empty folder."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise DiffaugError(f"{output} exists and is no empty folder: give another one, or remove it first")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`, which takes its name when the block ends without an error.

    Raises:
        DiffaugError: `output` exists and is no empty folder.
    """
    check_new(output)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".tmp-{output.name}")
    # What a killed process left.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
