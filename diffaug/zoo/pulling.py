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

from diffaug.errors import CardError, DiffaugError
from diffaug.files import sha256_file
from diffaug.progress import Progress
from diffaug.zoo import bundled
from diffaug.zoo.entries import ENTRIES, Entry, RemoteFile
from diffaug.zoo.home import home, make_home, pin, pin_of
from diffaug.zoo.monai.importing import AS_PUBLISHED, Geometry

MIRROR = "DIFFAUG_ZOO_MIRROR"
_HUGGING_FACE = "https://huggingface.co"
_PART = 2**20
# Tries of a download that breaks off, from where it stopped.
_TRIES = 5
_TIMEOUT = 60
# Seconds before the second try; doubled before each further one.
PAUSE = 1.0


class _MissingError(DiffaugError):
    """The server has no such file."""


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def pull(
    name: str,
    *,
    accept_unpinned: bool = False,
    geometry: Geometry = AS_PUBLISHED,
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
        geometry: of the volumes, instead of the published ones.
        say: is told the licence, before anything is downloaded, and notes on the files.

    Returns:
        The generator's folder.

    Raises:
        DiffaugError: there is no such entry; a file has no published hash, no address, another hash, or
            cannot be had.
    """
    if name in bundled():
        return bundled()[name]
    if name not in ENTRIES:
        raise DiffaugError(f"the zoo has no {name!r} to pull; it has {', '.join(ENTRIES)}")
    entry, folder = ENTRIES[name], home() / name
    make_home()
    with FileLock(home() / f".{name}.lock"):
        if (folder / "card.json").is_file():
            if geometry != AS_PUBLISHED:
                raise DiffaugError(
                    f"{name} is in {folder} already: change grid and window in its card.json, or remove it"
                )
            return folder
        _check(entry, accept_unpinned)
        say(f"licence of {name}: {entry.facts.licence}{_terms(entry)}")
        files = home() / ".files" / name
        for file in entry.files:
            _fetch(entry, file, files / file.path, progress or Progress())
        try:
            made = entry.convert(files, folder, geometry)
        except CardError:
            # What is no checkpoint must not wait for the next try, nor be what later files are checked by.
            _drop_unpinned(entry, files)
            raise
        for file in entry.files:
            if pin_of(_key(entry, file)) is None:
                pin(_key(entry, file), sha256_file(files / file.path))
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
            f"mirror in {MIRROR}, a folder or URL that has {', '.join(f'{entry.name}/{p}' for p in nowhere)}"
        )
    if mirror and (scheme := urlsplit(mirror).scheme) not in ("", "http", "https"):
        raise DiffaugError(f"{MIRROR}={mirror} must be a folder or an http(s) URL, not {scheme}:")


def _drop_unpinned(entry: Entry, files: Path) -> None:
    for file in entry.files:
        if file.md5 is None and pin_of(_key(entry, file)) is None:
            (files / file.path).unlink(missing_ok=True)


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
        source = Path(mirror) / entry.name / file.path
        if source.exists() or file.repository is None:
            _copy(source, part, progress)
        else:
            _download(_address(entry, file, None), part, progress)
    else:
        try:
            _download(_address(entry, file, mirror), part, progress)
        except _MissingError:
            if not mirror or file.repository is None:
                raise
            _download(_address(entry, file, None), part, progress)
    _etag_of(part).unlink(missing_ok=True)
    _verify(entry, file, part)
    os.replace(part, target)


def _address(entry: Entry, file: RemoteFile, mirror: str | None) -> str:
    if mirror:
        return f"{mirror.rstrip('/')}/{quote(entry.name)}/{quote(file.path)}"
    return f"{_hugging_face()}/{file.repository}/resolve/main/{quote(file.path)}"


def _verify(entry: Entry, file: RemoteFile, path: Path) -> None:
    """Check a file by its published or recorded hash.

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
        request = _request(url, part, have)
        try:
            with urlopen(request, timeout=_TIMEOUT) as answer:
                resumed = answer.status == 206
                have = have if resumed else 0
                _etag_of(part).write_text(answer.headers.get("ETag") or "")
                length = answer.headers.get("Content-Length")
                total = have + int(length) if length else None
                with part.open("ab" if resumed else "wb") as sink:
                    _pour(answer, sink.write, url.rsplit("/", 1)[-1], have, total or have, progress)
        except HTTPError as error:
            if error.code == 416 and have:
                # Nothing lies beyond what is there.
                return
            if error.code == 404:
                raise _MissingError(f"{url} answers 404 {error.reason}") from error
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


def _request(url: str, part: Path, have: int) -> Request:
    """For what is missing of a file, of the very version that is there; with the user's token for Hugging
    Face alone, and not for where it redirects to."""
    request = Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if etag := _etag_of(part).read_text() if _etag_of(part).exists() else "":
            request.add_header("If-Range", etag)
    token = os.environ.get("HF_TOKEN")
    if token and urlsplit(url).netloc == urlsplit(_hugging_face()).netloc:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _hugging_face() -> str:
    return os.environ.get("HF_ENDPOINT", _HUGGING_FACE).rstrip("/")


def _etag_of(part: Path) -> Path:
    """Where the version of a download is noted."""
    return part.with_name(f"{part.name}.etag")


def _pour(
    source: _Stream, write: Callable[[bytes], object], title: str, have: int, total: int, progress: Progress
) -> None:
    """Copy with a bar, in MiB."""
    with progress.task(title, total=max(1, total // _PART), completed=have // _PART) as task:
        while block := source.read(_PART):
            write(block)
            task.advance()
