"""Pulling published generators: downloads that resume, hashes that are checked, then the import."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from diffaug.errors import DiffaugError
from diffaug.files import sha256_file
from diffaug.progress import Progress
from diffaug.zoo.entries import ENTRIES, Entry, RemoteFile
from diffaug.zoo.home import home, pin, pin_of

MIRROR = "DIFFAUG_ZOO_MIRROR"
_HUGGING_FACE = "https://huggingface.co"
_PART = 2**20
# Tries of a download that breaks off, from where it stopped.
_TRIES = 5
_TIMEOUT = 60
# Seconds before the second try; doubled before each further one.
PAUSE = 1.0


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def pull(
    name: str,
    *,
    accept_unpinned: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Download a published generator and import it; one that is there already stays.

    Files come from the mirror `DIFFAUG_ZOO_MIRROR` (a folder or URL with `NAME/path` in it) where there is
    one, else from where they were published. Broken downloads go on where they stopped.

    Args:
        name: of the entry.
        accept_unpinned: take files whose publisher states no hash; that of what comes is recorded, and
            whatever else comes under that name later is refused.
        say: is told the licence, before anything is downloaded, and notes on the files.

    Returns:
        The generator's folder.

    Raises:
        DiffaugError: there is no such entry; a file has no published hash, no address, another hash, or
            cannot be had.
    """
    if name not in ENTRIES:
        raise DiffaugError(f"the zoo has no {name!r} to pull; it has {', '.join(ENTRIES)}")
    entry, folder = ENTRIES[name], home() / name
    home().mkdir(parents=True, exist_ok=True)
    with FileLock(home() / f".{name}.lock"):
        if (folder / "card.json").is_file():
            return folder
        _check(entry, accept_unpinned)
        say(f"licence of {name}: {entry.facts.licence}{_terms(entry)}")
        files = home() / ".files" / name
        for file in entry.files:
            _fetch(entry, file, files / file.path, progress or Progress())
        made = entry.convert(files, folder)
        for note in getattr(made, "notes", []):
            say(note)
        shutil.rmtree(files)
    return folder


def _terms(entry: Entry) -> str:
    said = {True: "allowed", False: "not allowed", None: "not stated"}
    use, pass_on = said[entry.facts.commercial_use], said[entry.facts.redistribution]
    return f" (commercial use {use}, redistribution {pass_on})"


def _check(entry: Entry, accept_unpinned: bool) -> None:
    """Everything that can be said before a download."""
    unpinned = [f.path for f in entry.files if f.md5 is None and pin_of(_key(entry, f)) is None]
    if unpinned and not accept_unpinned:
        raise DiffaugError(
            f"{', '.join(unpinned)} of {entry.name} have no published hash: nothing says whether what comes "
            "is what was published. Take them with --accept-unpinned: their hashes are recorded then, "
            "and checked ever after"
        )
    mirror = os.environ.get(MIRROR)
    nowhere = [f.path for f in entry.files if f.repository is None]
    if not mirror and nowhere:
        raise DiffaugError(
            f"diffaug does not know an address of {', '.join(nowhere)}. Either {entry.by_hand}; or name a "
            f"mirror, a folder or URL that has {entry.name}/{nowhere[0]}, in {MIRROR}"
        )
    if mirror and (scheme := urlsplit(mirror).scheme) not in ("", "http", "https"):
        raise DiffaugError(f"{MIRROR}={mirror} must be a folder or an http(s) URL, not {scheme}:")


def _key(entry: Entry, file: RemoteFile) -> str:
    return f"{entry.name}/{file.path}"


def _fetch(entry: Entry, file: RemoteFile, target: Path, progress: Progress) -> None:
    """Bring one file to `target`, verified."""
    if target.is_file():
        _verify(entry, file, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    mirror = os.environ.get(MIRROR)
    if mirror and not urlsplit(mirror).scheme:
        _copy(Path(mirror) / entry.name / file.path, part, progress)
    else:
        _download(_address(entry, file, mirror), part, progress)
    _verify(entry, file, part)
    os.replace(part, target)


def _address(entry: Entry, file: RemoteFile, mirror: str | None) -> str:
    if mirror:
        return f"{mirror.rstrip('/')}/{quote(entry.name)}/{quote(file.path)}"
    base = os.environ.get("HF_ENDPOINT", _HUGGING_FACE).rstrip("/")
    return f"{base}/{file.repository}/resolve/main/{quote(file.at or file.path)}"


def _verify(entry: Entry, file: RemoteFile, path: Path) -> None:
    """Check a file by its published or recorded hash, and record that of an unpinned one.

    Raises:
        DiffaugError: it has another; it is removed then.
    """
    key = _key(entry, file)
    recorded = pin_of(key)
    found = sha256_file(path)
    if file.md5 is not None:
        with path.open("rb") as stream:
            md5 = hashlib.file_digest(stream, "md5").hexdigest()
        if md5 != file.md5:
            path.unlink()
            raise DiffaugError(
                f"{key} has MD5 {md5}, its publisher states {file.md5}: it was altered, or is another "
                "version. It was removed; pull again, or from another mirror"
            )
    if recorded not in (None, found):
        path.unlink()
        raise DiffaugError(
            f"{key} has SHA-256 {found}, what was accepted before has {recorded}: it was removed. If a new "
            f"version is what you want, take the old hash out of {home() / 'pins.json'}"
        )
    if recorded is None:
        pin(key, found)


def _copy(source: Path, part: Path, progress: Progress) -> None:
    try:
        with source.open("rb") as stream, part.open("wb") as sink:
            _pour(stream, sink.write, source.name, 0, source.stat().st_size, progress)
    except OSError as error:
        raise DiffaugError(f"the mirror's {source} cannot be read: {error}") from error


def _download(url: str, part: Path, progress: Progress) -> None:
    """Download to `part`, from where it ends."""
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(PAUSE * 2**attempt)
        have = part.stat().st_size if part.exists() else 0
        request = Request(url, headers=_headers(url) | ({"Range": f"bytes={have}-"} if have else {}))
        try:
            with urlopen(request, timeout=_TIMEOUT) as answer:
                resumed = answer.status == 206
                have = have if resumed else 0
                length = answer.headers.get("Content-Length")
                total = have + int(length) if length else None
                with part.open("ab" if resumed else "wb") as sink:
                    _pour(answer, sink.write, url.rsplit("/", 1)[-1], have, total or have, progress)
        except HTTPError as error:
            if error.code == 416 and have:
                # Nothing lies beyond what is there.
                return
            if error.code < 500:
                hint = ": set HF_TOKEN, and accept its terms on its page" if error.code in (401, 403) else ""
                raise DiffaugError(f"{url} answers {error.code} {error.reason}{hint}") from error
            problem = str(error)
            continue
        except (URLError, OSError, ValueError) as error:
            problem = str(error)
            continue
        size = part.stat().st_size
        if total is None or size >= total:
            return
        problem = f"it broke off after {size} of {total} bytes"
    raise DiffaugError(
        f"{url} could not be downloaded ({problem}): pull again, which goes on where it stopped"
    )


def _headers(url: str) -> dict[str, str]:
    """The user's token, for Hugging Face alone."""
    token = os.environ.get("HF_TOKEN")
    base = os.environ.get("HF_ENDPOINT", _HUGGING_FACE)
    return {"Authorization": f"Bearer {token}"} if token and url.startswith(base) else {}


def _pour(
    source: _Stream, write: Callable[[bytes], object], title: str, have: int, total: int, progress: Progress
) -> None:
    """Copy with a bar, in MiB."""
    with progress.task(title, total=max(1, total // _PART), completed=have // _PART) as task:
        while block := source.read(_PART):
            write(block)
            task.advance()
