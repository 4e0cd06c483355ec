"""Folds in which nothing validates that a patient in training, or a generator, gave away."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffaug.cli import app
from diffaug.datasets.building import build_dataset
from diffaug.datasets.folds import make_folds
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.training_scans import record_training_scans
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.progress import Progress


def dataset_of(patients: list[str], root: Path = Path("data")) -> Dataset:
    """Cases a0, a1, ... of these patients."""
    cases = tuple(CaseFiles(f"a{n}", (), None, patient) for n, patient in enumerate(patients))
    return Dataset(root, "data", cases, ["MRI"], {0: "background"}, None, None, None, True)


@given(
    patients=st.lists(st.sampled_from("abcdefghij"), min_size=8, max_size=40),
    count=st.integers(2, 5),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_nothing_validates_that_was_given_away(
    patients: list[str], count: int, seed: int, data: st.DataObject
) -> None:
    dataset = dataset_of(patients)
    names = [case.name for case in dataset.cases]
    patient_of = dict(zip(names, patients, strict=True))
    made = data.draw(st.lists(st.sampled_from(names), max_size=4, unique=True))
    real = [name for name in names if name not in made]
    made_from = {
        name: data.draw(st.one_of(st.none(), st.sampled_from(real))) if real else None for name in made
    }
    trained = set(data.draw(st.lists(st.sampled_from(real), max_size=3))) if real else set()
    free = {patient_of[name] for name in real} - {patient_of[name] for name in trained}
    if len(free) < count:
        with pytest.raises(DiffaugError, match="may validate, too few"):
            make_folds(dataset, count, seed=seed, train_only=trained, made_from=made_from)
        return
    folds = make_folds(dataset, count, seed=seed, train_only=trained, made_from=made_from)
    assert folds == make_folds(dataset, count, seed=seed, train_only=trained, made_from=made_from)
    assert len(folds) == count
    for fold in folds:
        assert fold["val"]
        training, validating = ({patient_of[n] for n in fold[k] if n in real} for k in ("train", "val"))
        assert not training & validating
        assert not set(fold["val"]) & (set(made) | trained)
        sources = {made_from[name] for name in fold["train"] if name in made} - {None}
        assert sources <= set(fold["train"])
        assert {name for name in made if made_from[name] is None} <= set(fold["train"])
    validated = [name for fold in folds for name in fold["val"]]
    assert sorted(validated) == sorted(name for name in real if patient_of[name] in free)


def test_names_that_are_not_there_are_errors() -> None:
    with pytest.raises(DiffaugError, match=r"has no case x \(1 such names"):
        make_folds(dataset_of(list("abcdef")), 2, train_only={"x"})


def test_command(tiny_generator: Generator, tmp_path: Path) -> None:
    """A dataset of real cases, two of which trained the generator, and of what was made from them."""
    rng = np.random.default_rng(0)
    real = tmp_path / "real"
    for kind in ("imagesTr", "labelsTr"):
        (real / kind).mkdir(parents=True)
    for n in range(8):
        label = np.zeros((16, 24, 16), np.uint8)
        label[4:10, 6:12, 4:10], label[4:10, 12:18, 4:10] = 1, 2
        image = (rng.random(label.shape) * 100 + 50 * label).astype(np.int16)
        nib.save(nib.Nifti1Image(image, np.eye(4)), real / "imagesTr" / f"real_{n}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), real / "labelsTr" / f"real_{n}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "head": 1, "body": 2},
        "numTraining": 8,
        "file_ending": ".nii.gz",
    }
    (real / "dataset.json").write_text(json.dumps(description))
    cases = read_dataset(real).cases
    record = record_training_scans(cases[:2], Progress(quiet=True))
    (tmp_path / "scans.json").write_text(json.dumps(record))
    made = tmp_path / "Dataset950_Made"
    build_dataset(tiny_generator, made, cases=3, verb="vary", source=real, steps=1)
    for kind in ("imagesTr", "labelsTr"):
        for file in (made / kind).iterdir():
            (real / kind / file.name).write_bytes(file.read_bytes())
    (real / "dataset.json").write_text(json.dumps(description | {"numTraining": 11}))
    arguments = [
        "splits",
        str(real),
        "--folds",
        "3",
        "--synthetic",
        str(made),
        "--output",
        str(tmp_path / "s.json"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--training-scans", str(tmp_path / "scans.json")])
    assert done.exit_code == 0, done.output
    assert "11 cases: 6 validate once each, 3 synthetic ones and 2 real ones only train" in done.stderr
    folds = json.loads((tmp_path / "s.json").read_text())
    assert sorted(n for fold in folds for n in fold["val"]) == [f"real_{n}" for n in range(2, 8)]
    manifest = json.loads((made / "manifest.json").read_text())
    for case in manifest["cases"]:
        for fold in folds:
            assert (case["name"] in fold["train"]) == (case["source"]["name"] in fold["train"])
    table = "".join(f"real_{n},p{n // 2}\n" for n in range(8))
    (real / "patients.csv").write_text("case,patient\n" + table)
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "is there already, and trainings may rest on it" in refused.stderr
    done = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert done.exit_code == 0, done.output
    assert "which scans trained tiny, that made the synthetic cases, is unknown" in done.stderr
    arguments = [*arguments, "--overwrite"]
    unknown = CliRunner().invoke(app, [*arguments, "--generator", str(tmp_path / "nowhere")])
    assert unknown.exit_code == 1
    assert "has no record of the scans that trained it" in unknown.stderr


def test_the_bundled_generator_knows_what_trained_it(data_folder: Path, tmp_path: Path) -> None:
    arguments = ["splits", str(data_folder / "Task04_Hippocampus"), "--generator", "hippocampus-mr"]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "splits.json")])
    assert "204 cases: 60 validate once each, 0 synthetic ones and 144 real ones only train" in done.stderr
