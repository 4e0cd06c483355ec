"""Fitting end to end on blobs: resume, refusal, the card, the sidecar."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffaug.datasets.reading import read_dataset
from diffaug.datasets.volumes import load_case
from diffaug.errors import DatasetError, DiffaugError
from diffaug.generators.generator import Generator
from diffaug.progress import Progress
from diffaug.training.architectures import read_plan
from diffaug.training.fit import fit_generator
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.subsets import split_cases
from tests.training.conftest import blob_plan, write_blobs

QUIET = Progress(quiet=True)


def command(dataset: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "diffaug", "fit", str(dataset), "--output", str(output), *more]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    file.write_text(blob_plan(steps=12).model_dump_json())
    return file


@pytest.fixture(scope="module")
def fitted(blobs: Path, plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fits") / "blobs"
    fit_generator(read_dataset(blobs), output, plan=plan_file, progress=QUIET)
    return output


def test_output_is_a_generator_with_all_that_was_promised(fitted: Path) -> None:
    generator = Generator.load(fitted)
    assert generator.card.licence == "CC0-1.0"
    assert generator.card.training.cases == {"train": 5, "validation": 1}
    assert generator.card.figures["measured_on"] == "1 validation case"
    assert {"paint", "segment", "vary"} <= generator.verbs
    for name in ("montage.png", "curves.png", "private/montage.png"):
        assert (fitted / name).read_bytes().startswith(b"\x89PNG")
    assert read_plan(fitted / "plan.json") == JointFlowPlan.model_validate(generator.plan)


def test_scans_are_recorded_privately_and_not_on_the_card(fitted: Path, blobs: Path) -> None:
    sidecar = json.loads((fitted / "private" / "training_scans.json").read_text())
    assert len(sidecar["scans"]) == 5
    assert len(set(sidecar["scans"].values())) == 5
    shared = "".join((fitted / name).read_text() for name in ("card.json", "plan.json", "history.json"))
    assert "blob_" not in shared
    assert not any(digest in shared for digest in sidecar["scans"].values())
    assert sidecar["salt"] not in shared


def test_finished_fit_returns_the_same_generator(fitted: Path, blobs: Path) -> None:
    before = Generator.load(fitted).weights_hash
    again = fit_generator(read_dataset(blobs), fitted, progress=QUIET)
    assert isinstance(again, Generator)
    assert again.weights_hash == before


def test_another_plan_for_the_same_folder_is_refused_with_the_difference(
    fitted: Path, blobs: Path, tmp_path: Path
) -> None:
    other = tmp_path / "plan.json"
    other.write_text(blob_plan(steps=13).model_dump_json())
    with pytest.raises(DiffaugError, match=r"autoencoder_training\.steps: 12 there, 13 asked"):
        fit_generator(read_dataset(blobs), fitted, plan=other, progress=QUIET)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "other"}, "name: 'blobs' in the plan, 'other' given"),
        ({"seed": 3}, "seed: 0"),
        ({"mirror_axes": (0,)}, "mirror_axes"),
        ({"budget": 60.0}, "budget: None in the plan, 60.0 given"),
    ],
)
def test_options_that_the_plan_contradicts_are_refused(
    fitted: Path, blobs: Path, plan_file: Path, tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    for output, plan in ((fitted, None), (tmp_path / "new", plan_file)):
        with pytest.raises(DiffaugError, match=said):
            fit_generator(read_dataset(blobs), output, plan=plan, progress=QUIET, **given)
    assert not (tmp_path / "new").exists()


def test_the_same_options_are_accepted_again(fitted: Path, blobs: Path) -> None:
    again = fit_generator(read_dataset(blobs), fitted, name="blobs", seed=0, mirror_axes=(), progress=QUIET)
    assert isinstance(again, Generator)


def test_a_generator_fitted_elsewhere_is_not_taken_for_a_finished_fit(
    fitted: Path, blobs: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(fitted, shared, ignore=shutil.ignore_patterns("private"))
    before = sorted(path.name for path in shared.iterdir())
    with pytest.raises(DiffaugError, match="was not fitted there: give another --output"):
        fit_generator(read_dataset(blobs), shared, progress=QUIET)
    assert sorted(path.name for path in shared.iterdir()) == before


def test_the_weights_to_start_from_are_part_of_the_plan(
    fitted: Path, blobs: Path, plan_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "warm"
    warm = fit_generator(read_dataset(blobs), output, plan=plan_file, init=fitted, progress=QUIET)
    assert isinstance(warm, Generator)
    start = Generator.load(fitted)
    assert read_plan(output / "plan.json").init == warm.card.training.init == start.weights_hash
    fit_generator(read_dataset(blobs), output, plan=plan_file, init=fitted, progress=QUIET)
    with pytest.raises(DiffaugError, match="say with --init which generator that is"):
        fit_generator(read_dataset(blobs), output, progress=QUIET)
    with pytest.raises(DiffaugError, match="the plan starts from random weights"):
        fit_generator(read_dataset(blobs), fitted, init=fitted, progress=QUIET)
    with pytest.raises(
        DiffaugError, match="its image_autoencoder, label_autoencoder, denoiser is of another"
    ):
        fit_generator(
            read_dataset(blobs), tmp_path / "other", plan=plan_file, init="hippocampus-mr", progress=QUIET
        )


def test_a_validation_case_without_structure_is_left_out_of_the_figures(
    plan_file: Path, tmp_path: Path
) -> None:
    folder = write_blobs(tmp_path / "Blobs", count=5)
    names = sorted(case.name for case in read_dataset(folder).cases)
    (folder / "splits.json").write_text(json.dumps({"train": names[2:], "validation": names[:2]}))
    label = next(case.label for case in read_dataset(folder).cases if case.name == names[0])
    assert label is not None
    volume = nib.load(label)
    nib.save(nib.Nifti1Image(np.zeros(volume.shape, np.uint8), volume.affine), label)
    generator = fit_generator(read_dataset(folder), tmp_path / "fit", plan=plan_file, progress=QUIET)
    assert isinstance(generator, Generator)
    assert 0 <= generator.card.figures["segment_dice"] <= 1


def test_a_generator_that_learned_nothing_is_called_so(
    blobs: Path, plan_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_generator(read_dataset(blobs), tmp_path / "fit", plan=plan_file, progress=Progress())
    said = capsys.readouterr().err
    assert "label_round_trip_dice: " in said
    assert "has not learned its labels" in said
    fit_generator(read_dataset(blobs), tmp_path / "fit", plan=plan_file, progress=Progress())
    assert "is complete already" in capsys.readouterr().err


def test_changed_scans_are_noticed(blobs: Path, plan_file: Path, tmp_path: Path) -> None:
    dataset = write_blobs(tmp_path / "Blobs", count=4)
    output = tmp_path / "fit"
    fit_generator(read_dataset(dataset), output, plan=plan_file, progress=QUIET)
    image = next((dataset / "imagesTr").glob("*.nii.gz"))
    os.utime(image, (1, 1))  # as in a copy on another disk: the same scans
    fit_generator(read_dataset(dataset), output, plan=plan_file, progress=QUIET)
    volume = nib.load(image)
    nib.save(nib.Nifti1Image(volume.get_fdata() + 1, volume.affine), image)
    with pytest.raises(DiffaugError, match="changed since this fit began"):
        fit_generator(read_dataset(dataset), output, plan=plan_file, progress=QUIET)


def test_bad_data_stops_before_any_training(tmp_path: Path, plan_file: Path) -> None:
    dataset = write_blobs(tmp_path / "Blobs", count=4)
    (dataset / "imagesTr" / "blob_1.nii.gz").write_bytes(b"not an image")
    (dataset / "labelsTr" / "blob_2.nii.gz").unlink()
    with pytest.raises(DatasetError) as caught:
        fit_generator(read_dataset(dataset), tmp_path / "fit", plan=plan_file, progress=QUIET)
    assert "blob_1" in str(caught.value)
    assert "blob_2" in str(caught.value)
    assert not (tmp_path / "fit").exists()


def test_plan_of_another_dataset_is_refused(blobs: Path, tmp_path: Path) -> None:
    plan = blob_plan().model_copy(update={"labels": {0: "background", 1: "tumour"}})
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    with pytest.raises(DiffaugError, match="labels are"):
        fit_generator(read_dataset(blobs), tmp_path / "fit", plan=tmp_path / "plan.json", progress=QUIET)


def test_invalid_plan_names_file_and_field(tmp_path: Path) -> None:
    content = json.loads(blob_plan().model_dump_json())
    content["denoiser_training"]["batch"] = 0
    content["colour"] = "red"
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(DiffaugError, match=r"plan\.json") as caught:
        read_plan(tmp_path / "plan.json")
    assert "denoiser_training.batch" in str(caught.value)
    assert "colour" in str(caught.value)


def test_split_without_a_table_holds_out_whole_cases(blobs: Path) -> None:
    subsets = split_cases(read_dataset(blobs), seed=0)
    names = {c.name for c in subsets.train}
    assert names.isdisjoint(c.name for c in subsets.validation)
    assert subsets.patients is None


def test_dry_run_plans_from_data_and_budget_and_writes_nothing(blobs: Path, tmp_path: Path) -> None:
    output = tmp_path / "fit"
    plan = fit_generator(read_dataset(blobs), output, budget=60, dry_run=True, progress=QUIET)
    assert isinstance(plan, JointFlowPlan)
    assert not output.exists()
    assert plan.grid.spacing == (2.0, 2.0, 2.0)
    assert all(n % 8 == 0 for n in plan.grid.shape)
    longer = fit_generator(read_dataset(blobs), output, budget=1200, dry_run=True, progress=QUIET)
    assert isinstance(longer, JointFlowPlan)
    assert longer.denoiser_training.steps > 5 * plan.denoiser_training.steps


def test_a_short_warm_start_stays_near_the_given_weights(fitted: Path, blobs: Path, tmp_path: Path) -> None:
    rate = 0.1
    plan = blob_plan(steps=1)
    plan = plan.model_copy(
        update={
            "denoiser_training": plan.denoiser_training.model_copy(update={"learning_rate": rate}),
            "autoencoder_training": plan.autoencoder_training.model_copy(update={"learning_rate": rate}),
        }
    )
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    warm = fit_generator(
        read_dataset(blobs), tmp_path / "warm", plan=tmp_path / "plan.json", init=fitted, progress=QUIET
    )
    assert isinstance(warm, Generator)
    assert warm.card.training.init == Generator.load(fitted).weights_hash
    old, new = (load_file(f / "joint_flow.safetensors") for f in (fitted, tmp_path / "warm"))
    parameters = [k for k in old if "running" not in k and "num_batches" not in k and "standardise" not in k]
    # AdamW's first step moves a weight by the rate; weights are kept in half precision.
    for name in parameters:
        change = (old[name].float() - new[name].float()).abs()
        assert (change <= rate / 200 * 1.01 + 2e-3 * old[name].float().abs()).all(), name


def test_autoencoders_can_be_kept(fitted: Path, blobs: Path, tmp_path: Path) -> None:
    plan = blob_plan(steps=2)
    kept = plan.autoencoder_training.model_copy(update={"steps": 0})
    (tmp_path / "plan.json").write_text(
        plan.model_copy(update={"autoencoder_training": kept}).model_dump_json()
    )
    with pytest.raises(DiffaugError, match="say with init"):
        fit_generator(read_dataset(blobs), tmp_path / "cold", plan=tmp_path / "plan.json", progress=QUIET)
    fit_generator(
        read_dataset(blobs), tmp_path / "warm", plan=tmp_path / "plan.json", init=fitted, progress=QUIET
    )
    old, new = (load_file(f / "joint_flow.safetensors") for f in (fitted, tmp_path / "warm"))
    kept_names = [k for k in old if not k.startswith("denoiser") and "standardise" not in k]
    assert all(old[k].equal(new[k]) for k in kept_names)
    assert any(not old[k].equal(new[k]) for k in old if k.startswith("denoiser"))


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_gives_the_same_weights(
    blobs: Path, plan_file: Path, tmp_path: Path
) -> None:
    """SIGKILL in every stage; the weights equal those of an uninterrupted run."""
    whole, output = tmp_path / "whole", tmp_path / "interrupted"
    subprocess.run(command(blobs, whole, "--plan", str(plan_file)), check=True, stderr=subprocess.DEVNULL)
    stages = ("training/images.npy", "autoencoders.pt", "latents/round_000.safetensors", "denoiser.pt")
    killed = 0
    for stage in stages:
        process = subprocess.Popen(
            command(blobs, output, "--plan", str(plan_file)), stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (output / "private" / stage).exists():
            time.sleep(0.002)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed == len(stages)
    subprocess.run(command(blobs, output, "--plan", str(plan_file)), check=True, stderr=subprocess.DEVNULL)
    uninterrupted, resumed = (load_file(f / "joint_flow.safetensors") for f in (whole, output))
    assert uninterrupted.keys() == resumed.keys()
    assert all(uninterrupted[k].equal(resumed[k]) for k in uninterrupted)


def test_unlabelled_scans_of_two_channels_make_a_generator_without_labels(tmp_path: Path) -> None:
    images = tmp_path / "data" / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(4):
        for channel in range(2):
            volume = rng.normal(size=(15, 22, 16)).astype(np.float32).cumsum(axis=channel)
            nib.save(
                nib.Nifti1Image(volume, np.diag([2.0, 2, 2, 1])), images / f"case{n}_000{channel}.nii.gz"
            )
    dataset = read_dataset(tmp_path / "data", images=images)
    plan = fit_generator(dataset, tmp_path / "none", budget=60, dry_run=True, progress=QUIET)
    assert isinstance(plan, JointFlowPlan)
    small = blob_plan(steps=2)
    plan = plan.model_copy(
        update={
            "autoencoder_training": small.autoencoder_training,
            "denoiser_training": small.denoiser_training,
            "evaluate_every": 1,
        }
    )
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    generator = fit_generator(dataset, tmp_path / "fit", plan=tmp_path / "plan.json", progress=QUIET)
    assert isinstance(generator, Generator)
    assert generator.verbs.isdisjoint({"paint", "segment"})
    assert generator.card.channels == list(dataset.channels)
    assert generator.sample(1, steps=1).image.shape == (1, 2, *plan.grid.shape)


# -------- patches of larger volumes


@pytest.fixture(scope="module")
def large_blobs(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blobs, each voxel three times on every axis: volumes of several windows, partly without labels."""
    folder = tmp_path_factory.mktemp("large") / "blobs"
    shutil.copytree(blobs, folder)
    for file in sorted(folder.glob("*Tr/*.nii.gz")):
        scan = nib.load(file)
        larger = np.asarray(scan.dataobj).repeat(3, 0).repeat(3, 1).repeat(3, 2)
        nib.save(nib.Nifti1Image(larger, scan.affine), file)
    (folder / "labelsTr" / "blob_1.nii.gz").unlink()
    return folder


def test_fit_of_patches(large_blobs: Path, tmp_path: Path) -> None:
    plan = blob_plan(steps=4).model_copy(update={"extent": "patch", "name": "patches"})
    file = tmp_path / "plan.json"
    file.write_text(plan.model_dump_json())
    description = json.loads((large_blobs / "dataset.json").read_text())
    for case in description["training"]:
        if "blob_1" in case["label"]:
            del case["label"]
    (large_blobs / "dataset.json").write_text(json.dumps(description))
    output = tmp_path / "patches"
    generator = fit_generator(read_dataset(large_blobs), output, plan=file, progress=QUIET)
    assert isinstance(generator, Generator)
    assert generator.card.extent == "patch"
    assert generator.card.windowed
    assert generator.card.audit is None
    canvases = np.load(output / "private" / "training" / "images.npy", mmap_mode="r")
    labelled = np.load(output / "private" / "training" / "labelled.npy")
    assert canvases.shape == (5 * 64, 1, 24, 32, 24)
    assert labelled.sum() in (4 * 64, 5 * 64)
    assert generator.card.training.labelled == (4 if labelled.sum() == 4 * 64 else None)
    # Patches come from all over the volumes, not from their middles.
    assert len({bytes(np.asarray(row)) for row in canvases[:64]}) > 40
    case = next(case for case in read_dataset(large_blobs).cases if case.label is not None)
    loaded = load_case(case)
    image, label = (torch.from_numpy(part)[None] for part in (loaded.image, loaded.label))
    varied = generator.vary(image, label, loaded.affine, strength=0.5, steps=1)
    assert varied.shape == image.shape
    assert not torch.equal(varied, image)
    again = fit_generator(read_dataset(large_blobs), output, progress=QUIET)
    assert again.weights_hash == generator.weights_hash


def test_patches_are_planned_as_windows(large_blobs: Path, tmp_path: Path) -> None:
    plan = fit_generator(
        read_dataset(large_blobs), tmp_path / "x", extent="patch", budget=3600, dry_run=True, progress=QUIET
    )
    assert plan.extent == "patch"
    assert all(n <= 48 for n in plan.grid.shape)
    assert plan.denoiser_training.rounds * 5 * 64 <= 2 * 9216
    with pytest.raises(DiffaugError, match="generators of patches are joint-flow's"):
        fit_generator(
            read_dataset(large_blobs),
            tmp_path / "y",
            extent="patch",
            architecture="medical-diffusion",
            budget=3600,
            dry_run=True,
            progress=QUIET,
        )


def test_a_patch_without_labels_has_no_dice() -> None:
    from accelerate import Accelerator

    from diffaug.training.joint_flow.autoencoder import Autoencoders, validation_figures

    plan = blob_plan()
    image = np.zeros((1, *plan.grid.shape), np.float32)
    empty, shown = np.zeros(plan.grid.shape, np.uint8), np.ones(plan.grid.shape, np.uint8)
    networks, accelerator = Autoencoders(plan).eval(), Accelerator(cpu=True)
    without = validation_figures(networks, [(image, empty)], [True], 3, accelerator, 0.5)
    assert set(without) == {"loss", "psnr"}
    both = validation_figures(networks, [(image, empty), (image, shown)], [True, True], 3, accelerator, 0.5)
    assert all(np.isfinite(value) for value in both.values())
    assert "label_dice" in both
