"""The user's own part of the zoo, on disk: generators that were pulled, folders that were registered, and the
hashes of files that were accepted without a published one.

It is the folder `DIFFAUG_ZOO`, by default `diffaug/zoo` in the user's cache.
"""

import os
from pathlib import Path

from filelock import FileLock

from diffaug.errors import CardError
from diffaug.files import atomic_write_json, read_json

_REGISTERED = "registered.json"
_PINS = "pins.json"


def home() -> Path:
    """The folder, which need not exist."""
    if given := os.environ.get("DIFFAUG_ZOO"):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "diffaug" / "zoo"


def pulled() -> dict[str, Path]:
    """Generators that were pulled: name -> folder."""
    return {card.parent.name: card.parent for card in sorted(home().glob("[!.]*/card.json"))}


def registered() -> dict[str, Path]:
    """Folders that were registered, by their names."""
    return {name: Path(folder) for name, folder in _read(_REGISTERED).items()}


def register(name: str, folder: Path) -> None:
    """Let `name` stand for a generator's folder, which stays where it is.

    Raises:
        CardError: the name stands for another folder.
    """
    before = registered().get(name)
    if before is not None and before != folder.resolve():
        raise CardError(f"{name} stands for {before}: unregister it first, or give another name")
    _add(_REGISTERED, name, str(folder.resolve()))


def unregister(name: str) -> None:
    """Forget a name; the folder stays.

    Raises:
        CardError: it is not registered.
    """
    with _locked():
        content = _read(_REGISTERED)
        if name not in content:
            raise CardError(f"{name} is not registered; registered are {', '.join(content) or 'none'}")
        del content[name]
        atomic_write_json(home() / _REGISTERED, content)


def pin_of(file: str) -> str | None:
    """SHA-256 of a file (`NAME/path`) that was accepted, or None."""
    return _read(_PINS).get(file)


def pin(file: str, sha256: str) -> None:
    """Check a file by this hash from now on."""
    _add(_PINS, file, sha256)


def _add(file: str, key: str, value: str) -> None:
    with _locked():
        atomic_write_json(home() / file, _read(file) | {key: value})


def _read(file: str) -> dict[str, str]:
    path = home() / file
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise CardError(f"{path} is damaged: remove it")
    return content


def make_home() -> None:
    """Make the folder.

    Raises:
        CardError: it cannot be made.
    """
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CardError(f"DIFFAUG_ZOO={home()} is no folder to write in: {error}") from error


def _locked() -> FileLock:
    make_home()
    return FileLock(home() / ".lock")
