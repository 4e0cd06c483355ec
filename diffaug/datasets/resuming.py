"""What a build that is under way leaves in its folder, so that it can go on after it was killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from diffaug.datasets.manifest import MANIFEST, CaseRecord, Manifest, read_manifest
from diffaug.errors import DiffaugError

STATE = ".diffaug-build.jsonl"


def read_state(output: Path) -> tuple[Manifest | None, bool]:
    """The manifest of a build in `output`, and whether it is complete; of one that is not, the cases so far.

    Raises:
        DiffaugError: the folder holds something else.
    """
    if not output.exists():
        return None, False
    if not output.is_dir():
        raise DiffaugError(f"{output} is a file: give a folder")
    if (output / MANIFEST).is_file():
        return read_manifest(output / MANIFEST), True
    if (output / STATE).is_file():
        return _parse_state(output / STATE), False
    found = sorted(path.name for path in output.iterdir() if path.name != f".tmp-{STATE}")
    if found:
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise DiffaugError(
            f"{output} is not empty and holds no build of diffaug, but {shown}: give a new folder"
        )
    return None, False


def _parse_state(path: Path) -> Manifest:
    """The header and the cases of a state file; a line that was not written whole is left out."""
    first, *rest = path.read_bytes().split(b"\n")
    try:
        header = Manifest.model_validate_json(first)
    except ValidationError as error:
        raise DiffaugError(
            f"{path} is damaged, or of another version of diffaug: delete the folder to build anew"
        ) from error
    cases = []
    for line in rest:
        with suppress(ValidationError):
            cases.append(CaseRecord.model_validate_json(line))
    return header.model_copy(update={"cases": cases})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second process from building in `folder`; the lock goes when this one ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DiffaugError(f"another process is building in {folder}: wait for it, or end it") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)
