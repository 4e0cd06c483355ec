"""Writing files whole or not at all, reading JSON, and hashing."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffaug.errors import DiffaugError

# Folder, in an output that may be shared, of what must not be.
PRIVATE = "private"


@contextmanager
def atomic_paths(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[Path]]:
    """Give temporary paths to write to, which take the names `paths` when the block ends without an error.

    All are on the disk before the first takes its name, so that what can go wrong with contents has gone
    wrong by then. A temporary file lies in the same folder (made where it does not exist), starts with a dot
    and keeps the ending, by which libraries choose a format (`.nii.gz`). Its name depends on the path alone,
    so that the next attempt overwrites what a killed process left; so a file must have one writer at a time.

    Args:
        paths: the files to write.

    Yields:
        The temporary paths, where the block must create files; on an error `paths` stay as they were.
    """
    targets = [Path(path) for path in paths]
    temporaries = [target.with_name(f".tmp-{target.name}") for target in targets]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # Some libraries create files that only their owner can read.
            temporary.chmod(0o666 & ~_umask())
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`atomic_paths` for a single file."""
    with atomic_paths([path]) as (temporary,):
        yield temporary


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8 with the line ends it has, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def atomic_write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` to `path` as indented JSON, whole or not at all.

    Raises:
        TypeError: something in it has no JSON form.
        ValueError: it holds NaN or an infinity, which JSON does not have.
    """
    atomic_write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        DiffaugError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DiffaugError(f"{path} cannot be read as JSON: {error}") from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits; the file is never held in memory whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
