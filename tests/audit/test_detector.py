"""The detector that an audit leaves behind: what it refuses, and what it says of itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffaug.audit.detector import FILE, Detector, read_detector, write_detector
from diffaug.audit.features import encoder_space
from diffaug.audit.inspection import Inspection, find_detector
from diffaug.audit.segmenting import LabelJudge, read_judge, write_segmenter
from diffaug.audit.volumes import LEVELS, CaseSet, Sets
from diffaug.datasets.manifest import CaseSource
from diffaug.datasets.writing import Made
from diffaug.errors import DiffaugError
from diffaug.evaluation.embedding import fit_embedder
from diffaug.evaluation.segmenter import Segmenter
from diffaug.generators.grid import Grid
from diffaug.progress import Progress

GRID = Grid(("R", "A", "S"), (2.0, 2.0, 2.0), (16, 24, 16))
LABELS = {0: "background", 5: "head"}


def smooth(count: int, seed: int) -> np.ndarray:
    """Standardised smooth volumes `(N, 1, I, J, K)`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((count, 1, 4, 6, 4), generator=generator)
    volumes = torch.nn.functional.interpolate(coarse, size=GRID.shape, mode="trilinear")
    volumes = volumes - volumes.mean((2, 3, 4), keepdim=True)
    return (volumes / volumes.std((2, 3, 4), keepdim=True)).numpy()


def cases(count: int, seed: int) -> CaseSet:
    images = smooth(count, seed)
    return CaseSet(
        names=tuple(f"{seed}-{n}" for n in range(count)),
        patients=tuple(f"{seed}-{n}" for n in range(count)),
        images=images.astype(np.float16),
        intensities=np.quantile(images[:, 0], LEVELS, axis=(1, 2, 3)).T[:, None],
        consistency=np.zeros((count, 3)),
        label_volumes={"head": np.linspace(800, 1600, count)},
        files=str(seed),
    )


@pytest.fixture(scope="module")
def sets() -> Sets:
    return Sets(cases(16, 1), cases(24, 2), cases(20, 3))


@pytest.fixture(scope="module")
def file(sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = fit_embedder(sets.training.batch, sets.training.patients, steps=40, seed=0, batch=12)
    path = tmp_path_factory.mktemp("detector") / FILE
    write_detector(model, encoder_space(model, model, sets, Progress(quiet=True)), sets, GRID, path)
    return path


@pytest.fixture(scope="module")
def detector(file: Path) -> Detector:
    return read_detector(file)


def made(image: np.ndarray, voxels: int = 150) -> Made:
    """A candidate of 8 mm^3 voxels with a structure of so many of them."""
    label = np.zeros(GRID.shape, np.int16)
    label.flat[:voxels] = 5
    return Made(image.astype(np.float32), label, GRID.affine, None)


def test_copies_and_mirrored_copies_are_refused(detector: Detector, sets: Sets) -> None:
    inspection = Inspection(detector, LABELS, 1)
    image = np.asarray(sets.training.images[3], np.float32)
    turned = np.ascontiguousarray(image[:, ::-1])
    scaled = 200 * image + 900
    reasons = inspection.refuse([made(image), made(turned), made(scaled)])
    assert all("copy" in found for found in reasons)


def test_real_cases_of_others_are_mostly_taken(detector: Detector) -> None:
    inspection = Inspection(detector, LABELS, 1)
    reasons = inspection.refuse([made(image) for image in smooth(30, 9)])
    assert sum("copy" in found for found in reasons) <= 8


def test_structures_beyond_the_real_range_are_refused(detector: Detector) -> None:
    inspection = Inspection(detector, LABELS, 1)
    image = smooth(1, 9)[0]
    small, right, large = inspection.refuse([made(image, 99), made(image, 150), made(image, 201)])
    assert "volume" in small
    assert "volume" not in right
    assert "volume" in large


def test_a_label_map_that_was_given_may_have_any_size(detector: Detector) -> None:
    image = smooth(1, 9)[0]
    source = CaseSource.model_construct(name="patient")
    (found,) = Inspection(detector, LABELS, 1).refuse([made(image, 99)._replace(source=source)])
    assert "volume" not in found


def test_intensities_beyond_the_real_range_are_refused(detector: Detector) -> None:
    image = smooth(1, 9)[0]
    spikes = np.where(image > 2, 50.0, 0.0)
    plain, odd = Inspection(detector, {}, 1).refuse([made(image), made(spikes)])
    assert "intensity" not in plain
    assert "intensity" in odd


def test_the_record_names_the_checks_and_what_real_cases_fail(detector: Detector) -> None:
    record = Inspection(detector, LABELS, 1).record
    assert record.detector == detector.sha256
    assert set(record.checks) == set(record.real) == {"copy", "intensity", "volume"}
    assert all(share is not None and 0 <= share <= 0.5 for share in record.real.values())
    assert "volume" not in Inspection(detector, {0: "background", 1: "other"}, 1).record.checks


def test_other_channels_are_refused(detector: Detector) -> None:
    with pytest.raises(DiffaugError, match="knows 1 channels, the generator makes 2"):
        Inspection(detector, LABELS, 2)


def test_a_foreign_file_is_no_detector(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("other", "text"):
        with pytest.raises(DiffaugError, match=f"{name}.safetensors is no copy detector"):
            read_detector(tmp_path / f"{name}.safetensors")
    with pytest.raises(DiffaugError, match=r"absent\.safetensors does not exist"):
        read_detector(tmp_path / "absent.safetensors")


def test_a_generators_own_detector_is_found(tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match="mine has no copy detector"):
        find_detector(tmp_path, "mine")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / FILE).touch()
    assert find_detector(tmp_path, "mine") == tmp_path / "private" / FILE


# -------- an independent segmenter


@pytest.fixture
def judge(tmp_path: Path) -> LabelJudge:
    """A segmenter that finds nothing, and a Dice of 0.9 that labels need."""
    model = Segmenter(1, 2)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
        model.head[-1].bias[:8] = 1.0
    write_segmenter(model, ["head"], 1, GRID, np.full(20, 0.9), tmp_path / "segmenter.safetensors")
    return read_judge(tmp_path / "segmenter.safetensors", LABELS)


def test_a_label_that_the_segmenter_does_not_find_is_refused(detector: Detector, judge: LabelJudge) -> None:
    inspection = Inspection(detector, LABELS, 1, judge)
    assert judge.least == pytest.approx(0.9)
    assert "label" in inspection.refuse([made(smooth(1, 9)[0])])[0]
    assert inspection.record.segmenter == judge.sha256
    assert "below 0.900" in inspection.record.checks["label"]


def test_a_segmenter_of_other_labels_is_refused(judge: LabelJudge, tmp_path: Path) -> None:
    with pytest.raises(DiffaugError, match="knows the labels head, the generator background, tail"):
        read_judge(tmp_path / "segmenter.safetensors", {0: "background", 1: "tail"})
