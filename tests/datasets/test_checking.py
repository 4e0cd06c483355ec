"""Checking datasets: every kind of problem is found, named, and told together with all others."""

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffaug.datasets.checking import check_dataset
from diffaug.datasets.reading import read_dataset
from diffaug.errors import DatasetError, DiffaugError, ExtraError

SHAPE = (6, 7, 8)


def save(file: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), file)


def noise(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def labels(value: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    array = np.zeros(shape, np.int16)
    array[2:4, 2:4, 2:4] = value
    return array


def set_pixdim(file: Path, *sizes: float) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into("<3f", content, 80, *sizes)
    file.write_bytes(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound nnU-Net raw dataset of three cases with two channels, uncompressed."""
    for name in ("a", "b", "c"):
        save(tmp_path / "imagesTr" / f"{name}_0000.nii", noise())
        save(tmp_path / "imagesTr" / f"{name}_0001.nii", noise() ** 2)
        save(tmp_path / "labelsTr" / f"{name}.nii", labels())
    description = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "box": 1},
        "file_ending": ".nii",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    return tmp_path


def problems_of(root: Path) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        check_dataset(read_dataset(root))
    return caught.value.problems


def moved(millimetres: float) -> np.ndarray:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[0, 3] = millimetres
    return affine


def with_voxel(value: float) -> np.ndarray:
    array = noise()
    array[1, 1, 1] = value
    return array


B0, B1, BL = "imagesTr/b_0000.nii", "imagesTr/b_0001.nii", "labelsTr/b.nii"
SPOILED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing label": (BL, Path.unlink, "is missing"),
    "missing channel": (B1, Path.unlink, "is missing"),
    "missing first channel": (B0, Path.unlink, "is missing"),
    "cut short": (B0, lambda file: file.write_bytes(file.read_bytes()[:-1]), "cannot be read as NIfTI"),
    "no scan": (BL, lambda file: file.write_bytes(b"text"), "cannot be read as NIfTI"),
    "label without image": ("labelsTr/z.nii", lambda file: save(file, labels()), "belongs to no case"),
    "channel too many": ("imagesTr/b_0002.nii", lambda file: save(file, noise()), "belongs to no case"),
    "label's shape": (BL, lambda file: save(file, labels(shape=(6, 7, 9))), r"shape \(6, 7, 9\)"),
    "channel's shape": (B1, lambda file: save(file, noise((5, 7, 8))), r"shape \(5, 7, 8\)"),
    "four axes": (B1, lambda file: save(file, noise((*SHAPE, 2))), r"shape \(6, 7, 8, 2\)"),
    "one slice": (B0, lambda file: save(file, noise((6, 7))), r"shape \(6, 7\)"),
    "label moved": (BL, lambda file: save(file, labels(), moved(0.5)), "differ by 0.5 mm"),
    "channel moved": (B1, lambda file: save(file, noise(), moved(0.0011)), "differ by 0.0011 mm"),
    "not a number": (
        B0,
        lambda file: save(file, with_voxel(np.nan)),
        "holds 1 voxels that are NaN or infinite",
    ),
    "infinite": (B1, lambda file: save(file, with_voxel(-np.inf)), "holds 1 voxels that are NaN or infinite"),
    "constant": (B1, lambda file: save(file, np.full(SHAPE, 7, np.int16)), "is 7 everywhere"),
    "unknown label": (BL, lambda file: save(file, labels(5)), r"5 \(8 voxels\); it has 0 background, 1 box"),
    "uneven label": (BL, lambda file: save(file, labels() * np.float32(0.5)), "holds 0.5 where labels"),
    "no voxel size": (B0, lambda file: set_pixdim(file, 1, 0, 3), "voxel size of 1 x 0 x 3 mm"),
    "negative voxel size": (BL, lambda file: set_pixdim(file, 1, 2, -3), "voxel size of 1 x 2 x -3 mm"),
}


def test_a_sound_dataset_passes_and_each_case_is_announced(root: Path) -> None:
    seen: list[str] = []
    check_dataset(read_dataset(root), seen.append)
    assert seen == ["a", "b", "c"]


@pytest.mark.parametrize("spoiled", SPOILED)
def test_each_problem_is_found_named_and_the_only_one(root: Path, spoiled: str) -> None:
    place, spoil, told = SPOILED[spoiled]
    spoil(root / place)
    (problem,) = problems_of(root)
    assert re.search(told, problem)
    assert str(root / place) in problem


def test_a_difference_of_storage_is_no_moved_label(root: Path) -> None:
    save(root / BL, labels(), moved(0.0009))
    check_dataset(read_dataset(root))


def test_a_case_with_one_slice_is_no_volume(root: Path) -> None:
    for place in (B0, B1):
        save(root / place, noise((6, 7, 1)))
    save(root / BL, np.ones((6, 7, 1), np.int16))
    problems = problems_of(root)
    assert len(problems) == 2
    assert all("several slices" in problem for problem in problems)


def test_label_maps_that_are_all_empty_are_one_problem(root: Path) -> None:
    for name in ("a", "b"):
        save(root / "labelsTr" / f"{name}.nii", labels(0))
    check_dataset(read_dataset(root))
    save(root / "labelsTr/c.nii", labels(0))
    (problem,) = problems_of(root)
    assert "none of the 3 readable label maps" in problem


def test_a_file_with_too_few_channels_and_a_name_used_twice(tmp_path: Path) -> None:
    save(tmp_path / "one/x.nii.gz", noise((*SHAPE, 2)))
    save(tmp_path / "two/x.nii.gz", noise((*SHAPE, 3)))
    description = {
        "modality": {"0": "T1", "1": "T2"},
        "labels": {"0": "background"},
        "training": [{"image": "one/x.nii.gz"}, {"image": "two/x.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    problems = problems_of(tmp_path)
    assert len(problems) == 2
    assert "2 cases have the name x" in problems[0]
    assert re.search(r"two/x\.nii\.gz.* 3 channels, the dataset 2 \(T1, T2\)", problems[1])


def test_a_constant_channel_of_a_joint_file_is_named(tmp_path: Path) -> None:
    array = noise((*SHAPE, 2))
    array[..., 1] = 0
    save(tmp_path / "images/a.nii.gz", array)
    save(tmp_path / "labels/a.nii.gz", labels())
    (problem,) = problems_of(tmp_path)
    assert "a.nii.gz (channel 1) is 0 everywhere" in problem


def test_all_problems_are_told_at_once(root: Path) -> None:
    (root / "imagesTr/a_0001.nii").unlink()
    save(root / "imagesTr/a_0000.nii", with_voxel(np.nan))
    save(root / "labelsTr/a.nii", labels(9), moved(2))
    (root / B0).write_bytes(b"")
    save(root / BL, labels(3))
    save(root / "imagesTr/c_0001.nii", np.zeros((6, 7, 9), np.uint8))
    save(root / "labelsTr/z.nii", labels())
    seen: list[str] = []
    with pytest.raises(DatasetError) as caught:
        check_dataset(read_dataset(root), seen.append)
    assert seen == ["a", "b", "c"]
    told = str(caught.value)
    assert told.startswith("9 problems:\n")
    for place, problem in [
        ("labelsTr/z.nii", "belongs to no case"),
        ("imagesTr/a_0001.nii", "missing"),
        ("imagesTr/a_0000.nii", "NaN"),
        ("labelsTr/a.nii", "differ by 2 mm"),
        ("labelsTr/a.nii", "9 (8 voxels)"),
        (B0, "cannot be read"),
        (BL, "3 (8 voxels)"),
        ("imagesTr/c_0001.nii", "is 0 everywhere"),
        ("imagesTr/c_0001.nii", "shape (6, 7, 9)"),
    ]:
        assert any(place in line and problem in line for line in told.splitlines()), (place, problem)


def test_the_real_hippocampi_are_sound(data_folder: Path) -> None:
    check_dataset(read_dataset(data_folder / "Task04_Hippocampus"))


@pytest.mark.parametrize("error", [DatasetError(["one", "two"]), ExtraError("nnU-Net", "nnunet")])
def test_errors_come_back_from_worker_processes(error: DiffaugError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_missing_extra_is_an_import_error_that_names_the_command() -> None:
    with pytest.raises(ImportError, match=r"pip install 'diffaug\[nnunet\]'"):
        raise ExtraError("nnU-Net", "nnunet")
