from pathlib import Path

import pytest

import diffaug
from diffaug import zoo
from diffaug.errors import CardError


def test_a_folder_loads_by_its_path(tiny_generator_folder: Path) -> None:
    for given in (tiny_generator_folder, str(tiny_generator_folder)):
        assert diffaug.load(given).name == "tiny"


def test_bundled_generators_load_by_name(
    tiny_generator_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tiny").symlink_to(tiny_generator_folder)
    (tmp_path / "not-a-generator").mkdir()
    monkeypatch.setattr(zoo, "BUNDLED", tmp_path)
    assert zoo.names() == ["tiny"]
    assert zoo.folder_of("tiny") == tmp_path / "tiny"
    assert zoo.load("tiny").card.name == "tiny"


@pytest.mark.parametrize("name", ["no-such-generator", "", "../bundled"])
def test_an_unknown_name_is_answered_with_those_there_are(
    name: str, tiny_generator_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "BUNDLED", tiny_generator_folder.parent)
    with pytest.raises(
        CardError, match=r"neither a bundled generator \(tiny\) nor a folder with a card\.json"
    ):
        zoo.load(name)
