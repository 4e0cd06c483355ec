"""Montages: what is drawn, and that it does not depend on how a volume is stored."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from diffaug.figures import COLOURS, montage


def case(shape: tuple[int, int, int] = (20, 30, 24)) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    label = np.zeros(shape, np.int16)
    label[4:9, 5:20, 6:18] = 1
    label[4:9, 20:26, 6:18] = 2
    return image, label


def pixels(file: Path, colour: str) -> int:
    """Number of pixels of about one colour."""
    difference = np.abs(imread(file)[..., :3] - np.array(to_rgb(colour)))
    return int((difference.max(axis=-1) < 0.02).sum())


def test_equal_volumes_give_equal_bytes_however_they_are_stored(tmp_path: Path) -> None:
    image, label = case()
    affine = np.diag([1.0, 2.0, 1.5, 1.0])
    montage([image], [label], ["case"], tmp_path / "a.png", affines=[affine], heading="one", footer="two")
    stored = nib.Nifti1Image(image, affine).as_reoriented(
        nib.orientations.axcodes2ornt(("P", "S", "R"), labels=(("L", "R"), ("P", "A"), ("I", "S")))
    )
    marks = nib.Nifti1Image(label, affine).as_reoriented(
        nib.orientations.axcodes2ornt(("P", "S", "R"), labels=(("L", "R"), ("P", "A"), ("I", "S")))
    )
    montage(
        [np.asarray(stored.dataobj)[None]],
        [np.asarray(marks.dataobj)[None]],
        ["case"],
        tmp_path / "b.png",
        affines=[stored.affine],
        heading="one",
        footer="two",
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert stored.shape != image.shape


def test_labels_are_outlined_in_all_planes_and_named(tmp_path: Path) -> None:
    image, label = case()
    montage(
        [image, image],
        [label, None],
        ["a", "b"],
        tmp_path / "both.png",
        names={0: "background", 1: "x", 2: "y"},
    )
    montage([image], [label * 0], ["a"], tmp_path / "none.png", names={1: "x"})
    montage([image], [None], ["a"], tmp_path / "unlabelled.png")
    outlines = [pixels(tmp_path / "both.png", colour) for colour in COLOURS[:3]]
    assert outlines[0] > 300
    assert outlines[1] > 100
    assert outlines[2] == 0
    assert 0 < pixels(tmp_path / "none.png", COLOURS[0]) < 100  # the legend's line
    assert pixels(tmp_path / "unlabelled.png", COLOURS[0]) == 0


def test_volumes_have_one_scale(tmp_path: Path) -> None:
    """A bright cube of 10 mm is as large in voxels of 1 mm as in voxels of 2 mm, among larger things."""
    fine, coarse = np.zeros((20, 20, 20)), np.zeros((20, 20, 20))
    fine[5:15, 5:15, 5:15] = 1
    coarse[8:13, 8:13, 8:13] = 1
    montage(
        [fine, coarse],
        [None, None],
        ["", ""],
        tmp_path / "m.png",
        affines=[np.eye(4), np.diag([2, 2, 2, 1.0])],
    )
    picture = imread(tmp_path / "m.png")[..., :3].mean(axis=-1) > 0.5
    half = picture.shape[0] // 2
    upper, lower = picture[:half].sum(), picture[half:].sum()
    assert 0.8 < upper / lower < 1.25
    assert upper > 1000


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_any_number_of_volumes(tmp_path: Path, count: int) -> None:
    image, _ = case((8, 8, 8))
    montage([image] * count, [None] * count, ["t"] * count, tmp_path / "m.png")
    rows = count if count <= 3 else -(-count // 2)
    assert imread(tmp_path / "m.png").shape[0] == pytest.approx(110 * (0.85 + 2 * rows), abs=2)


def test_a_constant_volume_is_drawn(tmp_path: Path) -> None:
    montage([np.full((8, 8, 8), 5.0)], [None], ["flat"], tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 0


def test_input_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    image, label = case()
    with pytest.raises(ValueError, match="2 volumes, 1 labels"):
        montage([image, image], [label], ["a", "b"], tmp_path / "m.png")
    with pytest.raises(ValueError, match="0 volumes"):
        montage([], [], [], tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"shape \(4, 30, 24\) does not fit"):
        montage([image], [label[:4]], ["a"], tmp_path / "m.png")
    assert not list(tmp_path.iterdir())
