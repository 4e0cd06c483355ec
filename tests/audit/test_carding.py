"""Verdicts on the card of the generator whose samples were audited."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffaug.audit.carding import check_card, put_on_card
from diffaug.audit.record import Verdict
from diffaug.datasets.building import build_dataset
from diffaug.datasets.manifest import read_manifest
from diffaug.datasets.reading import read_dataset
from diffaug.datasets.training_scans import record_training_scans
from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json
from diffaug.generators.card import card_json, read_card
from diffaug.generators.generator import Generator
from diffaug.progress import Progress
from tests.conftest import make_tiny_generator


@pytest.fixture
def samples(tiny_generator_folder: Path, tmp_path: Path) -> Path:
    """Two samples of the tiny generator."""
    build_dataset(
        Generator.load(tiny_generator_folder), tmp_path / "samples", cases=2, steps=1, layout="decathlon"
    )
    return tmp_path / "samples"


def report(*answers: Any) -> Any:
    """As much of a report as a card takes."""
    verdicts = [
        Verdict(question=f"{n}?", about="use" if n else "privacy", answer=a, found="this", threshold="that")
        for n, a in enumerate(answers)
    ]
    sizes = {
        role: SimpleNamespace(cases=n) for role, n in (("synthetic", 2), ("training", 5), ("held_out", 3))
    }
    return SimpleNamespace(verdicts=verdicts, answer=answers[-1], version="1.0", **sizes)


def test_the_card_holds_the_answers_and_nothing_else_changes(
    tiny_generator_folder: Path, samples: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_generator_folder, folder)
    check_card(folder, samples, [], [], Progress(quiet=True))
    put_on_card(folder, samples, report("pass", "fail"))
    card, before = read_card(folder / "card.json"), read_card(tiny_generator_folder / "card.json")
    assert card.audit is not None
    assert [(v.question, v.answer) for v in card.audit.verdicts] == [("0?", "pass"), ("1?", "fail")]
    assert (card.audit.answer, card.audit.samples, card.audit.rejection) == ("fail", 2, False)
    assert card.model_copy(update={"audit": None}) == before
    assert card.audit_note() == "tiny failed its audit: 1?"
    assert Generator.load(folder).card.audit == card.audit


def test_an_audit_does_not_outlive_the_weights(
    tiny_generator_folder: Path, samples: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_generator_folder, folder)
    put_on_card(folder, samples, report("pass"))
    generator = Generator.load(folder)
    generator.save(tmp_path / "same")
    assert read_card(tmp_path / "same" / "card.json").audit == generator.card.audit
    generator.model.load_state_dict(make_tiny_generator(seed=1).model.state_dict())
    generator.save(tmp_path / "other")
    assert read_card(tmp_path / "other" / "card.json").audit is None


def test_an_audit_of_inspected_samples_says_so(
    tiny_generator_folder: Path, samples: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_generator_folder, folder)
    card = put_on_card(folder, samples, report("pass"))
    assert card.audit is not None
    inspected = card.model_copy(update={"audit": card.audit.model_copy(update={"rejection": True})})
    assert inspected.audit_note() == "tiny was audited with --reject-copies alone: build with it, too"
    assert inspected.audit_note(rejecting=True) is None
    atomic_write_json(folder / "card.json", card_json(inspected))
    build_dataset(Generator.load(folder), tmp_path / "more", cases=1, steps=1, layout="decathlon")
    text = (tmp_path / "more" / "README.md").read_text()
    assert "no question failed (among samples of which copies had been refused; here none was)" in text


def test_a_card_without_an_audit_says_so(tiny_generator_folder: Path) -> None:
    note = read_card(tiny_generator_folder / "card.json").audit_note()
    assert note is not None
    assert "tiny has no audit on its card" in note


def test_a_question_of_privacy_that_is_left_open_is_told(
    tiny_generator_folder: Path, samples: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_generator_folder, folder)
    card = put_on_card(folder, samples, report("unclear", "pass"))
    assert card.audit_note() == "the audit of tiny leaves open: 0?"


def test_unclear_use_needs_no_note(tiny_generator_folder: Path, samples: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_generator_folder, folder)
    assert put_on_card(folder, samples, report("pass", "unclear")).audit_note() is None
    build_dataset(Generator.load(folder), tmp_path / "more", cases=1, steps=1, layout="decathlon")
    assert read_manifest(tmp_path / "more" / "manifest.json").audit == "unclear"


def test_samples_of_another_generator_are_refused(samples: Path, tmp_path: Path) -> None:
    make_tiny_generator(seed=1).save(tmp_path / "other")
    with pytest.raises(DiffaugError, match="was made by tiny with the weights"):
        check_card(tmp_path / "other", samples, [], [], Progress(quiet=True))


def test_scans_without_a_manifest_are_refused(tiny_generator_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match=r"has no manifest\.json"):
        check_card(tiny_generator_folder, tmp_path, [], [], Progress(quiet=True))


def test_the_sets_must_be_those_of_the_fit(
    tiny_generator_folder: Path, samples: Path, tmp_path: Path
) -> None:
    folder, quiet = tmp_path / "tiny", Progress(quiet=True)
    shutil.copytree(tiny_generator_folder, folder)
    # Any scans will do.
    first, second = read_dataset(samples).cases
    record = record_training_scans([first], quiet)
    atomic_write_json(folder / "private" / "training_scans.json", record)
    check_card(folder, samples, [first], [second], quiet)
    with pytest.raises(DiffaugError, match=r"1 of the training cases did not .*1 scans .*1 of the held-out"):
        check_card(folder, samples, [second], [first], quiet)
    with pytest.raises(DiffaugError, match=r"sets: 1 of the held-out cases trained it"):
        check_card(folder, samples, [first], [first, second], quiet)
    atomic_write_json(folder / "private" / "training_scans.json", {"salt": "no hex", "scans": {}})
    with pytest.raises(DiffaugError, match=r"training_scans\.json is no record"):
        check_card(folder, samples, [first], [second], quiet)
