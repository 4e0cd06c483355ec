"""The encoder that an audit trains once and keeps."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import diffaug.audit.encoder
from diffaug.audit.encoder import trained_encoder
from diffaug.audit.volumes import CaseSet
from diffaug.evaluation.embedding import Embedder, embed, fit_embedder
from diffaug.progress import Progress
from tests.audit.world import standard_sets


@pytest.fixture(scope="module")
def training() -> CaseSet:
    return standard_sets(training=9).training


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Patients of each training of an encoder."""
    seen: list[Sequence[str]] = []

    def fit(cases: object, patients: Sequence[str], **options: object) -> Embedder:
        seen.append(patients)
        return fit_embedder(cases, patients, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(diffaug.audit.encoder, "fit_embedder", fit)
    return seen


def encoder(training: CaseSet, folder: Path, steps: int = 2) -> Embedder:
    return trained_encoder(training, folder, steps, "cpu", Progress(quiet=True))


def test_it_is_the_one_that_was_fitted_and_is_read_again(
    training: CaseSet, fitted: list[Sequence[str]], tmp_path: Path
) -> None:
    expected = fit_embedder(training.batch, training.patients, steps=2, seed=0)
    first, again = encoder(training, tmp_path), encoder(training, tmp_path)
    assert len(fitted) == 1
    for model in (first, again):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
    volumes = training.batch(range(9))
    assert torch.equal(embed(first, volumes), embed(expected, volumes))
    assert len(list(tmp_path.iterdir())) == 1


def test_other_steps_and_other_scans_are_another_encoder(
    training: CaseSet, fitted: list[Sequence[str]], tmp_path: Path
) -> None:
    encoder(training, tmp_path)
    encoder(training, tmp_path, steps=1)
    encoder(dataclasses.replace(training, files="of other scans"), tmp_path)
    assert len(fitted) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_other_patients_of_the_same_scans_are_another_encoder(
    training: CaseSet, fitted: list[Sequence[str]], tmp_path: Path
) -> None:
    encoder(training, tmp_path)
    pairs = tuple(f"P{number // 2}" for number in range(9))
    encoder(dataclasses.replace(training, patients=pairs), tmp_path)
    assert [[patient for _, patient in seen] for seen in fitted] == [list(training.patients), list(pairs)]


def test_an_encoder_of_both_sides_sees_held_out_cases_as_other_patients(
    training: CaseSet, fitted: list[Sequence[str]], tmp_path: Path
) -> None:
    held_out = dataclasses.replace(training, files="others")
    balanced = trained_encoder(training, tmp_path, 2, "cpu", Progress(quiet=True), held_out=held_out)
    alone = encoder(training, tmp_path)
    assert len(set(fitted[0])) == 18, "patients of equal names are two where no table is shared"
    assert not torch.equal(balanced.state_dict()["head.0.weight"], alone.state_dict()["head.0.weight"])


def test_an_interrupted_training_leaves_nothing_behind(
    training: CaseSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(diffaug.audit.encoder, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder(training, tmp_path)
    assert not list(tmp_path.iterdir())
