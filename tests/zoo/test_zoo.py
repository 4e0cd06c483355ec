from pathlib import Path

import pytest

import diffaug
from diffaug import zoo
from diffaug.audit.detector import read_detector
from diffaug.audit.inspection import find_detector
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
        CardError, match=r"neither a generator of the zoo \(here are tiny;.*\) nor a folder with a card\.json"
    ):
        zoo.load(name)


def test_bundled_generators_have_an_audit_that_leaves_no_question_of_privacy_open() -> None:
    for name in zoo.bundled():
        assert zoo.load(name).card.audit_note() is None


def test_bundled_generators_come_with_the_detector_of_their_training_scans() -> None:
    for name in zoo.bundled():
        card = zoo.load(name).card
        detector = read_detector(find_detector(zoo.folder_of(name), name))
        assert detector.grid == card.grid.to_grid()
        assert detector.record.training == len(detector.training) == card.training.cases["train"]
