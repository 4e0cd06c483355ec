"""The TorchIO plug-in: contract of its transforms, what changes and what does not, worker processes."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio
from torch import Tensor

from diffaug.errors import CardError, DiffaugError, LabelError, VerbError
from diffaug.generators.generator import Generator
from diffaug.transforms.torchio import RandomVariation, Variation
from tests.conftest import make_tiny_generator

# Axes P, I, R with spacings 1.6, 1.4, 1.5 mm: neither the orientation nor the spacing of the tiny generator.
AFFINE = np.array([[0, 0, 1.5, -20], [-1.6, 0, 0, 30], [0, -1.4, 0, 10], [0, 0, 0, 1.0]])
SHAPE = (22, 17, 15)

WORKERS = """
import sys
import torch
import torchio as tio
from diffaug.transforms.torchio import RandomVariation
from tests.transforms.test_torchio import make_subject

if __name__ == "__main__":
    folder, method = sys.argv[1:]
    torch.set_num_threads(2)
    torch.nn.Conv3d(4, 8, 3)(torch.randn(1, 4, 40, 40, 40))
    transform = tio.Compose([RandomVariation(folder, strength=(0.3, 0.6), p=1), tio.RandomFlip(p=0.5)])
    subjects = [make_subject(seed) for seed in range(4)]
    transform(subjects[0])
    dataset = tio.SubjectsDataset(subjects, transform=transform)
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        loader = tio.SubjectsLoader(
            dataset, batch_size=2, num_workers=2, multiprocessing_context=method, collate_fn=list, timeout=120
        )
        runs.append([subject for batch in loader for subject in batch])
    for before, first, second in zip(subjects, *runs, strict=True):
        assert not torch.equal(before["t1"].data, first["t1"].data)
        assert torch.equal(first["t1"].data, second["t1"].data)
        replayed = before
        for step in first.history:
            replayed = step(replayed)
        assert torch.equal(replayed["t1"].data, first["t1"].data)
        assert torch.equal(replayed["seg"].data, first["seg"].data)
    print("replayed", len(subjects))
"""

FORK = """
import os
import sys
import torch
from diffaug.transforms.torchio import Variation
from tests.transforms.test_torchio import make_subject

torch.set_num_threads(2)
torch.nn.Conv3d(4, 8, 3)(torch.randn(1, 4, 40, 40, 40))
transform, subject = Variation(sys.argv[1], 0.5, 3), make_subject()
expected = transform(subject)["t1"].data
if os.fork() == 0:
    same = torch.equal(transform(subject)["t1"].data, expected)
    torch.nn.Conv3d(4, 8, 3)(torch.randn(1, 4, 40, 40, 40))
    os._exit(0 if same else 1)
print("child ended with", os.waitstatus_to_exitcode(os.wait()[1]))
"""


def make_subject(seed: int = 0, dtype: torch.dtype = torch.int16, **more: tio.Image) -> tio.Subject:
    """A noisy bright object of two labels in a dark volume, named t1 and seg."""
    label = torch.zeros(1, *SHAPE, dtype=torch.int16)
    label[:, 6:12, 5:12, 4:10] = 1
    label[:, 12:16, 5:12, 4:10] = 2
    noise = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    image = (200 * noise + 300 * label).to(dtype)
    return tio.Subject(
        t1=tio.ScalarImage(tensor=image, affine=AFFINE), seg=tio.LabelMap(tensor=label, affine=AFFINE), **more
    )


def scalar(seed: int, dtype: torch.dtype = torch.float32, channels: int = 1) -> tio.ScalarImage:
    """An image on the subject's grid."""
    values = torch.rand(channels, *SHAPE, generator=torch.Generator().manual_seed(seed)) * 1000
    return tio.ScalarImage(tensor=values.to(dtype), affine=AFFINE)


def changed(before: tio.Subject, after: tio.Subject) -> set[str]:
    """Names of the images whose voxels differ; all else about the images must be the same."""
    assert list(before) == list(after)
    for name, image in before.get_images_dict(intensity_only=False).items():
        assert after[name].data.dtype == image.data.dtype
        assert after[name].shape == image.shape
        np.testing.assert_array_equal(after[name].affine, image.affine)
    names = before.get_images_dict(intensity_only=False)
    return {name for name in names if not torch.equal(before[name].data, after[name].data)}


@pytest.fixture(scope="module")
def two_channels() -> Generator:
    return make_tiny_generator(channels=2)


@pytest.fixture(scope="module")
def no_labels() -> Generator:
    generator = make_tiny_generator(seed=1)
    return Generator(generator.card.model_copy(update={"labels": {}, "name": "unlabelled"}), generator.model)


# -------- what changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.float64])
def test_changes_the_image_alone_on_its_own_grid(tiny_generator_folder: Path, dtype: torch.dtype) -> None:
    subject = make_subject(dtype=dtype)
    original = subject["t1"].data.clone()
    varied = Variation(tiny_generator_folder, 0.5, seed=1)(subject)
    assert changed(subject, varied) == {"t1"}
    assert torch.equal(subject["t1"].data, original)
    # Own units: within the range of the scan, and near it.
    difference = (varied["t1"].data.double() - original.double()).abs()
    assert 0 < difference.mean() < original.double().std() * 2


def test_is_what_the_generator_does(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    generator = Generator.load(tiny_generator_folder)
    image, label = subject["t1"].data, subject["seg"].data
    expected = generator.vary(image[None], label[None], AFFINE, strength=0.4, seed=[9], steps=5)
    varied = Variation(tiny_generator_folder, 0.4, seed=9, steps=5)(subject)
    assert torch.equal(varied["t1"].data, expected[0])


def test_strength_zero_is_the_identity(tiny_generator_folder: Path) -> None:
    subject = make_subject(dtype=torch.float32)
    assert changed(subject, RandomVariation(tiny_generator_folder, strength=0, p=1)(subject)) == set()


def test_seed_decides(tiny_generator_folder: Path) -> None:
    subject = make_subject()

    def vary(seed: int) -> Tensor:
        return Variation(tiny_generator_folder, 0.5, seed)(subject)["t1"].data

    assert torch.equal(vary(1), vary(1))
    assert not torch.equal(vary(1), vary(2))


def test_copy_false_works_in_place(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    original = subject["t1"].data.clone()
    assert Variation(tiny_generator_folder, 0.5, 1, copy=False)(subject) is subject
    assert not torch.equal(subject["t1"].data, original)


def test_keep_holds_the_original(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    varied = RandomVariation(tiny_generator_folder, p=1, keep={"t1": "before"})(subject)
    assert torch.equal(varied["before"].data, subject["t1"].data)
    assert not torch.equal(varied["t1"].data, subject["t1"].data)


def test_label_ids_can_be_mapped(tiny_generator_folder: Path) -> None:
    subject, renamed = make_subject(), make_subject()
    renamed["seg"].data[renamed["seg"].data == 2] = 7
    expected = Variation(tiny_generator_folder, 0.5, 1)(subject)["t1"].data
    with pytest.raises(LabelError, match="7"):
        Variation(tiny_generator_folder, 0.5, 1)(renamed)
    varied = Variation(tiny_generator_folder, 0.5, 1, label_mapping={7: 2})(renamed)
    assert torch.equal(varied["t1"].data, expected)
    replayed = varied.history[0](renamed)
    assert torch.equal(replayed["t1"].data, expected)


# -------- which images


def test_include_and_exclude_choose_the_image(tiny_generator_folder: Path) -> None:
    subject = make_subject(t2=scalar(5))
    assert changed(subject, RandomVariation(tiny_generator_folder, p=1, include=["t2"])(subject)) == {"t2"}
    assert changed(subject, RandomVariation(tiny_generator_folder, p=1, exclude=["t2"])(subject)) == {"t1"}


def test_two_images_for_one_channel_is_an_error(tiny_generator_folder: Path) -> None:
    subject = make_subject(t2=scalar(5))
    with pytest.raises(VerbError, match=r"t1 \(1\), t2 \(1\).*include=.*exclude="):
        RandomVariation(tiny_generator_folder, p=1)(subject)


@pytest.mark.parametrize("channels", [2, 3])
def test_image_of_other_channels_is_an_error(tiny_generator_folder: Path, channels: int) -> None:
    subject = make_subject(t2=scalar(5, channels=channels))
    with pytest.raises(VerbError, match=rf"t2 \({channels}\)"):
        RandomVariation(tiny_generator_folder, p=1, include=["t2"])(subject)


def test_no_image_left_is_an_error(tiny_generator_folder: Path) -> None:
    with pytest.raises(VerbError, match=r"none.*\['t1'\]"):
        RandomVariation(tiny_generator_folder, p=1, include=["t3"])(make_subject())


def test_co_registered_images_change_together(two_channels: Generator) -> None:
    subject = make_subject(t2=scalar(5))
    varied = Variation(two_channels, 0.5, seed=1)(subject)
    assert changed(subject, varied) == {"t1", "t2"}
    stacked = torch.cat([subject["t1"].data.double(), subject["t2"].data.double()])
    expected = two_channels.vary(stacked[None], subject["seg"].data[None], AFFINE, strength=0.5, seed=[1])[0]
    assert torch.equal(varied["t1"].data, expected[:1].round().short())
    assert torch.equal(varied["t2"].data, expected[1:].float())


def test_one_image_of_several_channels(two_channels: Generator) -> None:
    subject = make_subject(both=scalar(5, channels=2))
    varied = Variation(two_channels, 0.5, seed=1, include=["both"])(subject)
    assert changed(subject, varied) == {"both"}
    assert all(not torch.equal(a, b) for a, b in zip(varied["both"].data, subject["both"].data, strict=True))


def test_images_on_different_grids_are_an_error(two_channels: Generator, tiny_generator_folder: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] += 0.2
    subject = make_subject(t2=tio.ScalarImage(tensor=torch.rand(1, *SHAPE), affine=moved))
    with pytest.raises(DiffaugError, match=r"t1 and t2 are not on one grid.*ToCanonical.*Resample"):
        Variation(two_channels, 0.5, 1)(subject)
    with pytest.raises(DiffaugError, match=r"t2 and seg are not on one grid"):
        Variation(tiny_generator_folder, 0.5, 1, include=["t2"])(subject)
    smaller = tio.ScalarImage(tensor=torch.rand(1, 22, 17, 14), affine=AFFINE)
    with pytest.raises(DiffaugError, match=r"shapes \(22, 17, 14\) and \(22, 17, 15\)"):
        Variation(tiny_generator_folder, 0.5, 1, include=["t2"])(make_subject(t2=smaller))


def test_rounding_of_an_affine_is_no_other_grid(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    subject["seg"].affine = AFFINE + np.random.default_rng(0).normal(scale=1e-5, size=(4, 4)) * (AFFINE != 0)
    subject["seg"].affine[3] = [0, 0, 0, 1]
    assert changed(subject, Variation(tiny_generator_folder, 0.5, 1)(subject)) == {"t1"}


def test_error_names_the_files(tiny_generator_folder: Path, tmp_path: Path) -> None:
    subject = make_subject()
    subject["seg"].data[0, 3, 3, 3] = 9
    subject["seg"].save(tmp_path / "case_7.nii.gz")
    subject["seg"] = tio.LabelMap(tmp_path / "case_7.nii.gz")
    with pytest.raises(LabelError, match=r"\[9\] are not in the generator's vocabulary") as caught:
        Variation(tiny_generator_folder, 0.5, 1)(subject)
    assert caught.value.__notes__ == [f"while working on t1 and seg ({tmp_path / 'case_7.nii.gz'})"]


# -------- which label


def test_several_label_maps_need_a_name(tiny_generator_folder: Path) -> None:
    mask = tio.LabelMap(tensor=torch.ones(1, *SHAPE, dtype=torch.int16), affine=AFFINE)
    subject = make_subject(mask=mask)
    with pytest.raises(LabelError, match=r"\['seg', 'mask'\].*label="):
        Variation(tiny_generator_folder, 0.5, 1)(subject)
    expected = Variation(tiny_generator_folder, 0.5, 1)(make_subject())["t1"].data
    for choice in ({"label": "seg"}, {"exclude": ["mask"]}):
        varied = Variation(tiny_generator_folder, 0.5, 1, **choice)(subject)
        assert changed(subject, varied) == {"t1"}
        assert torch.equal(varied["t1"].data, expected)
    other = Variation(tiny_generator_folder, 0.5, 1, label="mask")(subject)["t1"].data
    assert not torch.equal(other, expected)


def test_named_label_must_exist(tiny_generator_folder: Path) -> None:
    with pytest.raises(LabelError, match=r"'t1'; it has \['seg'\]"):
        Variation(tiny_generator_folder, 0.5, 1, label="t1")(make_subject())


def test_missing_label_needs_leave_to_drift(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    subject.remove_image("seg")
    with pytest.raises(LabelError, match="allow_label_drift"):
        Variation(tiny_generator_folder, 0.5, 1)(subject)
    varied = Variation(tiny_generator_folder, 0.5, 1, allow_label_drift=True)(subject)
    assert changed(subject, varied) == {"t1"}


def test_a_case_that_shows_no_structure_is_left_as_it_is(tiny_generator_folder: Path) -> None:
    """As after a crop beside the structure: an error would end a training at a random step."""
    subject = make_subject()
    subject["seg"].set_data(torch.zeros_like(subject["seg"].data))
    for mapping, value in ((None, 0), ({7: 0}, 7)):
        subject["seg"].data[:] = value
        with pytest.warns(UserWarning, match="shows no structure"):
            varied = Variation(tiny_generator_folder, 0.5, 1, label_mapping=mapping)(subject)
        assert changed(subject, varied) == set()


def test_generator_without_labels_needs_leave_to_drift(no_labels: Generator) -> None:
    subject = make_subject()
    with pytest.raises(LabelError, match="unlabelled knows no labels and cannot keep seg true"):
        Variation(no_labels, 0.5, 1)(subject)
    varied = Variation(no_labels, 0.5, 1, allow_label_drift=True)(subject)
    assert changed(subject, varied) == {"t1"}
    subject.remove_image("seg")
    assert changed(subject, Variation(no_labels, 0.5, 1)(subject)) == {"t1"}


def test_a_generator_of_another_architecture_varies_with_its_samplers(
    medical_generator: Callable[..., Generator],
) -> None:
    generator = medical_generator(steps=60)
    subject = make_subject()
    with pytest.raises(LabelError, match="seed knows no labels and cannot keep seg true"):
        RandomVariation(generator, p=1, sampler="ddim")(subject)
    varied = {}
    for sampler, steps in ((None, 12), ("ancestral", 12), ("ddim", 50), ("dpm-solver++", 20)):
        torch.manual_seed(3)
        transform = RandomVariation(generator, strength=0.5, p=1, sampler=sampler, allow_label_drift=True)
        varied[sampler] = transform(subject)
        arguments = varied[sampler].applied_transforms[0][1]
        assert (arguments["sampler"], arguments["steps"]) == (sampler or "ancestral", steps)
        assert changed(subject, varied[sampler]) == {"t1"}
        replayed = varied[sampler].history[0](subject)
        assert torch.equal(replayed["t1"].data, varied[sampler]["t1"].data)
    assert torch.equal(varied[None]["t1"].data, varied["ancestral"]["t1"].data)
    assert not torch.equal(varied["ddim"]["t1"].data, varied["dpm-solver++"]["t1"].data)


# -------- randomness


def test_torch_seed_reproduces(tmp_path: Path) -> None:
    """Also from the first run, which loads the weights, to the second, which does not."""
    make_tiny_generator().save(tmp_path)
    transform = tio.Compose([RandomVariation(tmp_path, p=0.5), tio.RandomNoise(std=5)])
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append([transform(make_subject(n)) for n in range(6)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first["t1"].data, second["t1"].data)
        assert first.applied_transforms == second.applied_transforms
    assert len({tuple(step for step, _ in subject.applied_transforms) for subject in runs[0]}) == 2


def test_probability(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    assert RandomVariation(tiny_generator_folder, p=0)(subject) is subject
    applied = [RandomVariation(tiny_generator_folder, p=1)(subject) for _ in range(3)]
    assert all(changed(subject, varied) == {"t1"} for varied in applied)
    seeds = {varied.applied_transforms[0][1]["seed"] for varied in applied}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("given", "low", "high"), [(None, 0.2, 0.5), ((0.1, 0.9), 0.1, 0.9), (0.3, 0.3, 0.3), (1, 1, 1)]
)
def test_strengths_are_in_range(
    tiny_generator_folder: Path, given: float | tuple[float, float] | None, low: float, high: float
) -> None:
    transform = RandomVariation(tiny_generator_folder, strength=given, p=1, steps=1)
    strengths = [transform(make_subject()).applied_transforms[0][1]["strength"] for _ in range(10)]
    assert all(low <= strength <= high for strength in strengths)
    assert len(set(strengths)) == (1 if low == high else 10)


def test_a_mapping_to_unknown_labels_is_an_error_at_once(tiny_generator_folder: Path) -> None:
    with pytest.raises(
        LabelError, match=r"label_mapping leads to \[7\], but the generator's vocabulary is \{0"
    ):
        RandomVariation(tiny_generator_folder, label_mapping={1: 7})


@pytest.mark.parametrize("strength", [-0.1, 1.2, (0.5, 0.2), (0.1, 1.1), "high", (0.1, 0.2, 0.3), (None, 1)])
def test_strength_out_of_range_is_an_error(tiny_generator_folder: Path, strength: Any) -> None:
    with pytest.raises(ValueError, match="strength must"):
        RandomVariation(tiny_generator_folder, strength=strength)


def test_a_sampler_that_the_architecture_lacks_is_an_error(tiny_generator_folder: Path) -> None:
    with pytest.raises(DiffaugError, match="has no sampler 'ddim'; it has adams-bashforth, euler, heun"):
        RandomVariation(tiny_generator_folder, p=1, sampler="ddim")(make_subject())


def test_arguments_of_the_deterministic_transform_are_checked(tiny_generator_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 1.5"):
        Variation(tiny_generator_folder, 1.5, 0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Variation(tiny_generator_folder, 0.5, -1)


# -------- history


def test_history_is_plain_json_and_replays_to_the_same_bytes(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    transform = tio.Compose([RandomVariation(tiny_generator_folder, p=1, steps=3), tio.RandomFlip(p=1)])
    varied = transform(subject)
    name, arguments = varied.applied_transforms[0]
    assert name == "Variation"
    assert json.loads(json.dumps(arguments)) == arguments
    assert arguments["generator"] == str(tiny_generator_folder)
    assert len(arguments["weights_hash"]) == 64
    assert arguments["steps"] == 3
    assert arguments["guidance"] == 1.0
    assert arguments["sampler"] == "adams-bashforth"
    for history in (varied.history, pickle.loads(pickle.dumps(varied)).history):
        replayed = tio.Compose(history)(subject)
        for key in ("t1", "seg"):
            assert torch.equal(replayed[key].data, varied[key].data)


def test_history_without_a_sampler_replays(tiny_generator_folder: Path) -> None:
    """As it was recorded before there was a choice."""
    subject = make_subject()
    varied = Variation(tiny_generator_folder, 0.5, 1, steps=3)(subject)
    arguments = dict(varied.applied_transforms[0][1])
    assert arguments.pop("sampler") == "adams-bashforth"
    assert torch.equal(Variation(**arguments)(subject)["t1"].data, varied["t1"].data)


def test_history_of_included_images(tiny_generator_folder: Path) -> None:
    subject = make_subject(t2=scalar(5))
    varied = RandomVariation(tiny_generator_folder, p=1, include=["t2"])(subject)
    replayed = varied.get_composed_history()(subject)
    assert changed(subject, replayed) == {"t2"}
    assert torch.equal(replayed["t2"].data, varied["t2"].data)


def test_history_refuses_other_weights(tmp_path: Path) -> None:
    make_tiny_generator(seed=0).save(tmp_path / "a")
    make_tiny_generator(seed=1).save(tmp_path / "b")
    subject = make_subject()
    varied = Variation(tmp_path / "a", 0.5, 1)(subject)
    arguments = dict(varied.applied_transforms[0][1], generator=str(tmp_path / "b"))
    with pytest.raises(CardError, match=r"recorded with the weights [0-9a-f]{64} of .*b, which now has"):
        Variation(**arguments)(subject)


def test_history_of_a_generator_object_replays(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    generator = Generator.load(tiny_generator_folder)
    varied = RandomVariation(generator, p=1)(subject)
    assert json.loads(json.dumps(varied.applied_transforms[0][1])) == varied.applied_transforms[0][1]
    assert torch.equal(varied.history[0](subject)["t1"].data, varied["t1"].data)


def test_history_of_a_generator_object_that_is_gone(tmp_path: Path) -> None:
    make_tiny_generator(seed=2).save(tmp_path)
    varied = RandomVariation(Generator.load(tmp_path), p=1)(make_subject())
    with pytest.raises(CardError, match="tiny is neither a generator of the zoo"):
        varied.history[0](make_subject())


def test_weights_are_pinned_by_the_first_application(tiny_generator_folder: Path) -> None:
    transform = Variation(tiny_generator_folder, 0.5, 1)
    assert transform.weights_hash is None
    transform(make_subject())
    assert transform.weights_hash == Generator.load(tiny_generator_folder).weights_hash


def test_repr_and_configuration(tiny_generator_folder: Path) -> None:
    folder = tiny_generator_folder
    transform = RandomVariation(folder, strength=(0.1, 0.2), p=0.4, label="seg", exclude=["t2"])
    text = repr(transform)
    assert text.startswith(f"RandomVariation(generator={folder}, strength=(0.1, 0.2), p=0.4,")
    assert "label=seg" in text
    configuration = transform.to_hydra_config()
    assert configuration.pop("_target_") == "diffaug.transforms.torchio.RandomVariation"
    assert RandomVariation(**configuration).to_hydra_config() == transform.to_hydra_config()
    assert "strength=0.5, seed=3" in repr(Variation(folder, 0.5, 3))


# -------- generators, pickling, processes


def test_unknown_generator_is_an_error() -> None:
    with pytest.raises(CardError, match="no-such-generator is neither"):
        RandomVariation("no-such-generator")


def test_generator_that_cannot_vary_is_an_error(tiny_generator: Generator) -> None:
    card = tiny_generator.card.model_copy(update={"verbs": ["sample"]})
    with pytest.raises(VerbError, match="no verb 'vary'; it has sample"):
        RandomVariation(Generator(card, tiny_generator.model))


def test_relative_folder_survives_a_change_of_folder(
    tiny_generator_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_generator_folder.parent)
    transform = RandomVariation(tiny_generator_folder.name, p=1)
    monkeypatch.chdir(tmp_path)
    assert changed(make_subject(), transform(make_subject())) == {"t1"}


def test_pickle_carries_no_weights(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    transform = RandomVariation(tiny_generator_folder, p=1)
    transform(subject)
    pickled = pickle.dumps(transform)
    assert len(pickled) < 2000
    results = []
    for candidate in (transform, pickle.loads(pickled)):
        torch.manual_seed(1)
        results.append(candidate(subject)["t1"].data)
    assert torch.equal(*results)


def test_generator_object_pickles_with_its_weights(tiny_generator: Generator) -> None:
    subject = make_subject()
    transform = Variation(tiny_generator, 0.5, 1)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(subject)["t1"].data, transform(subject)["t1"].data)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(tiny_generator_folder: Path, tmp_path: Path, method: str) -> None:
    """Workers end after the parent ran inference with two threads; what they made replays in the parent."""
    assert "replayed 4" in run_script(WORKERS, tmp_path, str(tiny_generator_folder), method)


def test_fork_without_a_loader(tiny_generator_folder: Path, tmp_path: Path) -> None:
    """A forked process inherits two threads in name only: using them would never end."""
    assert "child ended with 0" in run_script(FORK, tmp_path, str(tiny_generator_folder))


def run_script(code: str, folder: Path, *arguments: str) -> str:
    """What a Python script prints; it runs from the repository's root, for at most five minutes."""
    script = folder / "script.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_graphics_memory_is_refused_in_workers(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(tiny_generator.card, tiny_generator.model)
    generator.device = torch.device("cuda")
    monkeypatch.setattr("diffaug.operations.applying.get_worker_info", lambda: object())
    with pytest.raises(VerbError, match=r"tiny is on cuda.*num_workers=0"):
        Variation(generator, 0.5, 1)(make_subject())


def test_missing_torchio_names_the_extra() -> None:
    code = "import sys; sys.modules['torchio'] = None; import diffaug.transforms.torchio"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "ExtraError: TorchIO is not installed; install it with: pip install 'diffaug[torchio]'"
    assert process.stderr.strip().endswith(message)


# -------- inputs other than subjects


def test_dictionary_of_tensors(tiny_generator_folder: Path) -> None:
    subject = make_subject()
    transform = RandomVariation(tiny_generator_folder, p=1, include=["t1", "seg"], label_keys=["seg"])
    data = {"t1": subject["t1"].data, "seg": subject["seg"].data, "age": 40}
    varied = transform(data)
    assert not torch.equal(varied["t1"], data["t1"])
    assert torch.equal(varied["seg"], data["seg"])
    assert varied["age"] == 40


def test_image_without_a_subject(tiny_generator_folder: Path) -> None:
    image = make_subject()["t1"]
    with pytest.raises(LabelError, match="no label map to follow"):
        RandomVariation(tiny_generator_folder, p=1)(image)
    varied = RandomVariation(tiny_generator_folder, p=1, allow_label_drift=True)(image)
    assert isinstance(varied, tio.ScalarImage)
    assert not torch.equal(varied.data, image.data)
