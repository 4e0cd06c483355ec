"""The scripts in examples/ run: quickly with a tiny generator, and as they stand with the bundled one."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


def run_example(name: str, folder: Path, *arguments: str | Path) -> str:
    """What an example prints when it runs in `folder`."""
    process = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def write_case(folder: Path, name: str, seed: int) -> tuple[Path, Path]:
    """Image and label map of one case in the layout of two folders."""
    label = np.zeros((18, 22, 16), np.uint8)
    label[5:12, 5:11, 4:12], label[5:12, 11:17, 4:12] = 1, 2
    image = np.random.default_rng(seed).normal(200 * label, 40).astype(np.float32)
    paths = folder / "images" / f"{name}.nii.gz", folder / "labels" / f"{name}.nii.gz"
    for path, array in zip(paths, (image, label), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([1.5, 1.5, 1.5, 1])), path)
    return paths


@pytest.mark.slow
def test_vary_a_case(tiny_generator_folder: Path, tmp_path: Path) -> None:
    tiny = ("--generator", tiny_generator_folder)
    made = run_example("vary_a_case", tmp_path, *tiny, "--strengths", "0", "0.5")
    changes = [float(line.split("by ")[1].split()[0]) for line in made.splitlines() if "changed by" in line]
    assert changes[0] == 0 < changes[1]
    image, label = write_case(tmp_path, "mine", seed=0)
    case = ("--image", image, "--label", label, "--output", "own.png")
    own = run_example("vary_a_case", tmp_path, *tiny, *case)
    assert "strength 0.8" in own
    for name in ("varied.png", "own.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


@pytest.mark.slow
def test_build_a_dataset(tiny_generator_folder: Path, tmp_path: Path) -> None:
    command = ("build_a_dataset", tmp_path, "--generator", tiny_generator_folder, "--cases", "3")
    assert "3 cases made, 0 kept" in run_example(*command)
    assert "0 cases made, 3 kept" in run_example(*command)
    folder = tmp_path / "nnUNet_raw" / "Dataset901_SyntheticHippocampus"
    assert len(list((folder / "imagesTr").iterdir())) == len(list((folder / "labelsTr").iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize("example", ["train_with_the_transform", "train_with_monai"])
@pytest.mark.parametrize("own", [False, True])
def test_training_loops(tiny_generator_folder: Path, tmp_path: Path, own: bool, example: str) -> None:
    arguments = ["--generator", tiny_generator_folder, "--steps", "40", "--probability", "0.5"]
    if own:
        for number in range(10):
            write_case(tmp_path / "dataset", f"case_{number}", seed=number)
        arguments += ["--dataset", tmp_path / "dataset"]
    printed = run_example(example, tmp_path, *arguments).splitlines()
    first, *_, last = (float(line.split("loss ")[1]) for line in printed if "loss" in line)
    count, dice = printed[-1].removeprefix("Dice on ").split(" validation cases: ")
    if own:
        # Blobs of three grey levels are learnt in a few steps.
        assert last < first
        assert float(dice) > 0.5
    else:
        # Image and label of the tiny generator are noise.
        assert 0 < float(dice) < 1
    assert int(count) == (2 if own else 8)


@pytest.mark.slow
def test_training_from_a_bank(tiny_generator_folder: Path, tmp_path: Path) -> None:
    for number in range(10):
        write_case(tmp_path / "dataset", f"case_{number}", seed=number)
    arguments = ["--data", tmp_path / "dataset", "--generator", tiny_generator_folder, "--output", "bank"]
    command = [sys.executable, "-m", "diffaug", "bank", "build", *arguments, "--per-case", "2"]
    subprocess.run(command, cwd=tmp_path, check=True)
    arguments = ["--dataset", tmp_path / "dataset", "--bank", "bank", "--steps", "20"]
    printed = run_example("train_with_monai", tmp_path, *arguments, "--generator", tiny_generator_folder)
    assert "Dice on 2 validation cases" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vary_a_case", "build_a_dataset", "train_with_the_transform", "train_with_monai"]
)
def test_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    assert run_example(name, tmp_path)
