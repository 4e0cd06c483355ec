"""The MONAI plug-in in MONAI's own pipelines: files, Compose, loaders and caches."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    ThreadDataLoader,
    decollate_batch,
    set_track_meta,
)
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandFlipd,
    RandSpatialCropd,
)
from monai.utils import set_determinism

from diffaug.errors import CardError, DiffaugError, LabelError, VerbError
from diffaug.generators.generator import Generator
from diffaug.transforms.monai import (
    RandInpainting,
    RandInpaintingd,
    RandRepaint,
    RandRepaintd,
    RandVariation,
    RandVariationd,
    Replay,
    Replayd,
    recorded,
)
from tests.conftest import make_tiny_generator
from tests.operations.test_operations import AFFINE, SHAPE, make_case

KEYS = ["image", "label"]
DICTIONARIES = [RandVariationd, RandInpaintingd, RandRepaintd]


def make_data(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A case as a dictionary of MetaTensors, and an entry that is none of a transform's business."""
    image, label = make_case(dtype=dtype)
    affine = torch.from_numpy(AFFINE)
    return {
        "image": MetaTensor(image, affine=affine, meta={"filename_or_obj": "case_1.nii.gz"}),
        "label": MetaTensor(label, affine=affine),
        "age": 40,
    }


@pytest.fixture
def files(tmp_path: Path) -> list[dict[str, str]]:
    """Four cases as NIfTI files."""
    found = []
    for number in range(4):
        image, label = make_case()
        paths = {key: str(tmp_path / f"{key}_{number}.nii.gz") for key in KEYS}
        nib.save(nib.Nifti1Image(image[0].numpy() + np.int16(number), AFFINE), paths["image"])
        nib.save(nib.Nifti1Image(label[0].numpy(), AFFINE), paths["label"])
        found.append(paths)
    return found


def pipeline(generator: Path, *after: Any, prob: float = 1.0) -> Compose:
    """Load, vary, and whatever comes after."""
    return Compose(
        [
            LoadImaged(KEYS),
            EnsureChannelFirstd(KEYS),
            RandVariationd("image", generator=generator, prob=prob, steps=2),
            *after,
        ]
    )


# -------- arrays


def test_is_what_the_generator_does(tiny_generator_folder: Path) -> None:
    data = make_data(torch.int16)
    transform = RandVariation(tiny_generator_folder, prob=1, strength=0.4).set_random_state(3)
    varied = transform(data["image"], data["label"])
    (parameters,) = recorded(varied)
    generator = Generator.load(tiny_generator_folder)
    expected = generator.vary(
        data["image"].as_tensor()[None],
        data["label"].as_tensor()[None],
        AFFINE,
        strength=0.4,
        seed=[parameters["seed"]],
    )[0]
    assert isinstance(varied, MetaTensor)
    assert varied.dtype == torch.int16
    assert torch.equal(varied.as_tensor(), expected)
    assert torch.equal(varied.affine, data["image"].affine)
    assert varied.meta["filename_or_obj"] == "case_1.nii.gz"
    assert not torch.equal(expected, data["image"].as_tensor())


@pytest.mark.parametrize("kind", [RandVariation, RandInpainting, RandRepaint])
def test_arrays_replay_to_the_same_bytes(tiny_generator_folder: Path, kind: Callable[..., Any]) -> None:
    data = make_data()
    transform = kind(tiny_generator_folder, prob=1).set_random_state(0)
    made = transform(data["image"], data["label"])
    image = made[0] if isinstance(made, tuple) else made
    replayed = Replay(recorded(image)[0])(data["image"], data["label"])
    again = transform(data["image"], data["label"], randomize=False)
    for other in (replayed, again):
        pairs = zip(made, other, strict=True) if isinstance(made, tuple) else [(made, other)]
        assert all(torch.equal(a, b) for a, b in pairs)
    assert isinstance(made, tuple) == (kind is RandRepaint)


def test_probability_zero_changes_nothing(tiny_generator_folder: Path) -> None:
    data = make_data()
    left = RandVariation(tiny_generator_folder, prob=0)(data["image"], data["label"])
    assert isinstance(left, MetaTensor)
    assert torch.equal(left, data["image"])
    assert recorded(left) == []
    left = RandVariationd("image", generator=tiny_generator_folder, prob=0)(data)
    assert torch.equal(left["image"], data["image"])


# -------- dictionaries


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionaries(tiny_generator_folder: Path, kind: Callable[..., Any]) -> None:
    data = make_data()
    before = {key: data[key].clone() for key in KEYS}
    # Less than 2 mm, the default, would move few of these voxels.
    own = {"amplitude": 4.0} if kind is RandRepaintd else {}
    made = kind("image", generator=tiny_generator_folder, prob=1, **own).set_random_state(1)(data)
    assert made["age"] == 40
    assert not torch.equal(made["image"], before["image"])
    assert torch.equal(made["label"], before["label"]) == (kind is not RandRepaintd)
    for key in KEYS:
        assert torch.equal(data[key], before[key])
        assert made[key].dtype == data[key].dtype
        assert torch.equal(made[key].affine, data[key].affine)
    (parameters,) = recorded(made["image"])
    assert json.loads(json.dumps(parameters)) == parameters
    replayed = Replayd("image", parameters)(data)
    assert all(torch.equal(replayed[key], made[key]) for key in KEYS)
    assert recorded(replayed["image"]) == [parameters]


def test_random_state_decides(tiny_generator_folder: Path) -> None:
    transform = RandVariationd("image", generator=tiny_generator_folder, prob=0.5, steps=2)

    def run(seed: int) -> list[torch.Tensor]:
        transform.set_random_state(seed)
        return [transform(make_data())["image"].as_tensor() for _ in range(6)]

    first, second, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    original = make_data()["image"].as_tensor()
    assert 0 < sum(torch.equal(image, original) for image in first) < 6


def test_channels_change_together() -> None:
    generator = make_tiny_generator(channels=2)
    data = make_data()
    data["other"] = MetaTensor(2 * data["image"].as_tensor(), affine=data["image"].affine).to(torch.int16)
    made = RandVariationd(["image", "other"], generator=generator, prob=1).set_random_state(0)(data)
    assert made["other"].dtype == torch.int16
    assert all(not torch.equal(made[key], data[key]) for key in ("image", "other"))
    stacked = dict(data, image=MetaTensor(torch.cat([data["image"].as_tensor()] * 2), affine=AFFINE))
    assert RandVariationd("image", generator=generator, prob=1)(stacked)["image"].shape == (2, *SHAPE)
    with pytest.raises(VerbError, match=r"2 channel\(s\) \(channel 0, channel 1\).*image \(1\)"):
        RandVariationd("image", generator=generator, prob=1)(data)


def test_crops_and_flips_follow_and_invert(tiny_generator_folder: Path, files: list[dict[str, str]]) -> None:
    after = [Orientationd(KEYS, "RAS", labels=None), RandFlipd(KEYS, prob=1, spatial_axis=0)]
    transform = pipeline(tiny_generator_folder, *after)
    transform.set_random_state(0)
    made = transform(files[0])
    back = transform.inverse(made)
    varied = Replayd("image", recorded(made["image"])[0])(
        Compose([LoadImaged(KEYS), EnsureChannelFirstd(KEYS)])(files[0])
    )
    assert torch.equal(back["image"], varied["image"].as_tensor())


def test_what_a_lazy_pipeline_left_pending_is_done_before(
    tiny_generator_folder: Path, files: list[dict[str, str]]
) -> None:
    steps = [
        LoadImaged(KEYS),
        EnsureChannelFirstd(KEYS),
        Orientationd(KEYS, "RAS", labels=None),
        RandVariationd("image", generator=tiny_generator_folder, prob=1),
    ]
    lazy, eager = (Compose(steps, lazy=lazy).set_random_state(2)(files[0]) for lazy in (True, False))
    assert recorded(lazy["image"]) == recorded(eager["image"])
    assert torch.allclose(lazy["image"].affine, eager["image"].affine)
    assert torch.allclose(lazy["image"].as_tensor(), eager["image"].as_tensor(), atol=1e-2)


# -------- loaders and caches


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader_reproduces(
    tiny_generator_folder: Path, files: list[dict[str, str]], workers: int
) -> None:
    runs = []
    for _ in range(2):
        set_determinism(seed=5)
        dataset = Dataset(files, pipeline(tiny_generator_folder, RandSpatialCropd(KEYS, (12, 12, 12))))
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, shuffle=True)
        batches = list(loader)
        runs.append(torch.cat([batch["image"].as_tensor() for batch in batches]))
        cases = [case for batch in batches for case in decollate_batch(batch)]
        seeds = {recorded(case["image"])[0]["seed"] for case in cases}
        assert len(seeds) == len(files)
    set_determinism(seed=None)
    assert torch.equal(*runs)


def test_thread_data_loader(tiny_generator_folder: Path, files: list[dict[str, str]]) -> None:
    dataset = Dataset(files, pipeline(tiny_generator_folder))
    plain = Dataset(files, Compose([LoadImaged(KEYS), EnsureChannelFirstd(KEYS)]))
    batches = list(ThreadDataLoader(dataset, batch_size=1, num_workers=0, buffer_size=2))
    assert len(batches) == 4
    for batch, case in zip(batches, plain, strict=True):
        assert not torch.equal(batch["image"][0].as_tensor(), case["image"].as_tensor())


def test_a_cache_does_not_freeze_it(tiny_generator_folder: Path, files: list[dict[str, str]]) -> None:
    dataset = CacheDataset(files, pipeline(tiny_generator_folder), num_workers=0, progress=False)
    first, second = dataset[0], dataset[0]
    assert not torch.equal(first["image"], second["image"])
    assert torch.equal(first["label"], second["label"])


def test_pickles_small(tiny_generator_folder: Path) -> None:
    transform = RandVariationd("image", generator=tiny_generator_folder, prob=1)
    transform(make_data())
    assert len(pickle.dumps(transform)) < 6000
    for other in (pickle.loads(pickle.dumps(transform)), transform):
        other.set_random_state(3)
    first = other(make_data())["image"]
    assert torch.equal(first, transform.set_random_state(3)(make_data())["image"])


def test_without_tracking(tiny_generator_folder: Path) -> None:
    data = make_data()
    set_track_meta(False)
    try:
        left = RandVariationd("image", generator=tiny_generator_folder, prob=0)(data)["image"]
        varied = RandVariationd("image", generator=tiny_generator_folder, prob=1)(data)["image"]
    finally:
        set_track_meta(True)
    assert not isinstance(left, MetaTensor)
    assert not torch.equal(varied, data["image"].as_tensor())


# -------- errors


def test_tensors_without_an_affine_are_refused(tiny_generator_folder: Path) -> None:
    data = make_data()
    data["image"] = data["image"].as_tensor()
    with pytest.raises(DiffaugError, match=r"image is a Tensor, which says nothing.*LoadImaged"):
        RandVariationd("image", generator=tiny_generator_folder, prob=1)(data)


def test_images_without_a_channel_axis_are_refused(tiny_generator_folder: Path) -> None:
    data = make_data()
    data["image"] = data["image"][0]
    with pytest.raises(DiffaugError, match=r"must have shape \(C, I, J, K\).*EnsureChannelFirstd"):
        RandVariationd("image", generator=tiny_generator_folder, prob=1)(data)


def test_grids_must_agree(tiny_generator_folder: Path) -> None:
    data = make_data()
    moved = data["label"].affine.clone()
    moved[0, 3] += 3
    data["label"] = MetaTensor(data["label"].as_tensor(), affine=moved)
    with pytest.raises(DiffaugError, match=r"image and label are not on one grid.*ResampleToMatchd"):
        RandVariationd("image", generator=tiny_generator_folder, prob=1)(data)


def test_missing_keys_and_labels_are_refused(tiny_generator_folder: Path) -> None:
    transform = RandVariationd("t2", generator=tiny_generator_folder, prob=1)
    with pytest.raises(DiffaugError, match=r"no 't2' in the data, which holds \['age', 'image', 'label'\]"):
        transform(make_data())
    with pytest.raises(LabelError, match=r"tiny keeps a label true only if it is given.*label_key"):
        RandVariationd("image", None, tiny_generator_folder, prob=1)(make_data())
    made = RandVariationd("image", None, tiny_generator_folder, prob=1, allow_label_drift=True)(make_data())
    assert not torch.equal(made["image"], make_data()["image"])


def test_a_generator_without_labels_refuses_one(medical_generator: Callable[..., Generator]) -> None:
    generator = medical_generator(steps=60)
    with pytest.raises(LabelError, match="seed knows no labels and cannot keep label true"):
        RandVariationd("image", generator=generator, prob=1)(make_data())


def test_unknown_generators_are_refused() -> None:
    with pytest.raises(CardError, match="no-such-generator is neither"):
        RandVariationd("image", generator="no-such-generator")


def test_missing_monai_names_the_extra() -> None:
    code = "import sys; sys.modules['monai.config'] = None; import diffaug.transforms.monai"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "ExtraError: MONAI is not installed; install it with: pip install 'diffaug[monai]'"
    assert process.stderr.strip().endswith(message)
