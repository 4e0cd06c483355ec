"""Building datasets: layouts, provenance, and the same bytes whatever interrupts it."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffaug.cli import app
from diffaug.datasets import building, writing
from diffaug.datasets.building import build_dataset
from diffaug.datasets.checking import check_dataset
from diffaug.datasets.layouts import nifti_bytes
from diffaug.datasets.manifest import read_manifest
from diffaug.datasets.reading import read_dataset
from diffaug.datasets.resuming import STATE
from diffaug.datasets.sources import covered_box
from diffaug.datasets.volumes import load_case
from diffaug.errors import DatasetError, DiffaugError, LabelError, VerbError
from diffaug.generators.generator import Generator, Sample
from diffaug.generators.grid import Grid, place
from diffaug.generators.intensity import fit_intensity_map
from diffaug.generators.labels import CompleteMapping
from diffaug.generators.seeds import case_seed
from tests.conftest import make_tiny_generator

NAME = "Dataset901_Tiny"
FAST = {"steps": 2}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def ball(shape: tuple[int, ...], centre: tuple[int, ...], radius: float = 4) -> np.ndarray:
    """A label map: a ball of two halves, 1 and 2."""
    index = np.indices(shape)
    inside = sum((i - c) ** 2 for i, c in zip(index, centre, strict=True)) <= radius**2
    return np.where(inside, 1 + (index[1] > centre[1]), 0).astype(np.uint8)


def save_case(root: Path, name: str, label: np.ndarray, affine: np.ndarray, scale: float = 1000) -> None:
    """A case of the decathlon's layout; its image is noise, brighter in the label."""
    noise = np.random.default_rng(len(name)).uniform(0, 1, label.shape)
    image = (scale * (noise + (label > 0))).astype(np.int16 if scale > 1 else np.float32)
    for folder, array in (("imagesTr", image), ("labelsTr", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), root / folder / f"{name}.nii.gz")


def describe(root: Path, **changes: Any) -> None:
    """The `dataset.json` of the cases in a folder."""
    names = sorted(path.name for path in (root / "imagesTr").iterdir())
    description = {
        "name": "Balls",
        "licence": "CC-BY 4.0",
        "reference": "Ball et al.",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
    }
    (root / "dataset.json").write_text(json.dumps(description | changes))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three labelled cases: on the generator's grid, turned about, and a scan much larger than the grid."""
    root = tmp_path / "source"
    save_case(root, "a", ball((16, 24, 16), (8, 11, 8)), np.diag([1.5, 1.5, 1.5, 1]))
    turned = np.array([[0, 0, -1.2, 10], [-1.2, 0, 0, 20], [0, 1.2, 0, -30], [0, 0, 0, 1.0]])
    save_case(root, "bb", ball((20, 16, 14), (9, 8, 7)), turned)
    save_case(root, "ccc", ball((50, 44, 48), (12, 30, 36), 6), np.diag([1.0, 1.0, 1.0, 1]))
    describe(root)
    return root


@pytest.fixture
def plain_montage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A montage that costs nothing."""
    monkeypatch.setattr(
        writing, "montage", lambda *args, **kwargs: args[3].write_bytes(repr(args[2]).encode())
    )


# -------- what is written


@pytest.mark.parametrize("layout", ["nnunet", "decathlon"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_sampled_dataset_reads_back(tmp_path: Path, layout: Any, channels: int) -> None:
    generator = make_tiny_generator(channels=channels)
    done = build_dataset(generator, tmp_path / NAME, cases=2, layout=layout, seed=5, **FAST)
    assert (done.cases, done.made, done.kept) == (2, 2, 0)

    dataset = read_dataset(tmp_path / NAME)
    check_dataset(dataset)
    assert dataset.labels == {0: "background", 1: "head", 2: "body"}
    assert list(dataset.channels) == generator.card.channels
    assert dataset.licence == generator.card.licence
    assert [case.name for case in dataset.cases] == ["tiny_sample_00000", "tiny_sample_00001"]
    for index, case in enumerate(dataset.cases):
        sample = generator.sample(1, seed=[case_seed(5, index)], **FAST)
        loaded = load_case(case)
        np.testing.assert_array_equal(loaded.image, np.rint(sample.image[0].numpy()))
        np.testing.assert_array_equal(loaded.label, sample.label[0].numpy())
        np.testing.assert_allclose(loaded.affine, sample.affine)
        assert nib.load(case.images[0]).get_data_dtype() == np.int16
        assert nib.load(case.label).get_data_dtype() == np.uint8


def test_the_manifest_says_where_each_case_comes_from(tiny_generator: Generator, tmp_path: Path) -> None:
    build_dataset(tiny_generator, tmp_path / NAME, cases=2, seed=3, guidance=1.5, **FAST)
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    for index, case in enumerate(manifest.cases):
        assert (case.generator, case.weights, case.verb) == ("tiny", tiny_generator.weights_hash, "sample")
        assert case.seed == case_seed(3, index)
        assert (case.parameters.steps, case.parameters.guidance, case.parameters.strength) == (2, 1.5, None)
        assert case.licence == "CC0-1.0"
        assert case.source is None
    assert set(manifest.versions) == {"diffaug", "torch", "numpy", "python"}
    listed = manifest.files | {path: digest for case in manifest.cases for path, digest in case.files.items()}
    assert set(listed) | {"manifest.json"} == set(contents(tmp_path / NAME))
    assert str(tmp_path) not in (tmp_path / NAME / "manifest.json").read_text()


@pytest.mark.slow
def test_nnunets_own_integrity_check_passes(tmp_path: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    generator = make_tiny_generator(channels=2, labels={0: "nothing", 3: "ignore", 7: "body"})
    build_dataset(generator, tmp_path / NAME, cases=3, **FAST)
    verify_dataset_integrity(str(tmp_path / NAME), num_processes=1)


def test_label_ids_with_gaps_are_numbered_anew_for_nnunet_only(tmp_path: Path) -> None:
    generator = make_tiny_generator(labels={0: "background", 3: "head", 7: "body"})
    build_dataset(generator, tmp_path / NAME, cases=1, **FAST)
    build_dataset(generator, tmp_path / "decathlon", cases=1, layout="decathlon", **FAST)
    theirs, ours = (load_case(read_dataset(tmp_path / n).cases[0]).label for n in (NAME, "decathlon"))
    assert theirs is not None
    assert ours is not None
    assert read_dataset(tmp_path / NAME).labels == {0: "background", 1: "head", 2: "body"}
    assert read_manifest(tmp_path / NAME / "manifest.json").label_ids == {0: 0, 1: 3, 2: 7}
    assert set(np.unique(ours)) <= {0, 3, 7}
    np.testing.assert_array_equal(np.array([0, 3, 7])[theirs], ours)


@pytest.mark.parametrize(
    ("high", "dtype"), [(1.0, np.float32), (255.0, np.float32), (256.0, np.int16), (1e6, np.float32)]
)
def test_images_are_whole_numbers_only_where_these_hold_them(tmp_path: Path, high: float, dtype: Any) -> None:
    generator = make_tiny_generator()
    typical = generator.card.intensity.model_copy(update={"typical": [(0.0, high)]})
    generator.card = generator.card.model_copy(update={"intensity": typical})
    build_dataset(generator, tmp_path / NAME, cases=1, **FAST)
    (image,) = (tmp_path / NAME / "imagesTr").iterdir()
    assert nib.load(image).get_data_dtype() == dtype
    assert np.ptp(nib.load(image).get_fdata()) > 0.1 * high


def test_nifti_files_hold_no_time_and_a_complete_header() -> None:
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, -7], [0, 0, 3, 9], [0, 0, 0, 1.0]])
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    content = nifti_bytes(array, affine, "synthetic")
    assert content[:4] == b"\x1f\x8b\x08\x00"  # no file name
    assert content[4:8] == bytes(4)  # no time
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), array)
    np.testing.assert_allclose(image.header.get_qform(coded=True)[0], affine, atol=1e-6)
    np.testing.assert_allclose(image.header.get_sform(coded=True)[0], affine)
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.header.get_zooms(), (1, 2, 3))
    assert gzip.decompress(content)[112:120] == np.array([1, 0], "<f4").tobytes()  # slope and intercept

    sheared = affine + np.array([[0, 0, 0.5, 0], *np.zeros((3, 4))])
    header = nib.Nifti1Image.from_bytes(gzip.decompress(nifti_bytes(array, sheared, ""))).header
    np.testing.assert_allclose(header.get_best_affine(), sheared)
    assert header["qform_code"] == 0


# -------- painted and varied


def test_painting_takes_label_maps_in_turn_with_other_seeds(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    build_dataset(tiny_generator, tmp_path / NAME, cases=4, verb="paint", source=source / "labelsTr", **FAST)
    dataset = read_dataset(tmp_path / NAME)
    check_dataset(dataset)
    made = [load_case(case) for case in dataset.cases]
    truth = load_case(read_dataset(source).cases[0])
    for index in (0, 3):
        np.testing.assert_array_equal(made[index].label, truth.label)
        np.testing.assert_allclose(made[index].affine, truth.affine)
    assert (made[0].image != made[3].image).mean() > 0.5
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    assert [case.source and case.source.name for case in manifest.cases] == ["a", "bb", "ccc", "a"]
    assert manifest.licence == "CC0-1.0 (generator); CC-BY 4.0 (source: Balls)"
    assert manifest.citation == ["Ball et al."]


def test_varied_cases_are_plain_decodes_where_their_source_lies(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    build_dataset(tiny_generator, tmp_path / NAME, cases=3, verb="vary", source=source, strength=0.4, **FAST)
    records = read_manifest(tmp_path / NAME / "manifest.json").cases
    made = [load_case(case) for case in read_dataset(tmp_path / NAME).cases]
    for index, (case, record, new) in enumerate(zip(read_dataset(source).cases, records, made, strict=True)):
        real = load_case(case)
        assert real.label is not None
        assert record.source is not None
        assert (record.source.name, record.source.cut) == (case.name, 0)
        assert record.parameters.strength == 0.4
        box = record.source.box
        part = tuple(slice(*bounds) for bounds in box)
        np.testing.assert_array_equal(new.label, real.label[:, *part])
        corner = real.affine @ [*(start for start, _ in box), 1]
        np.testing.assert_allclose(new.affine @ [0, 0, 0, 1], corner, atol=1e-4)
        image, label = (
            torch.from_numpy(np.ascontiguousarray(a[None, :, *part])) for a in (real.image, real.label)
        )
        scan = fit_intensity_map(torch.from_numpy(real.image), tiny_generator.card.intensity)
        expected = tiny_generator.vary(
            image,
            label,
            new.affine,
            strength=0.4,
            seed=[case_seed(0, index)],
            residual=False,
            intensity=[scan],
            **FAST,
        )
        np.testing.assert_allclose(new.image, np.rint(expected[0].numpy()), atol=1)
        assert (np.rint(real.image[:, *part]) == new.image).mean() < 0.1
    assert records[2].source is not None
    assert made[2].image.shape[1:] == (24, 36, 24)


def test_only_training_cases_of_a_split_are_varied(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    (source / "splits.json").write_text(json.dumps({"train": ["a", "bb"], "test": ["ccc"]}))
    (source / "patients.csv").write_text("case,patient\na,P1\nbb,P2\nccc,P3\n")
    build_dataset(tiny_generator, tmp_path / NAME, cases=4, verb="vary", source=source, **FAST)
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    used = [(case.source.name, case.source.patient) for case in manifest.cases if case.source]
    assert used == [("a", "P1"), ("bb", "P2"), ("a", "P1"), ("bb", "P2")]
    assert manifest.settings.source is not None
    assert manifest.settings.source.subset == "train"


def test_only_labels_of_training_cases_are_painted(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    (source / "splits.json").write_text(json.dumps({"train": ["bb"], "validation": ["a"], "test": ["ccc"]}))
    arguments: dict[str, Any] = {"cases": 2, "verb": "paint", "source": source / "labelsTr", **FAST}
    build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    assert [case.source.name for case in manifest.cases if case.source] == ["bb", "bb"]
    assert manifest.settings.source is not None
    assert manifest.settings.source.subset == "train"


def test_a_split_counts_where_label_files_are_named_otherwise(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    """A dataset knows its cases by their images' names; held-out label maps stay out all the same."""
    names = ("a", "bb", "ccc")
    for name in names:
        (source / "labelsTr" / f"{name}.nii.gz").rename(source / "labelsTr" / f"{name}_mask.nii.gz")
    pairs = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}_mask.nii.gz"} for n in names]
    describe(source, training=pairs)
    (source / "splits.json").write_text(json.dumps({"train": ["bb"], "validation": ["a", "ccc"]}))
    arguments: dict[str, Any] = {"cases": 2, "verb": "paint", "source": source / "labelsTr", **FAST}
    build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    assert [case.source.name for case in manifest.cases if case.source] == ["bb", "bb"]


def test_label_maps_that_a_split_does_not_name_are_refused(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    """Nobody can tell whether `labelsTs` is held out; a split says that something is."""
    (source / "splits.json").write_text(json.dumps({"train": ["bb"], "validation": ["a", "ccc"]}))
    (source / "labelsTs").mkdir()
    shutil.copy(source / "labelsTr" / "a.nii.gz", source / "labelsTs")
    arguments: dict[str, Any] = {"cases": 1, "verb": "paint", "source": source / "labelsTs", **FAST}
    with pytest.raises(DatasetError, match="labelsTs holds no label map of the cases that the split of"):
        build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    (source / "splits.json").write_text("{")
    with pytest.raises(DatasetError, match=r"splits\.json"):
        build_dataset(tiny_generator, tmp_path / NAME, **{**arguments, "source": source / "labelsTr"})


def test_a_generator_without_labels_to_show_builds_nothing(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(n: int, **settings: Any) -> Sample:
        made = Generator.sample(tiny_generator, n, **settings)
        return made._replace(label=torch.zeros_like(made.label))

    monkeypatch.setattr(tiny_generator, "sample", sample)
    with pytest.raises(DiffaugError, match="label map without any structure"):
        build_dataset(tiny_generator, tmp_path / NAME, cases=1, **FAST)
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_small_ranges_of_a_source_stay_fractions(tiny_generator: Generator, tmp_path: Path) -> None:
    save_case(tmp_path / "s", "a", ball((16, 24, 16), (8, 12, 8)), np.diag([1.5, 1.5, 1.5, 1]), scale=1)
    describe(tmp_path / "s")
    build_dataset(tiny_generator, tmp_path / NAME, cases=1, verb="vary", source=tmp_path / "s", **FAST)
    image = load_case(read_dataset(tmp_path / NAME).cases[0]).image
    assert 0.1 < np.ptp(image) < 5


def test_source_labels_are_mapped_to_the_generators(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"cases": 1, "verb": "paint", "source": source / "labelsTr", **FAST}
    build_dataset(tiny_generator, tmp_path / NAME, label_mapping={1: 2, 2: 1}, **arguments)
    old = load_case(read_dataset(source).cases[0]).label
    new = load_case(read_dataset(tmp_path / NAME).cases[0]).label
    assert old is not None
    np.testing.assert_array_equal(new, np.array([0, 2, 1])[old])

    with pytest.raises(LabelError, match=r"a\.nii\.gz.*holds \[2\], which the table of labels does not name"):
        build_dataset(
            tiny_generator, tmp_path / "Dataset902_Part", label_mapping=CompleteMapping({1: 2}), **arguments
        )
    assert not (tmp_path / "Dataset902_Part").exists()
    other = make_tiny_generator(labels={0: "background", 1: "head", 5: "body"})
    with pytest.raises(LabelError, match=r"a\.nii\.gz.*\[2\].*5: body"):
        build_dataset(other, tmp_path / "Dataset902_Other", **arguments)
    assert not (tmp_path / "Dataset902_Other").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: save_case(root, "a", ball((40, 24, 16), (20, 12, 8), 0) * 0, np.eye(4)),
            "no structure",
        ),
        (
            lambda root: save_case(root, "a", np.ones((90, 90, 90), np.uint8), np.eye(4)),
            "lie outside the 24 x 36 x 24 mm",
        ),
        (lambda root: (root / "labelsTr" / "bb.nii.gz").write_bytes(b"x"), "bb.nii.gz cannot be read"),
        (lambda root: (root / "labelsTr" / "bb.nii.gz").unlink(), "bb.nii.gz is missing"),
        (lambda root: describe(root, modality={"0": "T1", "1": "T2"}), "has the channels T1, T2"),
        (lambda root: describe(root, training=[{"image": "./imagesTr/a.nii.gz"}]), "case a has no label map"),
    ],
)
def test_faults_of_a_source_are_told_before_anything_is_written(
    tiny_generator: Generator, source: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(source)
    with pytest.raises(DatasetError, match=message):
        build_dataset(tiny_generator, tmp_path / NAME, cases=3, verb="vary", source=source, **FAST)
    assert not (tmp_path / NAME).exists()


def test_a_folder_without_label_maps_says_where_they_are(
    tiny_generator: Generator, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=r"holds no label map.*labelsTr meant\?"):
        build_dataset(tiny_generator, tmp_path / NAME, cases=1, verb="paint", source=source)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(6, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 4)] * 3),
    axes=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    where=st.tuples(*[st.floats(0, 0.999)] * 3),
)
def test_the_covered_box_is_covered_whole(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    axes: list[int],
    signs: tuple[int, int, int],
    where: tuple[float, float, float],
) -> None:
    grid = Grid(("R", "A", "S"), (1.5, 1.5, 1.5), (16, 24, 16))
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3)[axes] * signs).T @ np.diag(spacing)
    foreground = np.zeros(shape, bool)
    point = tuple(int(w * n) for w, n in zip(where, shape, strict=True))
    foreground[point] = True
    box = covered_box(grid, foreground, affine)
    part = foreground[tuple(slice(*bounds) for bounds in box)]
    assert part.sum() == 1
    placement = place(grid, part.shape, affine, foreground=torch.from_numpy(np.ascontiguousarray(part)))
    assert tuple(stop - start for start, stop in placement.window()) == placement.source_shape
    for (start, stop), size, side, length in zip(
        box, shape, spacing, np.array([24, 36, 24])[_grid_axes(affine)], strict=True
    ):
        assert 0 <= start < stop <= size
        # It leaves out no more than it must: less than two voxels of what the grid could hold.
        assert stop - start == size or (stop - start + 2) * side > length


def _grid_axes(affine: np.ndarray) -> list[int]:
    """For each array axis, the axis of an RAS grid that it runs along."""
    return [int(axis) for axis in nib.orientations.io_orientation(affine)[:, 0]]


# -------- generators without labels

Make = Callable[..., Generator]


@pytest.mark.parametrize("layout", ["nnunet", "decathlon"])
def test_without_labels_images_alone_are_sampled(
    medical_generator: Make, tmp_path: Path, layout: Any
) -> None:
    generator = medical_generator()
    build_dataset(generator, tmp_path / NAME, cases=2, layout=layout, seed=5, **FAST)
    dataset = read_dataset(tmp_path / NAME)
    check_dataset(dataset)
    assert dataset.labels == {}
    assert dataset.channels == ("MR",)
    assert [case.name for case in dataset.cases] == ["seed_sample_00000", "seed_sample_00001"]
    for index, case in enumerate(dataset.cases):
        loaded = load_case(case)
        assert loaded.label is None
        sample = generator.sample(1, seed=[case_seed(5, index)], **FAST)
        np.testing.assert_array_equal(loaded.image, np.rint(sample.image[0].numpy()))
        np.testing.assert_allclose(loaded.affine, sample.affine)
    assert sorted(path.name for path in (tmp_path / NAME).iterdir()) == [
        "README.md",
        "dataset.json",
        "imagesTr",
        "manifest.json",
        "montage.png",
    ]


def test_a_dataset_without_labels_says_so(medical_generator: Make, tmp_path: Path) -> None:
    build_dataset(medical_generator(), tmp_path / NAME, cases=1, **FAST)
    caveat = "There are no label maps"
    description = json.loads((tmp_path / NAME / "dataset.json").read_text())
    assert caveat in description["description"]
    assert description["labels"] == {"background": 0}
    readme = (tmp_path / NAME / "README.md").read_text()
    assert caveat in readme
    assert "images sampled by the generator seed" in readme
    assert "--sampler ancestral --steps 2 --output" in readme
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    assert caveat in manifest.caveat
    assert manifest.label_ids == {}
    assert set(manifest.cases[0].files) == {"imagesTr/seed_sample_00000_0000.nii.gz"}


def test_monai_reads_the_list_of_images_without_labels(medical_generator: Make, tmp_path: Path) -> None:
    from monai.data import load_decathlon_datalist

    build_dataset(medical_generator(), tmp_path / "set", cases=2, layout="decathlon", **FAST)
    for segmentation in (True, False):
        listed = load_decathlon_datalist(tmp_path / "set" / "dataset.json", segmentation, "training")
        assert [set(entry) for entry in listed] == [{"image"}, {"image"}]
        assert all(Path(entry["image"]).is_file() for entry in listed)


def test_only_the_background_and_no_folder_of_labels_mean_no_labels(
    medical_generator: Make, tmp_path: Path
) -> None:
    """Else label files that were lost would go unnoticed."""
    build_dataset(medical_generator(), tmp_path / NAME, cases=1, **FAST)
    (tmp_path / NAME / "labelsTr").mkdir()
    with pytest.raises(DatasetError, match=r"labelsTr/seed_sample_00000\.nii\.gz is missing"):
        check_dataset(read_dataset(tmp_path / NAME))
    (tmp_path / NAME / "labelsTr").rmdir()
    description = json.loads((tmp_path / NAME / "dataset.json").read_text())
    description["labels"]["liver"] = 1
    (tmp_path / NAME / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DatasetError, match=r"labelsTr/seed_sample_00000\.nii\.gz is missing"):
        check_dataset(read_dataset(tmp_path / NAME))


def test_labels_are_copied_where_they_may_drift(
    medical_generator: Make, source: Path, tmp_path: Path
) -> None:
    generator = medical_generator()
    arguments: dict[str, Any] = {"cases": 4, "verb": "vary", "source": source, "strength": 0.5, **FAST}
    build_dataset(generator, tmp_path / NAME, allow_label_drift=True, **arguments)
    dataset = read_dataset(tmp_path / NAME)
    check_dataset(dataset)
    assert dataset.labels == {0: "background", 1: "front", 2: "back"}
    records = read_manifest(tmp_path / NAME / "manifest.json").cases
    real_cases = read_dataset(source).cases
    for index, (case, record) in enumerate(zip(dataset.cases, records, strict=True)):
        real, made = load_case(real_cases[index % 3]), load_case(case)
        assert real.label is not None
        assert record.source is not None
        assert record.source.cut == 0
        part = tuple(slice(*bounds) for bounds in record.source.box)
        np.testing.assert_array_equal(made.label, real.label[:, *part])
        image, label = (
            torch.from_numpy(np.ascontiguousarray(a[None, :, *part])) for a in (real.image, real.label)
        )
        expected = generator.vary(
            image,
            label,
            made.affine,
            strength=0.5,
            seed=[case_seed(0, index)],
            allow_label_drift=True,
            residual=False,
            intensity=[fit_intensity_map(torch.from_numpy(real.image), generator.card.intensity)],
            **FAST,
        )
        np.testing.assert_allclose(made.image, np.rint(expected[0].numpy()), atol=1)
    assert (load_case(dataset.cases[0]).image != load_case(dataset.cases[3]).image).mean() > 0.5


def test_copied_labels_are_called_copied(medical_generator: Make, source: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"cases": 1, "verb": "vary", "source": source, **FAST}
    build_dataset(medical_generator(), tmp_path / NAME, allow_label_drift=True, **arguments)
    caveat = "Label maps were copied from the source unchanged: the anatomy in the images may have moved"
    assert caveat in json.loads((tmp_path / NAME / "dataset.json").read_text())["description"]
    readme = (tmp_path / NAME / "README.md").read_text()
    assert caveat in readme
    assert "--strength 0.5 --allow-label-drift" in readme
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    assert manifest.caveat == caveat
    assert manifest.settings.parameters.allow_label_drift
    assert all(case.parameters.allow_label_drift for case in manifest.cases)
    assert manifest.licence == "CC0-1.0 (generator); CC-BY 4.0 (source: Balls)"


def test_true_labels_have_no_caveat(tiny_generator: Generator, source: Path, tmp_path: Path) -> None:
    build_dataset(tiny_generator, tmp_path / NAME, cases=1, verb="vary", source=source, **FAST)
    manifest = read_manifest(tmp_path / NAME / "manifest.json")
    assert manifest.caveat == ""
    assert not manifest.settings.parameters.allow_label_drift
    for file in ("README.md", "dataset.json"):
        assert "copied" not in (tmp_path / NAME / file).read_text()


def test_ids_of_copied_labels_are_the_sources(medical_generator: Make, source: Path, tmp_path: Path) -> None:
    label = ball((16, 24, 16), (8, 11, 8)).astype(np.int16) * 300
    nib.save(nib.Nifti1Image(label, np.diag([1.5, 1.5, 1.5, 1])), source / "labelsTr" / "a.nii.gz")
    describe(source, labels={"0": "background", "300": "front", "600": "back"})
    arguments: dict[str, Any] = {"cases": 1, "verb": "vary", "source": source, "allow_label_drift": True}
    build_dataset(medical_generator(), tmp_path / NAME, **arguments, **FAST)
    build_dataset(medical_generator(), tmp_path / "decathlon", layout="decathlon", **arguments, **FAST)
    nnunet, decathlon = (read_dataset(tmp_path / name) for name in (NAME, "decathlon"))
    assert nnunet.labels == {0: "background", 1: "front", 2: "back"}
    assert decathlon.labels == {0: "background", 300: "front", 600: "back"}
    np.testing.assert_array_equal(load_case(nnunet.cases[0]).label, label[None] // 300)
    np.testing.assert_array_equal(load_case(decathlon.cases[0]).label, label[None])
    assert read_manifest(tmp_path / NAME / "manifest.json").label_ids == {0: 0, 1: 300, 2: 600}
    assert "here -> of the source: 1 -> 300, 2 -> 600" in (tmp_path / NAME / "README.md").read_text()


def test_other_names_of_copied_labels_are_other_settings(
    medical_generator: Make, source: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"cases": 1, "verb": "vary", "source": source, "allow_label_drift": True}
    build_dataset(medical_generator(), tmp_path / NAME, **arguments, **FAST)
    describe(source, labels={"0": "background", "1": "front", "2": "top"})
    with pytest.raises(DiffaugError, match=r'source\.labels\.2: "back" there, "top" now'):
        build_dataset(medical_generator(), tmp_path / NAME, **arguments, **FAST)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {},
            LabelError,
            r"seed knows no labels and cannot keep those of the source true.*--allow-label-drift",
        ),
        (
            {"allow_label_drift": True, "label_mapping": {1: 2}},
            LabelError,
            "label_mapping leads to a generator",
        ),
        ({"allow_label_drift": True, "guidance": 2.0}, DiffaugError, "no labels that could guide it"),
        ({"allow_label_drift": True, "steps": 13}, DiffaugError, "at least 1 and at most 12, got 13"),
        (
            {"allow_label_drift": True, "sampler": "heun"},
            DiffaugError,
            "has no sampler 'heun'; it has ancestral",
        ),
        ({"verb": "paint"}, VerbError, "seed has no verb 'paint'"),
    ],
)
def test_what_a_generator_without_labels_cannot_do_is_refused(
    medical_generator: Make,
    source: Path,
    tmp_path: Path,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    arguments = {"cases": 1, "verb": "vary", "source": source} | arguments
    with pytest.raises(error, match=message):
        build_dataset(medical_generator(), tmp_path / NAME, **arguments)
    assert not (tmp_path / NAME).exists()


def test_copied_labels_must_be_named_by_their_dataset(
    medical_generator: Make, source: Path, tmp_path: Path
) -> None:
    describe(source, labels={"0": "background", "1": "front"})
    arguments: dict[str, Any] = {"cases": 1, "verb": "vary", "source": source, "allow_label_drift": True}
    with pytest.raises(DatasetError, match=r"a\.nii\.gz holds labels that the dataset does not name, 2"):
        build_dataset(medical_generator(), tmp_path / NAME, **arguments)
    assert not (tmp_path / NAME).exists()


@pytest.mark.usefixtures("plain_montage")
@pytest.mark.parametrize("verb", ["sample", "vary"])
def test_without_labels_an_interrupted_build_ends_with_the_same_bytes(
    medical_generator: Make, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    generator = medical_generator()
    arguments: dict[str, Any] = {"cases": 3, "verb": verb, **FAST}
    if verb == "vary":
        arguments |= {"source": source, "allow_label_drift": True}
    build_dataset(generator, tmp_path / "whole" / NAME, batch_size=2, **arguments)

    def fail(*_: Any, **__: Any) -> None:
        raise Interruption

    folder = tmp_path / "halted" / NAME
    with monkeypatch.context() as patch:
        patch.setattr(writing, "montage", fail)
        with pytest.raises(Interruption):
            build_dataset(generator, folder, batch_size=1, **arguments)
    (folder / "imagesTr" / f"seed_{verb}_00001_0000.nii.gz").unlink()
    done = build_dataset(generator, folder, batch_size=3, **arguments)
    assert (done.made, done.kept) == (1, 2)
    assert contents(folder) == contents(tmp_path / "whole" / NAME)


def test_the_sampler_is_recorded_with_the_steps_that_are_usual_for_it(
    medical_generator: Make, tmp_path: Path
) -> None:
    generator = medical_generator(steps=60)
    build_dataset(generator, tmp_path / NAME, cases=1, sampler="dpm-solver++")
    parameters = read_manifest(tmp_path / NAME / "manifest.json").cases[0].parameters
    assert (parameters.sampler, parameters.steps) == ("dpm-solver++", 20)
    assert "--sampler dpm-solver++ --steps 20" in (tmp_path / NAME / "README.md").read_text()
    expected = generator.sample(1, seed=[case_seed(0, 0)], sampler="dpm-solver++", steps=20).image[0]
    made = load_case(read_dataset(tmp_path / NAME).cases[0]).image
    np.testing.assert_array_equal(made, np.rint(expected.numpy()))
    other = generator.sample(1, seed=[case_seed(0, 0)], steps=20).image[0]
    assert (made != np.rint(other.numpy())).any()


# -------- the same bytes


@pytest.mark.usefixtures("plain_montage")
@pytest.mark.parametrize("batch_size", [1, 5])
def test_bytes_do_not_depend_on_the_batch_size(
    tiny_generator: Generator, source: Path, tmp_path: Path, batch_size: int
) -> None:
    whole = {"sample": {}, "vary": {"source": source}}
    for verb, more in whole.items():
        folders = [tmp_path / f"{verb}{size}" / NAME for size in (2, batch_size)]
        for folder, size in zip(folders, (2, batch_size), strict=True):
            build_dataset(tiny_generator, folder, cases=5, verb=verb, batch_size=size, **more, **FAST)  # type: ignore[arg-type]
        assert contents(folders[0]) == contents(folders[1])


class Interruption(BaseException):
    """What a test stops a build with."""


@pytest.mark.usefixtures("plain_montage")
def test_interrupted_at_any_write_it_ends_with_the_same_bytes(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"cases": 3, "batch_size": 2, **FAST}
    rename, count = os.replace, 0

    def counted(*paths: Any) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise Interruption
        rename(*paths)

    monkeypatch.setattr(os, "replace", counted)
    stop = 0
    build_dataset(tiny_generator, tmp_path / "whole" / NAME, **arguments)
    expected, writes = contents(tmp_path / "whole" / NAME), count
    assert writes >= 1 + 2 * 3 + 3
    for moment in range(1, writes + 1):
        folder = tmp_path / str(moment) / NAME
        count, stop = 0, moment
        with pytest.raises(Interruption):
            build_dataset(tiny_generator, folder, **arguments)
        assert not (folder / "manifest.json").exists()
        stop = 0
        done = build_dataset(tiny_generator, folder, **arguments)
        assert contents(folder) == expected
        assert done.kept == min(3, max(0, (moment - 2) // 2))


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(int(sys.argv[3]))
from diffaug.datasets.building import build_dataset
from diffaug.generators.generator import Generator
rename, count = os.replace, 0
def deadly(*paths):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.replace = deadly
build_dataset(Generator.load(sys.argv[1]), sys.argv[2], cases=5, batch_size=2, steps=2)
"""


def test_killed_it_goes_on_and_ends_with_the_same_bytes(tiny_generator_folder: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed" / NAME
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tiny_generator_folder),
        str(killed),
        str(torch.get_num_threads()),
    ]
    root = Path(building.__file__).parents[2]
    assert subprocess.run(command, cwd=root, check=False).returncode == -signal.SIGKILL
    left = contents(killed)
    assert "labelsTr/.tmp-tiny_sample_00002.nii.gz" in left
    assert "imagesTr/tiny_sample_00002_0000.nii.gz" in left
    assert "manifest.json" not in left

    generator = Generator.load(tiny_generator_folder)
    done = build_dataset(generator, killed, cases=5, **FAST)
    assert (done.made, done.kept) == (3, 2)
    build_dataset(generator, tmp_path / "whole" / NAME, cases=5, **FAST)
    assert contents(killed) == contents(tmp_path / "whole" / NAME)


@pytest.fixture
def unfinished(tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build of 3 cases that ended before the montage."""

    def fail(*_: Any, **__: Any) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(writing, "montage", fail)
        with pytest.raises(Interruption):
            build_dataset(tiny_generator, tmp_path / NAME, cases=3, **FAST)
    return tmp_path / NAME


def test_what_a_restart_finds_is_trusted_by_hash(
    tiny_generator: Generator, unfinished: Path, tmp_path: Path
) -> None:
    image = unfinished / "imagesTr" / "tiny_sample_00001_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:-1] + b"\1")
    state = unfinished / STATE
    state.write_bytes(state.read_bytes()[:-20])  # the last record, torn
    done = build_dataset(tiny_generator, unfinished, cases=3, **FAST)
    assert (done.made, done.kept) == (2, 1)
    assert done.repaired == ("imagesTr/tiny_sample_00001_0000.nii.gz",)
    build_dataset(tiny_generator, tmp_path / "whole" / NAME, cases=3, **FAST)
    assert contents(unfinished) == contents(tmp_path / "whole" / NAME)


# What records did not hold before there were builds without true labels.
NEWER = ('"allow_label_drift":false', '"caveat":""', '"labels":{}')


def forget_newer(text: str) -> str:
    """JSON without the keys of NEWER."""
    for entry in NEWER:
        text = text.replace(f",{entry}", "").replace(f"{entry},", "")
    return text


def test_older_records_are_resumed(tiny_generator: Generator, source: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"cases": 2, "verb": "vary", "source": source, **FAST}
    build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    whole = contents(tmp_path / NAME)
    records = json.loads(whole["manifest.json"])
    manifest = json.loads(forget_newer(json.dumps(records, separators=(",", ":"))))
    (tmp_path / NAME / "manifest.json").write_text(json.dumps(manifest))
    assert manifest != records
    assert build_dataset(tiny_generator, tmp_path / NAME, **arguments).kept == 2

    lines = [manifest | {"cases": [], "files": {}}, manifest["cases"][0]]
    (tmp_path / NAME / "manifest.json").unlink()
    (tmp_path / NAME / STATE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    assert (done.made, done.kept) == (1, 1)
    assert contents(tmp_path / NAME) == whole


def test_a_restart_with_other_versions_is_refused(tiny_generator: Generator, unfinished: Path) -> None:
    state = unfinished / STATE
    state.write_text(state.read_text().replace(f'"torch":"{torch.__version__}"', '"torch":"1.0"', 1))
    (unfinished / "labelsTr" / "tiny_sample_00002.nii.gz").unlink()
    before = contents(unfinished)
    with pytest.raises(DiffaugError, match=r'torch: "1\.0" there, "'):
        build_dataset(tiny_generator, unfinished, cases=3, **FAST)
    assert contents(unfinished) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"cases": 3}, "cases: 2 there, 3 now"),
        ({"steps": 3}, "parameters.steps: 2 there, 3 now"),
        ({"guidance": 2.0}, "parameters.guidance: 1.0 there, 2.0 now"),
        ({"layout": "decathlon"}, 'layout: "nnunet" there, "decathlon" now'),
        ({"sampler": "heun"}, 'parameters.sampler: "adams-bashforth" there, "heun" now'),
    ],
)
def test_a_folder_made_with_other_settings_is_refused(
    tiny_generator: Generator, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"cases": 2, **FAST}
    build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    before = contents(tmp_path / NAME)
    with pytest.raises(DiffaugError) as caught:
        build_dataset(tiny_generator, tmp_path / NAME, **(arguments | changes))
    assert message in str(caught.value)
    assert contents(tmp_path / NAME) == before


def test_an_altered_source_is_other_settings(tiny_generator: Generator, source: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"cases": 2, "verb": "paint", "source": source / "labelsTr", **FAST}
    build_dataset(tiny_generator, tmp_path / NAME, **arguments)
    shutil.copy(source / "labelsTr" / "ccc.nii.gz", source / "labelsTr" / "bb.nii.gz")
    with pytest.raises(DiffaugError, match=r"source\.cases\.bb\.files\.bb\.nii\.gz"):
        build_dataset(tiny_generator, tmp_path / NAME, **arguments)


def test_a_complete_build_is_left_alone(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(tiny_generator, tmp_path / NAME, cases=2, **FAST)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / NAME).rglob("*")}
    monkeypatch.setattr(building, "versions", lambda: {"diffaug": "of the future"})
    done = build_dataset(tiny_generator, tmp_path / NAME, cases=2, **FAST)
    assert (done.made, done.kept, done.repaired) == (0, 2, ())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / NAME).rglob("*")} == times


@pytest.mark.parametrize(
    "path",
    [
        "imagesTr/tiny_sample_00001_0000.nii.gz",
        "labelsTr/tiny_sample_00000.nii.gz",
        "README.md",
        "montage.png",
    ],
)
def test_a_damaged_file_of_a_complete_build_is_made_again(
    tiny_generator: Generator, tmp_path: Path, path: str
) -> None:
    build_dataset(tiny_generator, tmp_path / NAME, cases=2, **FAST)
    before = contents(tmp_path / NAME)
    (tmp_path / NAME / path).write_bytes(b"damaged")
    done = build_dataset(tiny_generator, tmp_path / NAME, cases=2, **FAST)
    assert done.repaired == (path,)
    assert contents(tmp_path / NAME) == before


# -------- what is refused


def test_folders_that_hold_something_else_are_refused(tiny_generator: Generator, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "thesis.txt").write_text("years of work")
    with pytest.raises(DiffaugError, match=r"is not empty.*thesis\.txt"):
        build_dataset(tiny_generator, tmp_path / NAME, cases=1, **FAST)
    (tmp_path / NAME / "manifest.json").write_text("{}")
    with pytest.raises(DiffaugError, match="is no manifest"):
        build_dataset(tiny_generator, tmp_path / NAME, cases=1, **FAST)
    (tmp_path / "Dataset902_File").write_text("")
    with pytest.raises(DiffaugError, match="is a file"):
        build_dataset(tiny_generator, tmp_path / "Dataset902_File", cases=1, **FAST)
    assert (tmp_path / NAME / "thesis.txt").read_text() == "years of work"


def test_nnunet_names_are_checked_and_suggested(tiny_generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "Dataset901_Old").mkdir()
    with pytest.raises(DiffaugError, match="Dataset902_MyHippocampi, or choose the decathlon"):
        build_dataset(tiny_generator, tmp_path / "my hippocampi", cases=1, **FAST)
    with pytest.raises(DiffaugError, match=r"Dataset901_Old has the number of Dataset901_New"):
        build_dataset(tiny_generator, tmp_path / "Dataset901_New", cases=1, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset901_Old"]


def test_the_disk_is_checked_first(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    # 16 x 24 x 16 voxels of an int16 and a uint8: 18.4 kB a case before compression.
    build_dataset(tiny_generator, tmp_path / NAME, cases=1, **FAST)
    with pytest.raises(DiffaugError, match=r"10\.0 MB free; 1000 cases may take 22\.4 MB"):
        build_dataset(tiny_generator, tmp_path / "Dataset902_Large", cases=1000, **FAST)
    assert not (tmp_path / "Dataset902_Large").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cases": 0}, DiffaugError, "cases must be at least 1, got 0"),
        ({"batch_size": 0}, DiffaugError, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, DiffaugError, "seed must be at least 0, got -1"),
        ({"steps": 0}, DiffaugError, "steps must be at least 1, got 0"),
        ({"guidance": -1.0}, DiffaugError, "guidance must be at least 0"),
        ({"sampler": "ddim"}, DiffaugError, "has no sampler 'ddim'; it has adams-bashforth, euler, heun"),
        ({"allow_label_drift": True}, LabelError, "allow_label_drift means nothing to 'sample'"),
        (
            {"verb": "vary", "source": "x", "allow_label_drift": True},
            LabelError,
            "follows its label map, which cannot drift: leave allow_label_drift out",
        ),
        ({"strength": 0.5}, DiffaugError, "strength=0.5 means nothing to 'sample'"),
        ({"verb": "vary", "strength": 1.5}, DiffaugError, r"strength must lie in \[0, 1\], got 1.5"),
        ({"verb": "vary"}, DiffaugError, "vary needs a dataset of labelled cases"),
        ({"verb": "paint"}, DiffaugError, "paint needs a folder of label maps"),
        ({"verb": "segment"}, VerbError, "not by 'segment'"),
        ({"source": "x"}, DiffaugError, "leave out source"),
        ({"verb": "paint", "source": "no-such-folder"}, DatasetError, "no-such-folder is not a folder"),
        ({"layout": "bids"}, DiffaugError, "layout must be nnunet or decathlon, got 'bids'"),
        ({"verb": "paint", "source": "x", "label_mapping": {-1: 1}}, LabelError, r"names the ids \[-1\]"),
    ],
)
def test_arguments_are_checked_first(
    tiny_generator: Generator, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_dataset(tiny_generator, tmp_path / NAME, **({"cases": 1} | arguments))
    assert not (tmp_path / NAME).exists()


def test_a_verb_that_the_generator_lacks_is_refused(tmp_path: Path) -> None:
    generator = make_tiny_generator()
    generator.verbs = frozenset({"paint"})
    with pytest.raises(VerbError, match="tiny has no verb 'sample'; it has paint"):
        build_dataset(generator, tmp_path / NAME, cases=1)


def test_two_processes_do_not_build_in_one_folder(tiny_generator: Generator, unfinished: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no file locks of this kind")
    handle = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DiffaugError, match="another process is building"):
        build_dataset(tiny_generator, unfinished, cases=3, **FAST)
    os.close(handle)
    assert build_dataset(tiny_generator, unfinished, cases=3, **FAST).kept == 3


# -------- the command


def test_the_command_builds_resumes_and_prints_for_scripts(
    tiny_generator_folder: Path, tmp_path: Path
) -> None:
    command = ["build", str(tiny_generator_folder), "--cases", "2", "--steps", "2", "--device", "cpu"]
    command += ["--output", str(tmp_path / NAME)]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"{tmp_path / NAME}\n"
    assert "2 made" in first.stderr
    again = CliRunner().invoke(app, [*command, "--json"])
    assert "complete already" in again.stderr
    summary = json.loads(again.stdout)
    assert summary == {
        "output": str(tmp_path / NAME),
        "cases": 2,
        "made": 0,
        "kept": 2,
        "repaired": [],
        "cut": {},
        "licence": "CC0-1.0",
        "rejected": {},
    }
    other = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert other.exit_code == 1
    assert "seed: 0 there, 1 now" in other.stderr


def test_the_command_copies_labels_where_it_is_told_to(
    medical_generator: Make, source: Path, tmp_path: Path
) -> None:
    medical_generator().save(tmp_path / "seed")
    command = ["build", str(tmp_path / "seed"), "--cases", "1", "--verb", "vary", "--source", str(source)]
    command += ["--steps", "2", "--sampler", "ddim", "--device", "cpu", "--output", str(tmp_path / NAME)]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1
    assert "--allow-label-drift" in refused.stderr
    built = CliRunner().invoke(app, [*command, "--allow-label-drift"])
    assert built.exit_code == 0, built.output
    parameters = read_manifest(tmp_path / NAME / "manifest.json").settings.parameters
    assert (parameters.sampler, parameters.steps, parameters.allow_label_drift) == ("ddim", 2, True)
