"""Files are written whole or not at all."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaug.files import atomic_path, atomic_write_json, atomic_write_text, sha256_file


def test_text_is_written_byte_for_byte_into_a_new_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "note.txt"
    atomic_write_text(file, "αβγ\r\nline\n")
    assert file.read_bytes() == "αβγ\r\nline\n".encode()
    assert [entry.name for entry in file.parent.iterdir()] == ["note.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"old")

    def interrupted_halfway() -> None:
        with atomic_path(file) as temporary:
            temporary.write_bytes(b"half")
            assert file.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_halfway()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"weights.bin": b"old"}


def test_a_reader_of_the_old_file_never_sees_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    file.write_text("old")
    with file.open() as reader:
        atomic_write_text(file, "new")
        assert reader.read() == "old"
    assert file.read_text() == "new"


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "empty.bin"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_next_attempt_replaces_what_a_killed_process_left(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        raise RuntimeError
    temporary.write_text("half a sta")
    atomic_write_json(file, {"step": 3})
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    assert json.loads(file.read_text()) == {"step": 3}


def test_the_temporary_file_keeps_the_ending_that_chooses_the_format(tmp_path: Path) -> None:
    file = tmp_path / "scan.nii.gz"
    with atomic_path(file) as temporary:
        assert temporary.name.startswith(".")
        nib.save(nib.Nifti1Image(np.ones((2, 3, 4), np.uint8), np.eye(4)), temporary)
    assert file.read_bytes()[:2] == b"\x1f\x8b"
    assert nib.load(file).shape == (2, 3, 4)


@pytest.mark.parametrize("content", [float("nan"), [float("inf")], {"a": object()}])
def test_what_has_no_json_form_leaves_the_old_file(tmp_path: Path, content: object) -> None:
    file = tmp_path / "card.json"
    atomic_write_json(file, {"old": True})
    with pytest.raises((TypeError, ValueError)):
        atomic_write_json(file, content)
    assert json.loads(file.read_text()) == {"old": True}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(content=JSON)
def test_json_comes_back_as_it_went(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    file = tmp_path_factory.getbasetemp() / "content.json"
    try:
        atomic_write_json(file, content)
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form
        assert any("\ud800" <= character <= "\udfff" for character in json.dumps(content, ensure_ascii=False))
    else:
        assert json.loads(file.read_text(encoding="utf-8")) == content


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    file.write_bytes(b"abc")  # the first example of FIPS 180-2
    assert sha256_file(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
