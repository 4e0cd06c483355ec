"""Pulling published generators from a local server and from a folder, over connections that break."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import diffaug
from diffaug.cli import app
from diffaug.errors import CardError, DiffaugError
from diffaug.zoo import pulling
from diffaug.zoo.catalogue import catalogue
from diffaug.zoo.entries import ENTRIES, Entry, RemoteFile
from diffaug.zoo.home import home
from diffaug.zoo.monai import import_monai_bundle
from diffaug.zoo.monai.importing import Geometry
from diffaug.zoo.pulling import pull

from .monai_upstream import write_brats

NAME = "small"
FILES = ("configs/inference.json", "models/model_autoencoder.pt", "models/model.pt")


class Server(ThreadingHTTPServer):
    """Serves a folder. `breaks`: how often answers end after a third of what they promise."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.breaks, self.ranges, self.asked = root, 0, True, list[tuple[str, str | None]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        file = server.root / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        part = content[start:]
        if server.breaks:
            server.breaks -= 1
            part = part[: max(1, len(part) // 3)]
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with one entry."""
    root = tmp_path_factory.mktemp("mirror")
    write_brats(root / NAME)
    return root


@pytest.fixture
def server(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(mirror)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", made.url)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def small(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """The entry, with the hashes of the mirror's files, in a zoo of its own."""
    hashes = [hashlib.md5((mirror / NAME / path).read_bytes()).hexdigest() for path in FILES]
    entry = Entry(
        NAME,
        tuple(RemoteFile(path, md5=md5) for path, md5 in zip(FILES, hashes, strict=True)),
        "ask",
        ENTRIES["brats-flair-ldm"].facts,
        lambda files, output, geometry: import_monai_bundle(
            files, output, template="brats-flair-ldm", geometry=geometry, name=NAME
        ),
    )
    monkeypatch.setitem(ENTRIES, NAME, entry)
    monkeypatch.setenv("DIFFAUG_ZOO", str(tmp_path / "zoo"))
    monkeypatch.setattr(pulling, "PAUSE", 0.0)
    return entry


def unpin(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(RemoteFile(file.path) for file in entry.files)
    monkeypatch.setitem(ENTRIES, NAME, Entry(NAME, files, entry.by_hand, entry.facts, entry.convert))


def test_what_was_pulled_loads_by_its_name(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CardError, match="run `diffaug zoo pull small` first"):
        diffaug.load(NAME)
    said: list[str] = []
    folder = pull(NAME, say=said.append)
    assert folder == tmp_path / "zoo" / NAME
    assert said[0] == "licence of small: Apache-2.0 (commercial use allowed, redistribution allowed)"
    made = diffaug.load(NAME).sample(1, steps=2)
    assert torch.isfinite(made.image).all()
    asked = len(server.asked)
    assert pull(NAME) == folder
    assert len(server.asked) == asked
    assert [path.name for path in (tmp_path / "zoo" / ".files").iterdir()] == []


def test_broken_downloads_go_on_where_they_stopped(server: Server) -> None:
    server.breaks = 3
    pull(NAME)
    first = [asked for path, asked in server.asked if path.endswith(FILES[0])]
    assert first[0] is None
    assert [asked is not None for asked in first[1:]] == [True] * 3
    diffaug.load(NAME)


def test_a_server_without_ranges_begins_again(server: Server) -> None:
    server.breaks, server.ranges = 2, False
    pull(NAME)
    diffaug.load(NAME)


def test_a_download_that_never_ends_well_is_kept_for_the_next_pull(server: Server) -> None:
    server.breaks = 10**6
    with pytest.raises(DiffaugError, match=r"broke off after \d+ of \d+ bytes\): pull again"):
        pull(NAME)
    part = home() / ".files" / NAME / f"{FILES[0]}.part"
    kept = part.stat().st_size
    assert kept > 0
    server.breaks = 0
    server.asked.clear()
    pull(NAME)
    assert server.asked[0][1] == f"bytes={kept}-"


def test_another_hash_is_refused_and_the_file_removed(
    server: Server, small: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (*small.files[:2], RemoteFile(FILES[2], md5="0" * 32))
    monkeypatch.setitem(ENTRIES, NAME, Entry(NAME, wrong, "", small.facts, small.convert))
    with pytest.raises(DiffaugError, match=r"small/models/model.pt has MD5 \w+, its publisher states 0000"):
        pull(NAME)
    assert not list((home() / ".files" / NAME / "models").glob("model.pt*"))
    assert not (home() / NAME).exists()


def test_a_missing_file_is_named(server: Server, small: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*small.files, RemoteFile("models/none.pt", md5="0" * 32))
    monkeypatch.setitem(ENTRIES, NAME, Entry(NAME, more, "", small.facts, small.convert))
    with pytest.raises(DiffaugError, match=r"/small/models/none.pt answers 404"):
        pull(NAME)


def test_files_without_a_hash_are_accepted_once_and_checked_ever_after(
    mirror: Path, small: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpin(small, monkeypatch)
    other = tmp_path / "mirror"
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", str(mirror))
    with pytest.raises(DiffaugError, match=r"have no published hash: .*--accept-unpinned"):
        pull(NAME)
    folder = pull(NAME, accept_unpinned=True)
    pins = json.loads((home() / "pins.json").read_text())
    sha256 = hashlib.sha256((mirror / NAME / FILES[2]).read_bytes()).hexdigest()
    assert pins[f"{NAME}/{FILES[2]}"] == sha256
    for path in sorted(folder.iterdir(), reverse=True):
        path.unlink()
    folder.rmdir()
    for path in FILES:
        (other / NAME / path).parent.mkdir(parents=True, exist_ok=True)
        (other / NAME / path).write_bytes((mirror / NAME / path).read_bytes())
    changed = other / NAME / FILES[2]
    changed.write_bytes(changed.read_bytes() + b"more")
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", str(other))
    with pytest.raises(DiffaugError, match=r"what was accepted before has"):
        pull(NAME)
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", str(mirror))
    assert pull(NAME) == folder


def test_what_is_no_checkpoint_is_neither_kept_nor_what_later_files_are_checked_by(
    mirror: Path, small: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpin(small, monkeypatch)
    bad = tmp_path / "bad" / NAME
    shutil.copytree(mirror / NAME, bad)
    (bad / FILES[2]).write_text("<html>please log in</html>")
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", str(bad.parent))
    with pytest.raises(CardError, match="no checkpoint that torch can read"):
        pull(NAME, accept_unpinned=True)
    assert not (home() / "pins.json").exists()
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", str(mirror))
    pull(NAME, accept_unpinned=True)
    diffaug.load(NAME)


def test_a_mirror_need_not_have_what_hugging_face_has(
    server: Server, small: Entry, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(mirror / NAME, tmp_path / "hub" / "owner" / "repository" / "resolve" / "main")
    half = tmp_path / "half"
    (half / NAME / "configs").mkdir(parents=True)
    shutil.copy(mirror / NAME / FILES[0], half / NAME / FILES[0])
    files = (small.files[0], *(RemoteFile(f.path, "owner/repository", f.md5) for f in small.files[1:]))
    monkeypatch.setitem(ENTRIES, NAME, Entry(NAME, files, "", small.facts, small.convert))
    server.root = tmp_path / "hub"
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", str(half))
    pull(NAME)
    assert all(path.startswith("/owner/repository/") for path, _ in server.asked)


def test_another_grid_is_chosen_when_it_is_pulled(server: Server) -> None:
    pull(NAME, geometry=Geometry(shape=(32, 16, 16), spacing=(2.0, 2.0, 2.0)))
    assert diffaug.load(NAME).grid.shape == (32, 16, 16)
    with pytest.raises(DiffaugError, match=r"change grid and window in its card\.json"):
        pull(NAME, geometry=Geometry(shape=(16, 16, 16)))


def test_a_damaged_zoo_keeps_no_bundled_generator_from_loading(tmp_path: Path) -> None:
    home().mkdir()
    (home() / "registered.json").write_text("[")
    assert diffaug.load("hippocampus-mr").name == "hippocampus-mr"
    (home() / "registered.json").unlink()
    (home() / "broken").mkdir()
    (home() / "broken" / "card.json").write_text("{}")
    with pytest.warns(UserWarning, match="broken is left out"):
        found = [each.name for each in catalogue()]
    assert "hippocampus-mr" in found
    assert "broken" not in found


def test_without_an_address_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFAUG_ZOO_MIRROR", raising=False)
    with pytest.raises(DiffaugError, match=r"monai.bundle download brats_mri_generative_diffusion"):
        pull("brats-flair-ldm")
    monkeypatch.setenv("DIFFAUG_ZOO_MIRROR", "ftp://somewhere")
    with pytest.raises(DiffaugError, match="a folder or an http"):
        pull("brats-flair-ldm")
    with pytest.raises(DiffaugError, match="the zoo has no 'nothing' to pull; it has brats-flair-ldm"):
        pull("nothing")


def test_hugging_face_is_asked_by_repository_and_with_the_users_token(
    server: Server, small: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFAUG_ZOO_MIRROR")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    files = tuple(RemoteFile(file.path, "owner/repository", file.md5) for file in small.files)
    monkeypatch.setitem(ENTRIES, NAME, Entry(NAME, files, "", small.facts, small.convert))
    with pytest.raises(
        DiffaugError, match=r"/owner/repository/resolve/main/configs/inference.json answers 404"
    ):
        pull(NAME)
    part = tmp_path / "none.part"
    for url, told in ((server.url, True), ("http://elsewhere", False), (f"{server.url}.evil.org", False)):
        request = pulling._request(f"{url}/x", part, 0)
        # Not among the headers that a redirect passes on.
        assert request.headers == {}
        assert ("Authorization" in request.unredirected_hdrs) == told


def test_the_list_and_its_entries(tiny_generator_folder: Path, mirror: Path, tmp_path: Path) -> None:
    def run(*command: str | Path, fails: bool = False) -> str:
        result = CliRunner().invoke(app, ["zoo", *map(str, command)])
        assert (result.exit_code != 0) == fails, result.output
        return result.output

    table = run("list")
    names = [entry for entry in ENTRIES if entry != NAME]
    assert len(names) == 9
    assert all(name in table for name in ["hippocampus-mr", *names])
    listed = {each["name"]: each for each in json.loads(run("list", "--json"))}
    assert listed["hippocampus-mr"]["state"] == "bundled"
    assert listed["nv-generate-mr"]["commercial_use"] is False
    assert listed["brain-t1-ldm"]["commercial_use"] is None
    assert listed["maisi-ct"]["verbs"][0] == "paint"
    shown = run("show", "brain-t1-ldm")
    assert "ventricular_volume" in shown
    assert "models/autoencoder.pth (no published hash)" in shown
    assert run("where").strip() == str(tmp_path / "zoo")
    assert run("register", tiny_generator_folder, "--name", "mine").strip() == "mine"
    assert run("where", "mine").strip() == str(tiny_generator_folder.resolve())
    assert diffaug.load("mine").name == "tiny"
    assert "registered" in run("show", "mine")
    assert "name of another generator" in run(
        "register", tiny_generator_folder, "--name", "maisi-ct", fails=True
    )
    run("unregister", "mine")
    assert "mine is not registered" in run("unregister", "mine", fails=True)
    assert "neither a generator of the zoo" in run("where", "mine", fails=True)


def test_pulling_by_command(server: Server, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["zoo", "pull", NAME])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "zoo" / NAME)
    assert "licence of small" in result.stderr
    assert {each["name"]: each["state"] for each in listed()}[NAME] == "pulled"


def listed() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, ["zoo", "list", "--json"]).stdout)
    return found
