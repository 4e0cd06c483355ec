"""Cases on the grid of an audit: where they lie, what is measured, and what is kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import diffaug.audit.volumes
from diffaug.audit.volumes import LEVELS, MOST_VOXELS, CaseSet, audit_grid, collect
from diffaug.datasets.building import build_dataset
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DatasetError, DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.grid import Grid
from diffaug.progress import Progress
from tests.audit.world import AFFINE, GRID, SHAPE, Person, Scan, write_decathlon


def collected(folder: Path, grid: Grid = GRID, cache: Path | None = None) -> CaseSet:
    dataset = read_dataset(folder)
    return collect(dataset, dataset.cases, grid, cache or folder / "cache", Progress(quiet=True), folder.name)


def centred(spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """The affine of a volume in RAS order around the world's origin."""
    return Grid(("R", "A", "S"), spacing, shape).affine


def waves(affine: np.ndarray, shape: tuple[int, int, int]) -> Scan:
    """Slow waves in the world at the voxels of a volume, and a label that covers the volume's half."""
    index = np.stack([*np.indices(shape), np.ones(shape)])
    x, y, z, _ = np.einsum("ab,bijk->aijk", affine, index)
    image = 500 + 100 * (np.sin(x / 6) + np.cos(y / 7 + 1) + np.sin(z / 8 + x / 20))
    return Scan(image.astype(np.float32), (x > 0).astype(np.uint8))


# -------- the grid


def empty_dataset(folder: Path, geometries: list[tuple[tuple[int, int, int], np.ndarray]]) -> Dataset:
    """Unlabelled volumes of these shapes and affines."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number, (shape, affine) in enumerate(geometries):
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), affine), folder / "imagesTr" / f"{number}.nii.gz")
    return read_dataset(folder)


def test_the_grid_is_the_median_volume_in_multiples_of_eight(tmp_path: Path) -> None:
    turned = np.array([[0, 0, -1.0, 0], [2.0, 0, 0, 0], [0, -3.0, 0, 0], [0, 0, 0, 1]])
    dataset = empty_dataset(
        tmp_path / "turned",
        [
            # Axes (A, I, L) with sides 20, 30, 17: (R, A, S) has sides 17, 20, 30 and 1 x 2 x 3 mm.
            ((20, 30, 17), turned),
            ((16, 24, 32), np.diag([1.0, 2, 3, 1])),
            ((40, 10, 31), np.diag([9.0, 9, 9, 1])),
        ],
    )
    assert audit_grid(dataset) == Grid(("R", "A", "S"), (1.0, 2.0, 3.0), (24, 24, 32))


@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (65, 64, 64), (128, 128, 128), (200, 160, 24), (512, 512, 3), (3, 5, 7)]
)
def test_large_grids_are_coarsened_and_cover_the_volume(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    spacing = np.array([0.8, 0.8, 1.5])
    grid = audit_grid(empty_dataset(tmp_path / "large", [(shape, np.diag([*spacing, 1.0]))]))
    sides = np.array(grid.shape)
    assert (sides % 8 == 0).all()
    factors = np.array(grid.spacing) / spacing
    assert factors == pytest.approx(np.full(3, factors[0]))
    assert factors[0] == pytest.approx(1) if np.prod(shape) <= MOST_VOXELS else factors[0] > 1
    assert sides.prod() <= 1.2 * MOST_VOXELS
    assert (sides * grid.spacing >= 0.99 * np.array(shape) * spacing).all()
    assert (sides - 8 < np.array(shape) / factors).all()


def test_a_built_dataset_is_compared_on_its_generators_grid(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    folder = tmp_path / "Dataset901_Tiny"
    build_dataset(tiny_generator, folder, cases=1, steps=1)
    assert audit_grid(read_dataset(folder)) == Grid(("R", "A", "S"), (1.5, 1.5, 1.5), (16, 24, 16))


def test_a_file_without_header_is_named(tmp_path: Path) -> None:
    dataset = empty_dataset(tmp_path / "broken", [(SHAPE, AFFINE)])
    (tmp_path / "broken" / "imagesTr" / "0.nii.gz").write_bytes(b"no NIfTI")
    with pytest.raises(DatasetError, match=r"0\.nii\.gz cannot be read"):
        audit_grid(dataset)


# -------- where cases lie


def test_a_scan_lies_alike_whatever_its_orientation(tmp_path: Path) -> None:
    affine = centred((2, 2, 2), SHAPE)
    scan = Person(np.random.default_rng(0)).scan()
    plain = collected(write_decathlon(tmp_path / "plain", {"a": scan}, affine)).images
    flip = np.eye(4)
    flip[1, 1], flip[1, 3] = -1, SHAPE[1] - 1
    flipped = Scan(*(array[:, ::-1].copy() for array in scan))
    turn = np.eye(4)[[2, 0, 1, 3]]
    turned = Scan(*(array.transpose(1, 2, 0).copy() for array in scan))
    for name, other, moved in (("flipped", flipped, affine @ flip), ("turned", turned, affine @ turn)):
        assert np.array_equal(collected(write_decathlon(tmp_path / name, {"a": other}, moved)).images, plain)


def test_a_scan_lies_alike_whatever_its_spacing(tmp_path: Path) -> None:
    found = []
    for spacing, shape in (((2, 2, 2), SHAPE), ((1, 2, 1.6), (32, 16, 20)), ((4, 1.6, 2), (8, 20, 16))):
        affine = centred(spacing, shape)
        folder = tmp_path / f"{shape}"
        found.append(collected(write_decathlon(folder, {"a": waves(affine, shape)}, affine)))
    plain = found[0].images[0, 0].astype(float)
    for other in found[1:]:
        # Away from the border, where the coarser one is extrapolated.
        inner = (slice(2, -2),) * 3
        difference = other.images[0, 0].astype(float)[inner] - plain[inner]
        assert np.abs(difference).mean() < 0.1
        assert np.corrcoef(other.images[0, 0].ravel(), plain.ravel())[0, 1] > 0.98


def test_in_a_larger_scan_the_label_is_looked_at(tmp_path: Path) -> None:
    small = Person(np.random.default_rng(1)).scan()
    image, label = np.zeros((40, 30, 44), np.int16), np.zeros((40, 30, 44), np.uint8)
    low, high = (np.argwhere(small.label > 0).min(0), np.argwhere(small.label > 0).max(0) + 1)
    at = np.array([20, 6, 25])
    place = tuple(slice(a, a + n) for a, n in zip(at, SHAPE, strict=True))
    image[place], label[place] = small
    found = collected(write_decathlon(tmp_path / "large", {"a": Scan(image, label)}))
    # The grid lies around the middle of the label.
    middle = at + np.ceil((low + high) / 2 - 8).astype(int)
    box = tuple(slice(a, a + 16) for a in middle)
    expected = image[box].astype(float)
    assert np.corrcoef(found.images[0, 0].ravel(), expected.ravel())[0, 1] > 0.98
    unlabelled = write_decathlon(tmp_path / "unlabelled", {"a": Scan(image, label)}, labels={})
    with pytest.raises(
        DiffaugError, match=r"a\.nii\.gz cannot be compared .* the volume's axis 0 is 80 mm long"
    ):
        collected(unlabelled)


def test_beyond_a_scan_the_grid_shows_what_its_generator_was_fitted_to(tmp_path: Path) -> None:
    image = np.random.default_rng(2).uniform(100, 900, (16, 16, 10)).astype(np.float32)
    folder = write_decathlon(tmp_path / "short", {"a": Scan(image, np.ones(image.shape, np.uint8))})
    mirrored = collected(folder).images[0, 0]
    assert np.array_equal(mirrored[..., 2], mirrored[..., 4])
    background = collected(folder, dataclasses.replace(GRID, outside="background")).images[0, 0]
    inside = background[..., 3:13]
    assert (background[..., :3] == inside.min()).all()
    assert (background[..., 13:] == inside.min()).all()


# -------- what is measured


def test_volumes_are_standardised_and_their_measures_exact(tmp_path: Path) -> None:
    people = np.random.default_rng(3)
    scans = {name: Person(people).scan() for name in "ab"}
    found = collected(write_decathlon(tmp_path / "two", scans))
    assert (found.names, len(found)) == (("a", "b"), 2)
    assert found.images.shape == (2, 1, *SHAPE)
    volumes = found.images.astype(float)
    assert volumes.mean((2, 3, 4)) == pytest.approx(np.zeros((2, 1)), abs=2e-3)
    assert volumes.std((2, 3, 4)) == pytest.approx(np.ones((2, 1)), abs=2e-3)
    assert found.intensities.shape == (2, 1, 33)
    assert np.allclose(found.intensities[:, 0], np.quantile(volumes[:, 0], LEVELS, (1, 2, 3)).T, atol=5e-3)
    for number, name in enumerate("ab"):
        for axis in range(3):
            slices = np.moveaxis(volumes[number, 0], axis, 0).reshape(16, -1)
            expected = np.mean([np.corrcoef(slices[n], slices[n + 1])[0, 1] for n in range(15)])
            assert found.consistency[number, axis] == pytest.approx(expected, abs=2e-3)
        for label, title in ((1, "core"), (2, "shell")):
            # A voxel has 8 mm^3.
            volume = 8 * (scans[name].label == label).sum()
            assert found.label_volumes[title][number] == pytest.approx(volume)
    assert set(found.label_volumes) == {"core", "shell"}


def test_slices_of_a_ramp_are_constant_along_it_and_alike_across(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(16.0)[:, None, None], SHAPE).astype(np.float32)
    found = collected(write_decathlon(tmp_path / "ramp", {"a": Scan(ramp, np.zeros(SHAPE, np.uint8))}))
    assert found.consistency[0] == pytest.approx([0, 1, 1], abs=1e-6)


def test_empty_slices_count_as_no_correlation(tmp_path: Path) -> None:
    image = np.full(SHAPE, 37, np.int16)
    image[4:8] = np.random.default_rng(8).integers(100, 900, (16, 16))
    found = collected(write_decathlon(tmp_path / "empty", {"a": Scan(image, np.zeros(SHAPE, np.uint8))}))
    # Four equal slices among sixteen: three of fifteen pairs.
    assert found.consistency[0, 0] == pytest.approx(3 / 15, abs=1e-6)


def test_label_volumes_are_in_millimetres_and_none_without_a_label_map(tmp_path: Path) -> None:
    scan = Person(np.random.default_rng(4)).scan()
    folder = write_decathlon(tmp_path / "some", {"a": scan, "b": scan}, np.diag([2.0, -1.5, 0.5, 1]))
    description = json.loads((folder / "dataset.json").read_text())
    del description["training"][1]["label"]
    (folder / "dataset.json").write_text(json.dumps(description))
    for _ in range(2):
        volumes = collected(folder, Grid(("R", "A", "S"), (2, 1.5, 0.5), SHAPE)).label_volumes["core"]
        assert volumes[0] == pytest.approx(1.5 * (scan.label == 1).sum())
        assert np.isnan(volumes[1])


def test_batches_are_float32_volumes_in_order(tmp_path: Path) -> None:
    people = np.random.default_rng(5)
    found = collected(write_decathlon(tmp_path / "three", {name: Person(people).scan() for name in "abc"}))
    batch = found.batch([2, 0])
    assert batch.shape == (2, 1, *SHAPE)
    assert np.array_equal(batch.numpy(), found.images[[2, 0]].astype(np.float32))


# -------- what is kept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    people = np.random.default_rng(6)
    return write_decathlon(tmp_path / "kept", {name: Person(people).scan() for name in "abc"})


def test_kept_volumes_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = collected(folder)

    def refuse(case: CaseFiles) -> None:
        raise AssertionError(f"{case.name} was read again")

    monkeypatch.setattr(diffaug.audit.volumes, "load_case", refuse)
    again = collected(folder)
    for field in dataclasses.fields(CaseSet):
        one, other = getattr(first, field.name), getattr(again, field.name)
        if isinstance(one, np.ndarray):
            assert np.array_equal(one, other)
    assert again.files == first.files
    assert again.label_volumes.keys() == first.label_volumes.keys()


def test_an_altered_file_another_grid_and_another_choice_are_read_anew(folder: Path) -> None:
    hashes = {collected(folder).files, collected(folder, dataclasses.replace(GRID, shape=(16, 16, 24))).files}
    dataset = read_dataset(folder)
    quiet = Progress(quiet=True)
    hashes.add(collect(dataset, dataset.cases[:2], GRID, folder / "cache", quiet, "").files)
    image = nib.load(folder / "imagesTr" / "b.nii.gz")
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), folder / "imagesTr" / "b.nii.gz")
    hashes.add(collected(folder).files)
    label = nib.load(folder / "labelsTr" / "c.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), label.affine), folder / "labelsTr" / "c.nii.gz")
    altered = collected(folder)
    assert len({*hashes, altered.files}) == 5
    assert altered.label_volumes["core"][2] == pytest.approx(8 * 16**3)


def test_a_set_is_the_same_in_whatever_order_it_is_given(folder: Path) -> None:
    dataset = read_dataset(folder)
    given, turned = (
        collect(dataset, cases, GRID, folder / "cache", Progress(quiet=True), "")
        for cases in (dataset.cases, dataset.cases[::-1])
    )
    assert turned.files == given.files
    assert turned.names == given.names == tuple(sorted(given.names))
    assert turned.patients == given.patients


def test_renamed_labels_are_not_taken_from_what_was_kept(folder: Path) -> None:
    before = collected(folder).label_volumes
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(
        json.dumps(description | {"labels": {"0": "background", "1": "inner", "2": "outer"}})
    )
    after = collected(folder).label_volumes
    assert set(after) == {"inner", "outer"}
    assert np.array_equal(after["inner"], before["core"])


def test_patients_are_those_of_the_table_though_volumes_were_kept(folder: Path) -> None:
    assert collected(folder).patients == ("a", "b", "c")
    (folder / "patients.csv").write_text("case,patient\na,P1\nb,P1\nc,P2\n")
    assert collected(folder).patients == ("P1", "P1", "P2")


def test_an_interrupted_collection_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = diffaug.audit.volumes.load_case

    def interrupted(case: CaseFiles) -> Any:
        if case.name == "c":
            raise KeyboardInterrupt
        return read(case)

    monkeypatch.setattr(diffaug.audit.volumes, "load_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collected(folder)
    assert not list((folder / "cache").iterdir())
    monkeypatch.undo()
    assert len(collected(folder)) == 3


def test_missing_files_and_wrong_channels_are_named(folder: Path) -> None:
    dataset = read_dataset(folder)
    both = np.stack([np.zeros(SHAPE, np.float32)] * 2, -1)
    nib.save(nib.Nifti1Image(both, AFFINE), folder / "imagesTr" / "a.nii.gz")
    with pytest.raises(DatasetError, match=r"a\.nii\.gz has 2 channels, the dataset 1"):
        collected(folder)
    (folder / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"labelsTr/b\.nii\.gz is missing"):
        collect(dataset, dataset.cases, GRID, folder / "cache", Progress(quiet=True), "")
