"""nnssl's description of a dataset."""

from pathlib import Path

from diffaug.datasets.nnssl import write_nnssl
from diffaug.datasets.reading import read_dataset
from diffaug.files import read_json
from tests.benchmark.test_benchmark import write_dataset


def test_every_scan_is_named_once_under_its_patient(tmp_path: Path) -> None:
    dataset = read_dataset(write_dataset(tmp_path / "data"))
    content = read_json(write_nnssl(dataset))
    (only,) = content["datasets"].values()
    assert set(content) == {"collection_index", "collection_name", "datasets"}
    assert set(only) == {"dataset_index", "dataset_info", "name", "subjects"}
    patients = {name: list(subject["sessions"]) for name, subject in only["subjects"].items()}
    assert patients["patient 0"] == ["case_0", "case_1"]
    images = [
        image
        for subject in only["subjects"].values()
        for session in subject["sessions"].values()
        for image in session["images"]
    ]
    assert len(images) == 10
    for image in images:
        assert set(image) == {"name", "modality", "image_info", "image_path", "associated_masks"}
        assert Path(image["image_path"]).is_file()
