"""Reading datasets: layouts, names, patients, splits, and one case's voxels."""

import json
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaug.datasets.reading import read_dataset
from diffaug.datasets.volumes import CaseFiles, load_case, read_volume
from diffaug.errors import DatasetError

SHAPE = (5, 6, 7)
AFFINE = np.array(
    [[0.0, -1.5, 0.0, 10.0], [0.8, 0.0, 0.0, -20.0], [0.0, 0.0, 2.0, 3.0], [0.0, 0.0, 0.0, 1.0]]
)


def save(file: Path, array: np.ndarray | None = None, affine: np.ndarray = AFFINE) -> Path:
    """Write a NIfTI file; an image of noise by default."""
    if array is None:
        array = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), file)
    return file


def box(label: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A label map with one box of `label`."""
    array = np.zeros(shape, np.uint8)
    array[1:3, 1:4, 2:5] = label
    return array


def decathlon(root: Path, cases: tuple[str, ...] = ("a", "b", "c"), **changes: Any) -> Path:
    """Write a dataset in the decathlon's layout; `changes` replace keys of its dataset.json."""
    for name in cases:
        save(root / "imagesTr" / f"{name}.nii.gz")
        save(root / "labelsTr" / f"{name}.nii.gz", box())
    description = {
        "name": "Boxes",
        "reference": "somewhere",
        "licence": "CC0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "box"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in cases
        ],
    }
    (root / "dataset.json").write_text(json.dumps(description | changes))
    return root


def nnunet(root: Path, cases: tuple[str, ...] = ("a", "b"), **changes: Any) -> Path:
    """Write a dataset of two channels in nnU-Net's raw layout; `changes` replace keys of its dataset.json."""
    for name in cases:
        save(root / "imagesTr" / f"{name}_0000.nii.gz", np.full(SHAPE, 1, np.int16))
        save(root / "imagesTr" / f"{name}_0001.nii.gz", np.full(SHAPE, 2, np.int16))
        save(root / "labelsTr" / f"{name}.nii.gz", box())
    description = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"box": 1, "background": 0, "ball": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description | changes))
    return root


def problems_of(root: Path, **arguments: Any) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        read_dataset(root, **arguments)
    return caught.value.problems


# -------- layouts


def test_decathlon(tmp_path: Path) -> None:
    dataset = read_dataset(decathlon(tmp_path))
    assert (dataset.name, dataset.licence, dataset.reference) == ("Boxes", "CC0", "somewhere")
    assert dataset.channels == ("MRI",)
    assert dataset.labels == {0: "background", 1: "box"}
    assert dataset.split is None
    assert not dataset.patients_given
    assert dataset.cases[1] == CaseFiles(
        "b", (tmp_path / "imagesTr/b.nii.gz",), tmp_path / "labelsTr/b.nii.gz", patient="b"
    )
    assert [case.name for case in dataset.cases] == ["a", "b", "c"]


def test_decathlon_keeps_channels_on_the_fourth_axis_and_may_lack_a_label(tmp_path: Path) -> None:
    image = np.random.default_rng(1).normal(size=(*SHAPE, 2)).astype(np.float32)
    save(tmp_path / "x.nii.gz", image)
    decathlon(tmp_path, (), modality={"1": "T2", "0": "FLAIR"}, training=[{"image": "x.nii.gz"}])
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("FLAIR", "T2")
    case = load_case(dataset.cases[0])
    assert case.label is None
    assert np.array_equal(case.image, np.moveaxis(image, 3, 0))


def test_nnunet_keeps_one_file_per_channel(tmp_path: Path) -> None:
    dataset = read_dataset(nnunet(tmp_path / "Dataset007_Boxes", license="CC0-1.0"))
    assert dataset.name == "Dataset007_Boxes"
    assert dataset.licence == "CC0-1.0"
    assert dataset.channels == ("T1", "T2")
    assert dataset.labels == {0: "background", 1: "box", 2: "ball"}
    case = load_case(dataset.cases[0])
    assert case.image.shape == (2, *SHAPE)
    assert case.image.dtype == np.float32
    assert [channel.mean() for channel in case.image] == [1, 2]
    assert np.array_equal(case.label, box()[None])
    assert case.label.dtype == np.int16


def test_nnunet_with_explicit_files(tmp_path: Path) -> None:
    nnunet(tmp_path, dataset={"p": {"images": ["imagesTr/b_0001.nii.gz", "imagesTr/a_0000.nii.gz"],
                                    "label": "labelsTr/a.nii.gz"}})  # fmt: skip
    (case,) = read_dataset(tmp_path).cases
    assert case.name == "p"
    assert [file.name for file in case.images] == ["b_0001.nii.gz", "a_0000.nii.gz"]


@pytest.mark.parametrize("pair", [("images", "labels"), ("imagesTr", "labelsTr")])
def test_two_folders_are_found_and_their_labels_read_from_the_files(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    for name, label in {"a": 1, "b": 4}.items():
        save(tmp_path / pair[0] / f"{name}.nii")
        save(tmp_path / pair[1] / f"{name}.nii.gz", box(label))
    dataset = read_dataset(tmp_path)
    assert dataset.labels == {0: "background", 1: "label 1", 4: "label 4"}
    assert dataset.channels == ("channel 0",)
    assert [(case.name, case.label and case.label.name) for case in dataset.cases] == [
        ("a", "a.nii.gz"), ("b", "b.nii.gz"),
    ]  # fmt: skip


def test_two_named_folders_with_channels_names_and_a_case_without_a_label(tmp_path: Path) -> None:
    nnunet(tmp_path, labels={"background": 0, "box": 1}, licence="CC-BY-4.0")
    (tmp_path / "labelsTr/b.nii.gz").unlink()
    dataset = read_dataset(tmp_path, images=Path("imagesTr"), labels=tmp_path / "labelsTr")
    assert dataset.channels == ("T1", "T2")
    assert dataset.labels == {0: "background", 1: "box"}
    assert dataset.licence == "CC-BY-4.0"
    assert [case.label is None for case in dataset.cases] == [False, True]
    assert read_dataset(tmp_path, images=Path("imagesTr")).cases[0].label is None


def test_relative_folders_may_count_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "elsewhere/a.nii.gz")
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = read_dataset(Path("root"), images=Path("elsewhere"))
    assert dataset.cases[0].images == (tmp_path / "elsewhere/a.nii.gz",)
    assert dataset.labels == {}


@pytest.mark.parametrize(
    ("images", "labels", "cases", "channels"),
    [
        (["p_0000", "p_0001", "q_0000", "q_0001"], ["p", "q"], ["p", "q"], 2),
        (["p_0000", "q_0000"], ["p_0000", "q_0000"], ["p_0000", "q_0000"], 1),
        (["p_0001", "p_0002"], ["p_0001", "p_0002"], ["p_0001", "p_0002"], 1),
        (["p_0000", "p_0001"], ["p"], ["p"], 2),
        (["p_0000", "p_0001"], [], ["p_0000", "p_0001"], 1),
        (["p_0000", "q_0000"], [], ["p", "q"], 1),
        (["p_0001", "q_0001"], [], ["p_0001", "q_0001"], 1),
        (["p_0000", "q_0001"], [], ["p_0000", "q_0001"], 1),
        (["p_0000", "q"], [], ["p_0000", "q"], 1),
    ],
)
def test_a_final_number_is_a_channel_only_where_the_names_say_so(
    tmp_path: Path, images: list[str], labels: list[str], cases: list[str], channels: int
) -> None:
    (tmp_path / "labels").mkdir()
    for name in images:
        save(tmp_path / "images" / f"{name}.nii.gz")
    for name in labels:
        save(tmp_path / "labels" / f"{name}.nii.gz", box())
    dataset = read_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == cases
    assert len(dataset.channels) == channels
    assert dataset.strays == ()


def test_hidden_twins_from_macos_are_ignored(tmp_path: Path) -> None:
    root = nnunet(tmp_path / "nnunet")
    for file in [*root.glob("*Tr/*.nii.gz")]:
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07")
    dataset = read_dataset(root)
    assert [case.name for case in dataset.cases] == ["a", "b"]
    assert dataset.strays == ()
    root = decathlon(
        tmp_path / "decathlon", ("a",), training=[{"image": "x/._a.nii.gz"}, {"image": "x/a.nii.gz"}]
    )
    assert [case.name for case in read_dataset(root).cases] == ["a"]


def test_files_that_belong_to_no_case_are_told(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    strays = [
        save(root / "imagesTr/a_0002.nii.gz"),
        save(root / "imagesTr/plain.nii.gz"),
        save(root / "labelsTr/c.nii.gz", box()),
    ]
    assert read_dataset(root).strays == tuple(sorted(strays))
    root = tmp_path / "folders"
    save(root / "images/a.nii")
    save(root / "labels/a.nii", box())
    strays = [
        save(root / "images/a.nii.gz"),
        save(root / "labels/a.nii.gz", box()),
        save(root / "labels/z.nii.gz", box()),
    ]
    assert read_dataset(root).strays == tuple(sorted(strays))


def test_unknown_layouts_are_errors_that_show_the_way(tmp_path: Path) -> None:
    save(tmp_path / "scans/a.nii.gz")
    assert "scans" in (problem := problems_of(tmp_path)[0])
    assert "--images" in problem
    (tmp_path / "dataset.json").write_text('{"name": "x"}')
    assert "channel_names" in problems_of(tmp_path)[0]
    (tmp_path / "dataset.json").write_text('["x"]')
    assert "list" in problems_of(tmp_path)[0]
    (tmp_path / "dataset.json").write_text('{"name": ')
    assert "dataset.json cannot be read as JSON" in problems_of(tmp_path)[0]
    assert "not a folder" in problems_of(tmp_path / "nowhere")[0]
    (tmp_path / "dataset.json").unlink()
    assert "labels labels without images" in problems_of(tmp_path, labels=Path("labels"))[0]
    (tmp_path / "images").mkdir()
    assert "holds no case" in problems_of(tmp_path, images=Path("images"))[0]
    assert "nope is not a folder" in problems_of(tmp_path, images=Path("nope"))[0]


def test_nnunet_errors(tmp_path: Path) -> None:
    assert "'.nrrd'" in problems_of(nnunet(tmp_path / "1", file_ending=".nrrd"))[0]
    assert "channel_names" in problems_of(nnunet(tmp_path / "2", channel_names={"0": "T1", "2": "T2"}))[0]
    (root := tmp_path / "3").mkdir()
    nnunet(root, ())
    assert "imagesTr is missing" in problems_of(root)[0]
    for name in ("../up", ".hidden", ""):
        entry = {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}
        assert "file name" in problems_of(nnunet(tmp_path / "4", dataset={name: entry}))[0]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"background": 0, "whole": [1, 2]}, "'whole' is a region"),
        ({"background": 0, "box": 1, "ignore": 2}, "'ignore' (2) is not supported"),
        ({"background": 0, "box": 1, "ball": 1}, "both 'box' and 'ball'"),
        ({"box": 1}, "no label has the id 0"),
        ({"background": 0, "box": 1.5}, "'box': 1.5"),
        ({"background": 0, "box": 40000}, "40000"),
        ({"background": 0, "box": -1}, "-1"),
        ({}, '"labels" must be'),
        ("box", "'box'"),
    ],
)
def test_labels_that_cannot_be_used_are_named(tmp_path: Path, labels: object, told: str) -> None:
    (problem,) = problems_of(nnunet(tmp_path, labels=labels))
    assert told in problem
    assert str(tmp_path / "dataset.json") in problem


# -------- untrusted paths


@pytest.mark.parametrize(
    "entry",
    ["../outside.nii.gz", "imagesTr/../../outside.nii.gz", "{outside}", "link.nii.gz",
     "linked/outside.nii.gz", "nul\0.nii.gz", "passwd", 7, None, ["imagesTr/a.nii.gz"], ".nii.gz"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["image", "label"])
def test_paths_in_dataset_json_stay_within_the_folder(tmp_path: Path, entry: Any, key: str) -> None:
    outside = save(tmp_path / "outside.nii.gz", box())
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.nii.gz").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path)
    if isinstance(entry, str):
        entry = entry.format(outside=outside)
    if key == "label" and entry is None:
        entry = False
    pair = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"} | {key: entry}
    (problem,) = problems_of(decathlon(root, training=[pair]))
    assert f"training[0].{key}" in problem
    assert repr(entry) in problem


def test_links_within_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    root = decathlon(tmp_path / "root", ("a",), training=[{"image": "link.nii.gz"}])
    (root / "link.nii.gz").symlink_to(root / "imagesTr/a.nii.gz")
    (tmp_path / "alias").symlink_to(root)
    (case,) = read_dataset(tmp_path / "alias").cases
    assert load_case(case).image.shape == (1, *SHAPE)


@pytest.mark.parametrize(
    "training", ["imagesTr", {"image": "a"}, [3], ["a.nii.gz"], [{"label": "a.nii.gz"}], []]
)
def test_a_malformed_training_list_is_an_error(tmp_path: Path, training: object) -> None:
    assert "training" in problems_of(decathlon(tmp_path, training=training))[0] or training == []
    assert len(problems_of(decathlon(tmp_path, training=training))) == 1


# -------- patients and split


def test_split_and_patients_beside_the_dataset_are_taken(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    (root / "splits.json").write_text(json.dumps({"train": ["a", "b"], "validation": ["c"]}))
    (root / "patients.csv").write_text(
        "\ufeffcase, patient,side\na, P1,left\nb,P1,right\nc,P2,left\nz,P9,left\n"
    )
    dataset = read_dataset(root)
    assert dataset.split == {"train": ("a", "b"), "validation": ("c",), "test": ()}
    assert dataset.patients_given
    assert [case.patient for case in dataset.cases] == ["P1", "P1", "P2"]


def test_given_split_and_patients_win_and_nnunets_first_fold_counts(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    (root / "splits.json").write_text(json.dumps({"train": ["nobody"]}))
    (root / "mine.csv").write_text("case,patient\na,1\nb,2\nc,3\n")
    folds = [{"train": ["c"], "val": ["a"]}, {"train": ["a"], "val": ["b"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    dataset = read_dataset(root, split=root / "splits_final.json", patients=Path("mine.csv"))
    assert dataset.split == {"train": ("c",), "validation": ("a",), "test": ()}
    assert dataset.cases[0].patient == "1"


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({"train": ["a", "nobody"]}, ["train names 1 case (nobody)"]),
        ({"train": ["a"], "validation": ["a"]}, ["case a", "train and validation"]),
        ({"train": ["a", "a"]}, ["case a", "twice"]),
        ({"train": ["a"], "test": ["b"]}, ["patient P1", "train (a) and test (b)"]),
        ({"train": []}, ['no case under "train"']),
        ({"train": ["a"], "val": ["c"]}, ["validation"]),
        ({"train": "a"}, ["lists"]),
        ([{"train": ["a"]}], ["lists"]),
        ([], ["lists"]),
    ],
)
def test_splits_that_leak_or_name_unknown_cases_are_errors(
    tmp_path: Path, split: object, told: list[str]
) -> None:
    root = decathlon(tmp_path)
    (root / "patients.csv").write_text("case,patient\na,P1\nb,P1\nc,P2\n")
    (root / "splits.json").write_text(json.dumps(split))
    (problem,) = problems_of(root)
    for part in [str(root / "splits.json"), *told]:
        assert part in problem


def test_without_a_patients_table_each_case_is_its_own_patient(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    (root / "splits.json").write_text(json.dumps({"train": ["a"], "test": ["b", "c"]}))
    assert read_dataset(root).split == {"train": ("a",), "validation": (), "test": ("b", "c")}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("case,patient\na,P1\nb,\n", "no patient for 2 cases (b, c)"),
        ("case,patient\na,P1\na,P2\nb,P1\nc,P1\n", "case a has the patients 'P1' and 'P2'"),
        ("case;patient\na;P1\n", "columns case;patient"),
        ("", "columns (none)"),
    ],
)
def test_patient_tables_that_do_not_fit_are_errors(tmp_path: Path, table: str, told: str) -> None:
    root = decathlon(tmp_path)
    (root / "patients.csv").write_text(table)
    (problem,) = problems_of(root)
    assert told in problem
    assert "patients.csv" in problem


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    told = problems_of(root, split=Path("nosplit.json"), patients=Path("nopatients.csv"))
    assert len(told) == 2
    assert "nopatients.csv" in told[0]
    assert "nosplit.json" in told[1]


def test_all_problems_of_a_description_are_told_at_once(tmp_path: Path) -> None:
    root = decathlon(
        tmp_path,
        modality={"1": "T1"},
        labels={"0": "background", "1": [1, 2]},
        training=[{"image": "/etc/a.nii.gz"}, {"image": "imagesTr/a.nii.gz", "label": "../b.nii.gz"}],
    )
    (root / "splits.json").write_text(json.dumps({"train": ["b"]}))
    (root / "patients.csv").write_text("case,patient\nc,P\n")
    with pytest.raises(DatasetError) as caught:
        read_dataset(root)
    assert len(caught.value.problems) == 6
    assert str(caught.value).startswith("6 problems:\n")
    assert str(caught.value).count("\n  - ") == 6


# -------- one case


def case_of(root: Path, image: np.ndarray | None = None, label: np.ndarray | None = None) -> CaseFiles:
    save(root / "image.nii.gz", image)
    return CaseFiles(
        "x", (root / "image.nii.gz",), None if label is None else save(root / "label.nii.gz", label), "x"
    )


def test_stored_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.header.set_slope_inter(2.5, -100)
    nib.save(image, tmp_path / "ct.nii.gz")
    raw = np.arange(210).reshape(SHAPE)
    saved = nib.load(tmp_path / "ct.nii.gz")
    expected = np.asanyarray(saved.dataobj)
    loaded = load_case(CaseFiles("ct", (tmp_path / "ct.nii.gz",), None, "ct"))
    assert np.allclose(loaded.image[0], expected)
    assert saved.dataobj.slope != 1
    assert np.corrcoef(loaded.image.ravel(), raw.ravel())[0, 1] > 0.999


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64]),
    largest=st.integers(1, 127),
    seed=st.integers(0, 2**32 - 1),
    uncompressed=st.booleans(),
    trailing_axis=st.booleans(),
)
def test_voxels_and_affine_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    dtype: type,
    largest: int,
    seed: int,
    uncompressed: bool,
    trailing_axis: bool,
) -> None:
    root = tmp_path_factory.mktemp("case")
    rng = np.random.default_rng(seed)
    image = rng.normal(size=shape).astype(np.float32)
    label = rng.integers(0, largest, shape, endpoint=True).astype(dtype)
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0] * rng.uniform(0.3, 4, 3)
    affine = np.vstack([np.column_stack([axes, rng.normal(size=3) * 100]), [0, 0, 0, 1]])
    ending = ".nii" if uncompressed else ".nii.gz"
    files = (
        save(root / f"image{ending}", image[..., None] if trailing_axis else image, affine),
        save(root / f"label{ending}", label[..., None] if trailing_axis else label, affine),
    )
    loaded = load_case(CaseFiles("x", files[:1], files[1], "x"))
    assert np.array_equal(loaded.image, image[None])
    assert loaded.image.dtype == np.float32
    assert np.array_equal(loaded.label, label[None])
    assert loaded.label.dtype == np.int16
    assert np.allclose(loaded.affine, affine, rtol=1e-6, atol=1e-4)


def test_labels_are_rounded_only_where_storage_made_them_uneven(tmp_path: Path) -> None:
    uneven = box(3) * np.float32(1 + 1e-4)
    assert np.array_equal(load_case(case_of(tmp_path, label=uneven)).label, box(3)[None])
    for value in (0.5, np.nan, np.inf, -1, 40000):
        wrong = box().astype(np.float32)
        wrong[0, 0, 0] = value
        with pytest.raises(DatasetError, match=rf"label\.nii\.gz holds {value:g} ".replace("+", r"\+")):
            load_case(case_of(tmp_path, label=wrong))


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7, 2), (5, 6, 7, 1, 3)])
def test_a_label_map_is_one_volume(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(DatasetError, match=r"label\.nii\.gz has the shape \(5, 6"):
        load_case(case_of(tmp_path, label=np.zeros(shape, np.uint8)))


def test_shapes_within_a_case_must_agree(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"label\.nii\.gz has the shape \(4, 6, 7\).*\(5, 6, 7\)"):
        load_case(case_of(tmp_path, label=np.zeros((4, 6, 7), np.uint8)))
    files = (save(tmp_path / "0.nii.gz"), save(tmp_path / "1.nii.gz", box(shape=(5, 6, 9))))
    with pytest.raises(DatasetError, match=r"1\.nii\.gz has the shape \(5, 6, 9\)"):
        load_case(CaseFiles("x", files, None, "x"))


def test_colours_are_no_intensities(tmp_path: Path) -> None:
    colours = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    with pytest.raises(DatasetError, match=r"image\.nii\.gz holds voxels of type"):
        load_case(case_of(tmp_path, colours))


def header_with(file: Path, offset: int, kind: str, *values: float) -> Path:
    """Overwrite part of an uncompressed NIfTI-1 header."""
    content = bytearray(file.read_bytes())
    struct.pack_into(kind, content, offset, *values)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (1, 1, float("nan"))])
def test_voxel_sizes_that_are_not_positive_are_errors(tmp_path: Path, sizes: tuple[float, ...]) -> None:
    file = header_with(save(tmp_path / "a.nii"), 80, "<3f", *sizes)
    with pytest.raises(DatasetError, match=r"a\.nii states a voxel size of .* mm"):
        load_case(CaseFiles("a", (file,), None, "a"))


def test_an_affine_that_cannot_be_inverted_is_an_error(tmp_path: Path) -> None:
    file = header_with(save(tmp_path / "a.nii"), 280, "<12f", *([1, 1, 0, 0] * 2), 0, 0, 1, 0)
    with pytest.raises(DatasetError, match=r"a\.nii has an affine that cannot be inverted"):
        load_case(CaseFiles("a", (file,), None, "a"))


def test_a_header_that_announces_more_than_the_file_holds_costs_no_memory(tmp_path: Path) -> None:
    file = header_with(save(tmp_path / "a.nii"), 42, "<3h", 32767, 32767, 32767)
    with pytest.raises(DatasetError, match=f"announces {32767**3 * 4} bytes"):
        read_volume(file)


def test_damaged_files_are_errors_that_name_them(tmp_path: Path) -> None:
    file = save(tmp_path / "a.nii.gz")
    content = file.read_bytes()
    wrong_checksum = content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
    for damaged in (b"", content[:20], content[:-200], content[:-4], wrong_checksum, b"no scan at all" * 50):
        file.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"a\.nii\.gz cannot be read"):
            read_volume(file)
    file.unlink()
    with pytest.raises(DatasetError, match=r"a\.nii\.gz is missing"):
        read_volume(file)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), compressed=st.booleans())
def test_no_damage_leads_to_any_other_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, compressed: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / ("damaged.nii.gz" if compressed else "damaged.nii")
    content = bytearray(save(file).read_bytes())
    places = st.integers(0, min(len(content), 600) - 1)
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        content[place] = byte
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        volume = read_volume(file)
    except DatasetError:
        return
    assert volume.affine.shape == (4, 4)
    assert volume.array.dtype.kind in "iuf"


# -------- real scans


def test_the_real_hippocampi(data_folder: Path) -> None:
    dataset = read_dataset(data_folder / "Task04_Hippocampus")
    assert len(dataset.cases) == 204
    assert dataset.labels == {0: "background", 1: "Anterior", 2: "Posterior"}
    assert dataset.channels == ("MRI",)
    assert dataset.licence == "CC-BY-SA 4.0"
    assert dataset.patients_given
    assert len({case.patient for case in dataset.cases}) == 131
    assert dataset.split is not None
    assert {subset: len(names) for subset, names in dataset.split.items()} == {
        "train": 144, "validation": 20, "test": 40,
    }  # fmt: skip
    case = load_case(dataset.cases[0])
    assert case.label is not None
    assert case.image.shape == (1, *case.label.shape[1:])
    assert set(np.unique(case.label)) == {0, 1, 2}
