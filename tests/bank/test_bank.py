"""Banks: what is built, that a build resumes, and that what comes out is what the operations make."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from typer.testing import CliRunner

from diffaug.bank import Bank
from diffaug.bank.building import Built, build_bank
from diffaug.cli import app
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.training_scans import record_training_scans
from diffaug.errors import DatasetError, DiffaugError, LabelError, LeakError
from diffaug.operations import Case, Operation, Repaint, Variation, apply
from diffaug.progress import Progress
from diffaug.transforms.batch import BatchInpainting
from diffaug.transforms.monai import RandFromBankd, RandVariationd
from diffaug.transforms.torchio import FromBank, RandomFromBank, RandomRepaint, RandomVariation
from tests.conftest import make_tiny_generator
from tests.operations.test_operations import AFFINE, make_case

CASES = ("case_a", "case_b", "case_c")

WORKERS = """
import sys
import torch
import torchio as tio
from diffaug.transforms.torchio import RandomFromBank
from tests.bank.test_bank import subject_of

if __name__ == "__main__":
    bank, data, method = sys.argv[1:]
    subjects = [subject_of(data, name) for name in ("case_a", "case_b") * 3]
    dataset = tio.SubjectsDataset(subjects, transform=RandomFromBank(bank, p=1))
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        loader = tio.SubjectsLoader(
            dataset, batch_size=2, num_workers=2, multiprocessing_context=method, collate_fn=list
        )
        runs.append([subject for batch in loader for subject in batch])
    for plain, first, second in zip(subjects, *runs, strict=True):
        assert torch.equal(first["t1"].data, second["t1"].data)
        assert not torch.equal(first["t1"].data, plain["t1"].data)
    print("drawn", len(runs[0]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled cases in two folders, the last one held out."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(CASES):
        image, label = make_case()
        for kind, array in (
            ("imagesTr", image[0].numpy() + np.int16(number)),
            ("labelsTr", label[0].numpy()),
        ):
            (folder / kind).mkdir(exist_ok=True)
            suffix = "_0000" if kind == "imagesTr" else ""
            nib.save(nib.Nifti1Image(array, AFFINE), folder / kind / f"{name}{suffix}.nii.gz")
    description = {
        "name": "Things",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "head": 1, "body": 2},
        "file_ending": ".nii.gz",
        "numTraining": 3,
        "licence": "CC0-1.0",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    split = {"train": ["case_a", "case_b"], "validation": ["case_c"], "test": []}
    (folder / "splits.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def dataset(data: Path) -> Dataset:
    return read_dataset(data)


@pytest.fixture(scope="module")
def bank(dataset: Dataset, tiny_generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        Variation(tiny_generator_folder, steps=2), dataset, tmp_path_factory.mktemp("banks") / "vary"
    )


@pytest.fixture(scope="module")
def repaints(dataset: Dataset, tiny_generator_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    operation = Repaint(tiny_generator_folder, amplitude=4, steps=2)
    return build(operation, dataset, tmp_path_factory.mktemp("banks") / "repaint")


def build(operation: Operation, dataset: Dataset, folder: Path) -> Path:
    assert build_bank(operation, dataset, folder, per_case=3) == Built(made=2, kept=0)
    return folder


def subject_of(data: Path | str, name: str) -> tio.Subject:
    """A case from its files."""
    return tio.Subject(
        t1=tio.ScalarImage(Path(data) / "imagesTr" / f"{name}_0000.nii.gz"),
        seg=tio.LabelMap(Path(data) / "labelsTr" / f"{name}.nii.gz"),
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*"))}


# -------- building


@pytest.mark.parametrize("kind", ["bank", "repaints"])
def test_holds_what_the_operation_makes(data: Path, kind: str, request: pytest.FixtureRequest) -> None:
    opened = Bank(request.getfixturevalue(kind))
    assert list(opened.cases) == ["case_a", "case_b"]
    for name, case in opened.cases.items():
        subject = subject_of(data, name)
        given = Case(subject["t1"].data, subject["seg"].data)
        assert len({json.dumps(p) for p in case.parameters}) == 3
        for entry, parameters in enumerate(case.parameters):
            made, expected = opened.draw(case, entry), apply(parameters, given, np.array(case.affine))
            assert made.image.dtype == torch.int16
            assert torch.equal(made.image, expected.image)
            if kind == "repaints":
                assert torch.equal(made.label, expected.label)
            else:
                assert made.label is None
    settings = opened.settings
    assert (settings.generator, settings.dataset, settings.licence) == ("tiny", "Things", "CC0-1.0")
    assert settings.generator_licence == "CC0-1.0"


def test_a_stopped_build_goes_on_to_the_same_bytes(
    bank: Path, dataset: Dataset, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    operation = Variation(tiny_generator_folder, steps=2)
    build_bank(operation, dataset, tmp_path, per_case=3)
    (tmp_path / "cases" / "case_b.json").unlink()
    (tmp_path / "cases" / "case_b.npy").write_bytes(b"half")
    with pytest.raises(DiffaugError, match=r"not finished: 1 of 2 cases are missing, such as case_b"):
        Bank(tmp_path).cases  # noqa: B018
    assert build_bank(operation, dataset, tmp_path, per_case=3) == Built(made=1, kept=1)
    assert bytes_of(tmp_path) == bytes_of(bank)


def test_other_settings_need_another_folder(
    bank: Path, dataset: Dataset, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DiffaugError, match=r"holds a bank of other settings \(ranges\)"):
        build_bank(Variation(tiny_generator_folder, 0.3, steps=2), dataset, bank, per_case=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DiffaugError, match="is not empty and holds no bank"):
        build_bank(Variation(tiny_generator_folder), dataset, tmp_path)


def test_a_case_that_cannot_be_varied_is_named(
    tiny_generator_folder: Path, tmp_path: Path, data: Path
) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (tmp_path / kind).mkdir()
        for file in (data / kind).iterdir():
            (tmp_path / kind / file.name).write_bytes(file.read_bytes())
    description = json.loads((data / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    file = tmp_path / "labelsTr" / "case_b.nii.gz"
    label = nib.load(file)
    voxels = np.asarray(label.dataobj).copy()
    voxels[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(voxels, label.affine), file)
    with pytest.raises(DiffaugError, match=r"case_b_0000.nii.gz: label id\(s\) \[9\]"):
        build_bank(Variation(tiny_generator_folder), read_dataset(tmp_path), tmp_path / "bank", per_case=1)


def test_command(data: Path, tiny_generator_folder: Path, bank: Path, tmp_path: Path) -> None:
    arguments = ["bank", "build", "--data", str(data), "--generator", str(tiny_generator_folder)]
    arguments += ["--per-case", "3", "--steps", "2", "--device", "cpu", "--output", str(tmp_path / "made")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "made")
    assert bytes_of(tmp_path / "made") == bytes_of(bank)
    again = CliRunner().invoke(app, arguments)
    assert "2 cases: 0 made, 2 kept from before" in again.stderr


# -------- TorchIO


def test_torchio(bank: Path, data: Path) -> None:
    subject = subject_of(data, "case_a")
    opened = Bank(bank)
    torch.manual_seed(0)
    drawn = [RandomFromBank(bank, p=1)(subject) for _ in range(12)]
    entries = {s.applied_transforms[0][1]["entry"] for s in drawn}
    assert entries == {0, 1, 2}
    for made in drawn:
        (name, arguments) = made.applied_transforms[0]
        assert name == "FromBank"
        assert json.loads(json.dumps(arguments)) == arguments
        expected = opened.draw(opened.cases["case_a"], arguments["entry"])
        assert torch.equal(made["t1"].data, expected.image)
        assert torch.equal(made["seg"].data, subject["seg"].data)
        assert torch.equal(made.history[0](subject)["t1"].data, made["t1"].data)
    assert len(pickle.dumps(RandomFromBank(bank))) < 2000
    assert repr(RandomFromBank(bank, p=0.2)) == f"RandomFromBank(bank={bank}, p=0.2, label=None)"


def test_torchio_repaints_change_the_label(repaints: Path, data: Path) -> None:
    subject = subject_of(data, "case_b")
    made = FromBank(repaints, 1)(subject)
    expected = Bank(repaints).draw(Bank(repaints).cases["case_b"], 1)
    assert torch.equal(made["t1"].data, expected.image)
    assert torch.equal(made["seg"].data, expected.label)
    assert not torch.equal(made["seg"].data, subject["seg"].data)


def test_images_on_another_grid_are_refused(bank: Path, data: Path) -> None:
    with pytest.raises(DiffaugError, match=r"t1 and case_a in .* are not on one grid.*before all that move"):
        tio.Compose([tio.ToCanonical(), RandomFromBank(bank, p=1)])(subject_of(data, "case_a"))


def test_cases_that_are_not_in_it_are_refused(bank: Path, data: Path) -> None:
    """Such as those that were held out."""
    with pytest.raises(DatasetError, match=r"holds no variations of .*case_c.*for 2 cases of Things"):
        RandomFromBank(bank, p=1)(subject_of(data, "case_c"))
    image, _ = make_case()
    with pytest.raises(DiffaugError, match="by the names of its files"):
        RandomFromBank(bank, p=1)(tio.Subject(t1=tio.ScalarImage(tensor=image, affine=AFFINE)))


def test_another_bank_does_not_replay(bank: Path, repaints: Path, data: Path) -> None:
    made = RandomFromBank(bank, p=1)(subject_of(data, "case_a"))
    arguments = dict(made.applied_transforms[0][1], bank=str(repaints))
    with pytest.raises(DiffaugError, match="is another bank than the one that was recorded"):
        FromBank(**arguments)(subject_of(data, "case_a"))


def test_folders_that_are_no_bank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match=r"bank.json cannot be read: .*is .* a bank\?"):
        RandomFromBank(tmp_path)
    (tmp_path / "bank.json").write_text('{"format": 1}')
    with pytest.raises(DiffaugError, match="is no part of a bank, or damaged"):
        RandomFromBank(tmp_path)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(bank: Path, data: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, script, str(bank), str(data), method],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "drawn 6" in process.stdout, process.stderr


# -------- MONAI


def test_monai(bank: Path, repaints: Path, data: Path) -> None:
    items = [
        {
            "image": str(data / "imagesTr" / f"{name}_0000.nii.gz"),
            "label": str(data / "labelsTr" / f"{name}.nii.gz"),
        }
        for name in ("case_a", "case_b")
    ]
    keys = ["image", "label"]
    for folder in (bank, repaints):
        opened = Bank(folder)
        transform = Compose(
            [LoadImaged(keys), EnsureChannelFirstd(keys), RandFromBankd("image", folder, prob=1)]
        ).set_random_state(1)
        plain = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])
        cached = CacheDataset(items, transform, num_workers=0, progress=False)
        seen = set()
        for _ in range(8):
            for item, made in zip(items, cached, strict=True):
                record = made["image"].applied_operations[-1]["extra_info"]
                seen.add(record["entry"])
                expected = opened.draw(opened.cases[record["case"]], record["entry"])
                assert torch.equal(made["image"].as_tensor(), expected.image.float())
                label = plain(item)["label"].as_tensor() if expected.label is None else expected.label.float()
                assert torch.equal(made["label"].as_tensor(), label)
        assert seen == {0, 1, 2}
        batches: list[Any] = list(DataLoader(cached, batch_size=2, num_workers=2))
        assert batches[0]["image"].shape[0] == 2
        back = transform.inverse(transform(items[0]))
        assert [entry["class"] for entry in back["image"].applied_operations] == []
    with pytest.raises(RuntimeError) as caught:
        transform({key: value.replace("case_a", "case_c") for key, value in items[0].items()})
    assert "holds no variations of" in str(caught.value.__cause__)


# -------- what is drawn must belong to what is there


def test_images_that_were_changed_before_are_refused(bank: Path, data: Path) -> None:
    """Also where shape and affine stay: a mirrored subject would keep its mirrored label map."""
    subject = subject_of(data, "case_a")
    for before in (tio.Flip(0), tio.RescaleIntensity((0, 1)), tio.RandomElasticDeformation(p=1)):
        with pytest.raises(DiffaugError, match=r"is not the scan of which .* draw before anything changes"):
            tio.Compose([before, RandomFromBank(bank, p=1)])(subject)
    keys = ["image", "label"]
    items = {
        "image": str(held_out_files(data, "case_a")[0]),
        "label": str(data / "labelsTr" / "case_a.nii.gz"),
    }
    draw = RandFromBankd("image", bank, prob=1)
    loaded = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])(items)
    draw(loaded)
    loaded["image"] += 1
    with pytest.raises(DiffaugError, match="draw before anything changes"):
        draw(loaded)


def test_a_scan_that_changed_is_varied_anew(
    tiny_generator_folder: Path, data: Path, dataset: Dataset, tmp_path: Path
) -> None:
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    operation = Variation(tiny_generator_folder, steps=1)
    build_bank(operation, read_dataset(copied), tmp_path / "bank", per_case=1)
    file = copied / "imagesTr" / "case_a_0000.nii.gz"
    scan = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[::-1].copy(), scan.affine), file)
    with pytest.raises(DiffaugError, match="if the file has changed, build the bank anew"):
        FromBank(tmp_path / "bank", 0)(subject_of(copied, "case_a"))
    again = build_bank(operation, read_dataset(copied), tmp_path / "bank", per_case=1)
    assert again == Built(made=1, kept=1)


def test_repaints_must_not_leave_other_images_behind(repaints: Path, data: Path) -> None:
    subject = subject_of(data, "case_b")
    subject.add_image(tio.ScalarImage(tensor=subject["t1"].data, affine=subject["t1"].affine), "t2")
    with pytest.raises(DiffaugError, match="t1 and seg get another anatomy, and t2 would still show the old"):
        FromBank(repaints, 0, include=["t1"])(subject)
    made = FromBank(repaints, 0, exclude=["t2"])(subject)
    assert made["seg"].data.dtype == subject["seg"].data.dtype
    with pytest.raises(LabelError, match="name the label map"):
        RandFromBankd("image", repaints, label_key=None)


def test_labels_are_checked_before_anything_is_made(
    dataset: Dataset, tiny_generator_folder: Path, tmp_path: Path
) -> None:
    other = replace(dataset, labels={0: "background", 1: "head", 3: "tail"})
    with pytest.raises(LabelError, match=r"has the label id\(s\) \[3\], which tiny does not know"):
        build_bank(Variation(tiny_generator_folder), other, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_options_of_other_operations_are_refused(data: Path, tmp_path: Path) -> None:
    arguments = ["bank", "build", "--data", str(data), "--output", str(tmp_path / "x")]
    done = CliRunner().invoke(app, [*arguments, "--operation", "repaint", "--region", "box"])
    assert done.exit_code == 2
    assert "--region is for --operation inpainting" in done.stderr


# -------- leaks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no held-out scans were given"),
        ([{"image": "a.nii"}], "held-out scans are image files.*got dict"),
        ([("a.nii", "b.nii")], r"2 files were given for the held-out scan a.nii, .*tiny has 1 channel"),
    ],
)
def test_held_out_scans_that_cannot_be_compared_are_refused(
    tiny_generator_folder: Path, given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RandomVariation(tiny_generator_folder, held_out=given)
    with pytest.raises(ValueError, match="leaks must be 'refuse' or 'warn', got 'error'"):
        RandomVariation(tiny_generator_folder, held_out=["a.nii"], leaks="error")


def test_reoriented_copies_are_recognised(bank: Path, data: Path, tmp_path: Path) -> None:
    scan = nib.as_closest_canonical(nib.load(held_out_files(data, "case_a")[0]))
    nib.save(scan, tmp_path / "canonical.nii.gz")
    with pytest.warns(UserWarning, match="has no record"), pytest.raises(LeakError, match=r"canonical\.nii"):
        RandomFromBank(bank, held_out=[tmp_path / "canonical.nii.gz"])


def held_out_files(data: Path, *names: str) -> list[Path]:
    return [data / "imagesTr" / f"{name}_0000.nii.gz" for name in names]


def test_held_out_scans_must_not_fill_a_bank(bank: Path, data: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "someone.nii"
    scan = nib.load(held_out_files(data, "case_b")[0])
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj).astype(np.float32), scan.affine), renamed)
    files = [*held_out_files(data, "case_c"), renamed]
    message = r"1 of 2 held-out scans are known already, such as .*someone.nii: they fill .*vary"
    for make in (RandomFromBank, lambda folder, **k: RandFromBankd("image", folder, **k)):
        with pytest.warns(UserWarning, match="has no record"), pytest.raises(LeakError, match=message):
            make(bank, held_out=files)
        with pytest.warns(UserWarning, match=message):
            make(bank, held_out=files, leaks="warn")
        with pytest.warns(UserWarning, match="has no record"):
            make(bank, held_out=files[:1])


@pytest.mark.parametrize(
    "make",
    [
        RandomVariation,
        RandomRepaint,
        lambda g, **k: RandVariationd("image", generator=g, **k),
        BatchInpainting,
    ],
)
def test_held_out_scans_must_not_have_trained_the_generator(
    data: Path, dataset: Dataset, tmp_path: Path, make: Any
) -> None:
    make_tiny_generator().save(tmp_path)
    trained = [case for case in dataset.cases if case.name == "case_a"]
    (tmp_path / "private").mkdir()
    record = record_training_scans(trained, Progress(quiet=True))
    (tmp_path / "private" / "training_scans.json").write_text(json.dumps(record))
    make(tmp_path, held_out=held_out_files(data, "case_b", "case_c"))
    with pytest.raises(LeakError, match=r"1 of 2 .*case_a_0000.nii.gz: they trained .*splits.*leaks=.warn"):
        make(tmp_path, held_out=held_out_files(data, "case_a", "case_c"))
    with pytest.warns(UserWarning, match="they trained"):
        make(tmp_path, held_out=held_out_files(data, "case_a"), leaks="warn")
