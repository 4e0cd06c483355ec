"""A bundle's folder, or the zip of one, of which only plain files are taken."""

import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from diffaug.errors import CardError

# What is read of a zip: weights and configurations. Anything else in it, such as code, stays there.
_TAKEN = {".pt", ".pth", ".json"}


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The bundle's folder: `path`, or where the zip `path` is unpacked for as long as the block lasts.

    Raises:
        CardError: it is neither, or a file would leave the folder.
    """
    if path.is_dir():
        yield path
        return
    if not zipfile.is_zipfile(path):
        raise CardError(f"{path} is neither a bundle's folder nor a zip of one")
    with TemporaryDirectory(prefix="diffaug-bundle-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                _check_room(archive, Path(folder), path)
                for member in archive.infolist():
                    _take(archive, member, Path(folder), path)
        # Damaged, encrypted, of another compression, or with names that clash.
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError) as error:
            raise CardError(f"{path} cannot be unpacked: {error}") from error
        tops = list(Path(folder).iterdir())
        yield tops[0] if len(tops) == 1 and tops[0].is_dir() else Path(folder)


def find(folder: Path, *names: str) -> Path | None:
    """The first of these files that a bundle has.

    Raises:
        CardError: it is a link that leads out of the folder.
    """
    for name in names:
        file = folder / name
        if file.is_file():
            if not file.resolve().is_relative_to(folder.resolve()):
                raise CardError(f"{file} is a link that leads out of the bundle: give the file itself")
            return file
    return None


def _check_room(archive: zipfile.ZipFile, folder: Path, path: Path) -> None:
    """Refuse what does not fit on the disk, however small it is packed."""
    needed, free = sum(member.file_size for member in archive.infolist()), shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free in {folder.parent}"
        raise CardError(
            f"{path} unpacks to {sizes}: set TMPDIR to a larger disk, or give its folder unpacked"
        )


def _take(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, path: Path) -> None:
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in member.filename:
        raise CardError(
            f"{path} holds {member.filename!r}, which leads out of its folder: it was not unpacked"
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise CardError(f"{path} holds the link {member.filename!r}: it was not unpacked")
    if member.is_dir() or name.suffix not in _TAKEN or name.parts[0] == "__MACOSX":
        return
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as stream:
        while part := source.read(2**20):
            stream.write(part)
