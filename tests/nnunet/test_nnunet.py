"""nnU-Net's own commands with a bank: prepare, train, predict without diffaug, and the guard."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from diffaug.files import read_json
from tests.operations.test_operations import AFFINE, make_case

CASES = [f"case_{n}" for n in range(5)]
# Two iterations of training and one of validation, and no sliding windows over whole cases.
TINY = """
from diffaug.nnunet.trainers import nnUNetTrainerDiffAug


class nnUNetTrainerTiny(nnUNetTrainerDiffAug):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    def perform_actual_validation(self, save_probabilities=False):
        pass
"""
TINY_GPU = TINY.replace("nnUNetTrainerDiffAug", "nnUNetTrainerDiffAugGPU").replace(
    "TrainerTiny", "TrainerTinyGPU"
)
# Reads what the trainer's loader reads, many times. Volumes are told apart by their bytes: their sums are
# all about 0, since nnU-Net normalises them, and coincide by rounding.
READS = """
import json, sys
import numpy as np, torch
from diffaug.nnunet.trainers import nnUNetTrainerDiffAug

folder = sys.argv[1]
plans = json.load(open(folder + "/nnUNetPlans.json"))
plans["continue_training"] = False
description = json.load(open(folder + "/dataset.json"))
trainer = nnUNetTrainerDiffAug(plans, "3d_fullres", 0, description, torch.device("cpu"))
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
training, validation = trainer.get_tr_and_val_datasets()
np.random.seed(0)
for name in training.identifiers:
    kinds = set()
    for _ in range(30):
        data, seg, previous, properties = training.load_case(name)
        assert data.shape[1:] == seg.shape[1:]
        assert previous is None
        assert set(properties["class_locations"]) == {1, 2}
        for value, where in properties["class_locations"].items():
            assert (np.asarray(seg[:])[tuple(where.T)] == value).all()
        kinds.add(np.asarray(data[:]).tobytes())
    assert len(kinds) == 3, len(kinds)
    assert abs(np.asarray(data[:]).mean()) < 1e-2
for name in validation.identifiers:
    assert len({np.asarray(validation.load_case(name)[0][:]).tobytes() for _ in range(20)}) == 1
print("read", len(training.identifiers), len(validation.identifiers))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's three folders with a planned and preprocessed dataset of five cases."""
    home = tmp_path_factory.mktemp("nnunet")
    raw = home / "raw" / "Dataset901_Things"
    for number, name in enumerate(CASES):
        image, label = make_case((40, 36, 32))
        volumes = {
            f"imagesTr/{name}_0000": image[0].numpy() + np.int16(3 * number),
            f"labelsTr/{name}": label[0].numpy(),
        }
        for file, array in volumes.items():
            (raw / file).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), raw / f"{file}.nii.gz")
    shutil.copytree(raw / "imagesTr", raw / "imagesTs")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "head": 1, "body": 2},
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    run(home, "nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    split = [{"train": CASES[:4], "val": CASES[4:]}]
    (home / "preprocessed" / raw.name / "splits_final.json").write_text(json.dumps(split))
    return home


@pytest.fixture(scope="module")
def prepared(home: Path, tiny_generator_folder: Path) -> Path:
    """With a bank of two variations a case, of which one comes two times in three."""
    raw = home / "raw" / "Dataset901_Things"
    arguments = ["--data", raw, "--generator", tiny_generator_folder, "--label-mapping", "1=1"]
    run(
        home,
        "diffaug",
        "bank",
        "build",
        *arguments,
        "--per-case",
        "2",
        "--steps",
        "1",
        "--output",
        home / "bank",
    )
    command = ["diffaug", "nnunet", "prepare", "901", "--bank", home / "bank", "--probability", "0.67"]
    first, again = run(home, *command), run(home, *command)
    assert "10 variations preprocessed, 0 kept" in first
    assert "0 variations preprocessed, 10 kept" in again
    assert "unknown which scans trained" in first
    return home / "preprocessed" / raw.name


def run(home: Path, *command: str | Path, fails: bool = False, without: str = "") -> str:
    """What a command prints, with nnU-Net's folders in `home`."""
    folders = {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
    environment = os.environ | folders | {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
    environment["nnUNet_extTrainer"] = str(home / "trainers")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if "train" in str(command[0]):
        environment["nnUNet_n_proc_DA"] = "0"
    if without:
        environment["PYTHONPATH"] = without
    process = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=900
    )
    printed = process.stdout + process.stderr
    assert (process.returncode != 0) == fails, printed[-4000:]
    return printed


def test_training_reads_entries_and_validation_does_not(home: Path, prepared: Path) -> None:
    assert "read 4 1" in run(home, sys.executable, "-c", READS, prepared)


def test_entries_are_preprocessed_as_their_cases(
    home: Path, prepared: Path, tiny_generator_folder: Path
) -> None:
    """Of a variation of strength 0 nnU-Net makes the case's own arrays."""
    from diffaug.bank import build_bank
    from diffaug.datasets.reading import read_dataset
    from diffaug.operations import Variation

    script = """
import sys
import blosc2, numpy as np
from diffaug.nnunet.preparing import prepare_bank
done = prepare_bank(901, sys.argv[1], configuration="3d_fullres", probability=0)
for case in ("case_0", "case_3"):
    for ending in (".b2nd", "_seg.b2nd"):
        own = blosc2.open(f"{sys.argv[2]}/nnUNetPlans_3d_fullres/{case}{ending}")[:]
        entry = blosc2.open(f"{done.folder}/{case}__0{ending}")[:]
        assert own.dtype == entry.dtype
        assert np.array_equal(own, entry), ending
print("equal")
"""
    operation = Variation(tiny_generator_folder, 0.0)
    dataset = read_dataset(home / "raw" / "Dataset901_Things")
    build_bank(operation, dataset, home / "identity", per_case=1)
    copied = home / "copy"
    shutil.copytree(home / "raw", copied / "raw")
    shutil.copytree(home / "preprocessed", copied / "preprocessed")
    (old,) = (copied / "preprocessed" / prepared.name).glob("diffaug_nnUNetPlans_3d_fullres_*")
    folder = copied / "preprocessed" / prepared.name
    assert "equal" in run(copied, sys.executable, "-c", script, home / "identity", folder)
    assert not old.exists(), "entries of the former bank"
    assert len(list(folder.glob("diffaug_nnUNetPlans_3d_fullres_*"))) == 1


@pytest.mark.slow
def test_commands_of_the_readme(data_folder: Path, tmp_path: Path) -> None:
    """On real scans, with fewer variations and a short training on a CPU."""
    (tmp_path / "raw").mkdir()
    source = tmp_path / "Task04_Hippocampus"
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (source / kind).mkdir(parents=True)
    task = data_folder / "Task04_Hippocampus"
    split = read_json(task / "splits.json")
    names = [*split["train"][:6], *split["validation"][:6]]
    for name in names:
        for kind in ("imagesTr", "labelsTr"):
            shutil.copy(task / kind / f"{name}.nii.gz", source / kind)
    shutil.copy(task / "imagesTr" / f"{names[-1]}.nii.gz", source / "imagesTs")
    description = read_json(task / "dataset.json")
    files = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    description |= {"numTraining": len(names), "training": files, "test": []}
    (source / "dataset.json").write_text(json.dumps(description))
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    block = readme.split("<!-- nnunet -->\n```bash\n")[1].split("```")[0]
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "tiny.py").write_text(TINY)
    changes = {
        "--per-case 8": "--per-case 1",
        "-tr nnUNetTrainerDiffAug": "-tr nnUNetTrainerTiny -device cpu",
        "$(diffaug nnunet trainer-dir)": str(tmp_path / "trainers"),
        "-o predictions": "-o predictions --disable_tta -npp 1 -nps 1",
        "nnUNetv2_train": "nnUNet_n_proc_DA=0 nnUNetv2_train",
    }
    for own, short in changes.items():
        assert own in block
        block = block.replace(own, short)
    printed = run(tmp_path, "bash", "-euo", "pipefail", "-c", f"cd {tmp_path}\n{block}")
    assert "12 cases: 6 validate once each, 0 synthetic ones and 6 real ones only train" in printed
    assert "one of 1 variations by hippocampus-mr comes instead of a training case" in printed
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 1


@pytest.mark.slow
def test_train_and_predict_without_diffaug(home: Path, prepared: Path, tmp_path: Path) -> None:
    (home / "trainers").mkdir()
    (home / "trainers" / "tiny.py").write_text(TINY)
    log = run(home, "nnUNetv2_train", "901", "3d_fullres", "0", "-tr", "nnUNetTrainerTiny", "-device", "cpu")
    assert "with probability 0.67 one of 2 variations by tiny comes instead of a training case" in log
    assert "for 4 of 4 cases" in log
    results = home / "results" / prepared.name / "nnUNetTrainerTiny__nnUNetPlans__3d_fullres"
    checkpoint = torch.load(results / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    (tmp_path / "diffaug").mkdir()
    (tmp_path / "diffaug" / "__init__.py").write_text("raise ImportError('not installed')")
    shutil.rmtree(home / "trainers")
    arguments = ["-i", home / "raw" / prepared.name / "imagesTs", "-o", home / "predicted", "-d", "901"]
    arguments += ["-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerTiny", "-device", "cpu"]
    arguments += ["--disable_tta", "-npp", "1", "-nps", "1"]
    run(home, "nnUNetv2_predict", *arguments, without=str(tmp_path))
    assert len(list((home / "predicted").glob("*.nii.gz"))) == len(CASES)


# -------- variations in the training step

FINISH = """
import json, sys
import numpy as np, torch
from diffaug.nnunet.trainers import nnUNetTrainerDiffAugGPU

folder = sys.argv[1]
plans = json.load(open(folder + "/nnUNetPlans.json"))
plans["continue_training"] = False
description = json.load(open(folder + "/dataset.json"))
trainer = nnUNetTrainerDiffAugGPU(plans, "3d_fullres", 0, description, torch.device("cpu"))
trainer.initialize()
loader, _ = trainer.get_dataloaders()
batch = next(loader)
data, target = batch["data"].clone(), batch["target"].clone()
assert data.shape[2:] == target.shape[2:], "deep supervision comes after the variation"
image, levels = trainer.finish(data, target)
params = trainer.vary.last_params
assert [p is None for p in params] == [False, False]
for n, p in enumerate(params):
    assert p["verb"] == "vary" and p["label_mapping"] == {"1": 1}
    # Mirrored along some axes, and varied.
    mirrors = [axes for axes in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])
               if torch.equal(target[n].clamp(min=0).flip([1 + a for a in axes]), levels[0][n])]
    assert mirrors
    distances = [float((data[n].flip([1 + a for a in axes]) - image[n]).abs().mean()) for axes in mirrors]
    assert 0 < min(distances) < 1.5, distances
shapes = [tuple(level.shape[2:]) for level in levels]
assert shapes[0] == tuple(data.shape[2:]) and shapes == sorted(shapes, reverse=True) and len(shapes) > 1
print("finished", len(levels))
"""


@pytest.fixture(scope="module")
def online(home: Path, tiny_generator_folder: Path) -> Path:
    """With a generator that varies every patch."""
    command = ["diffaug", "nnunet", "prepare", "901", "--generator", tiny_generator_folder]
    printed = run(home, *command, "--probability", "1", "--label-mapping", "1=1", "--strength", "0.2", "0.4")
    folder = home / "preprocessed" / "Dataset901_Things"
    assert str(folder / "diffaug.json") in printed.splitlines()
    settings = read_json(folder / "diffaug.json")["online"]
    assert settings["axes"] == list(nib.orientations.aff2axcodes(AFFINE))
    return folder


def test_patches_are_varied_before_they_are_mirrored(home: Path, online: Path) -> None:
    assert "finished" in run(home, sys.executable, "-c", FINISH, online)


@pytest.mark.slow
def test_train_with_the_generator(home: Path, online: Path) -> None:
    (home / "trainers").mkdir(exist_ok=True)
    (home / "trainers" / "tiny_gpu.py").write_text(TINY_GPU)
    command = ["nnUNetv2_train", "901", "3d_fullres", "0", "-tr", "nnUNetTrainerTinyGPU", "-device", "cpu"]
    run(home, *command)
    results = home / "results" / online.name / "nnUNetTrainerTinyGPU__nnUNetPlans__3d_fullres"
    checkpoint = torch.load(results / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    shutil.rmtree(home / "trainers")


@pytest.mark.parametrize("forward", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_patches_know_their_directions(forward: tuple[int, int, int]) -> None:
    """A step along an axis of an array leads where the same step in the file does."""
    from diffaug.nnunet.trainers import patch_affine

    codes = nib.orientations.aff2axcodes(AFFINE)
    voxels = np.arange(np.prod((4, 5, 6))).reshape(4, 5, 6)
    spacing = nib.affines.voxel_sizes(AFFINE)
    read = voxels.transpose(2, 1, 0).transpose(forward)
    own = [spacing[2 - source] for source in forward]
    affine = patch_affine(codes, forward, own)
    for axis in range(3):
        step = [0, 0, 0]
        step[axis] = 1
        where = np.argwhere(voxels == read[tuple(step)])[0]
        np.testing.assert_allclose(affine[:3, :3] @ step, AFFINE[:3, :3] @ where)


# -------- refusals


def test_validation_cases_that_trained_the_generator_are_refused(home: Path, prepared: Path) -> None:
    settings = read_json(prepared / "diffaug.json")
    bank = settings["banks"]["nnUNetPlans__3d_fullres"]
    try:
        bank["trained_generator"] = ["case_1", "case_4"]
        (prepared / "diffaug.json").write_text(json.dumps(settings))
        refused = run(home, sys.executable, "-c", READS, prepared, fails=True)
        assert "1 of 1 validation cases trained tiny, such as case_4" in refused
        bank["leaks"] = "warn"
        (prepared / "diffaug.json").write_text(json.dumps(settings))
        assert "WARNING: 1 of 1 validation cases trained tiny" in run(
            home, sys.executable, "-c", READS, prepared
        )
    finally:
        bank |= {"trained_generator": None, "leaks": "refuse"}
        (prepared / "diffaug.json").write_text(json.dumps(settings))


def test_scans_that_trained_the_generator_are_recognised(home: Path, prepared: Path, tmp_path: Path) -> None:
    from diffaug.datasets.reading import read_dataset
    from diffaug.datasets.training_scans import record_training_scans
    from diffaug.progress import Progress

    cases = read_dataset(home / "raw" / prepared.name).cases
    record = record_training_scans([case for case in cases if case.name == "case_2"], Progress(quiet=True))
    (tmp_path / "scans.json").write_text(json.dumps(record))
    before = (prepared / "diffaug.json").read_bytes()
    command = ["diffaug", "nnunet", "prepare", "901", "--bank", home / "bank"]
    printed = run(home, *command, "--training-scans", tmp_path / "scans.json")
    assert "1 cases trained the generator" in printed
    bank = read_json(prepared / "diffaug.json")["banks"]["nnUNetPlans__3d_fullres"]
    assert bank["trained_generator"] == ["case_2"]
    (prepared / "diffaug.json").write_bytes(before)


def test_what_is_missing_is_named(home: Path, prepared: Path, tmp_path: Path) -> None:
    prepare = ["diffaug", "nnunet", "prepare"]
    bank = ["--bank", home / "bank"]
    assert "nnU-Net knows no dataset 77" in run(home, *prepare, "77", *bank, fails=True)
    printed = run(home, *prepare, "901", *bank, "--configuration", "2d_x", fails=True)
    assert "has no configuration 2d_x; it has" in printed
    mixed = run(home, *prepare, "901", *bank, "--strength", "0.1", "0.2", fails=True)
    assert "--strength goes with --generator" in mixed
    assert "is missing: run nnUNetv2_plan_and_preprocess first, or give other plans" in run(
        home, *prepare, "901", *bank, "--plans", "Other", fails=True
    )
    (prepared / "diffaug.json").rename(tmp_path / "kept.json")
    try:
        missing = run(home, sys.executable, "-c", READS, prepared, fails=True)
        assert "names no bank for nnUNetPlans__3d_fullres" in missing
        assert "diffaug nnunet prepare Dataset901_Things --bank BANK" in missing
    finally:
        (tmp_path / "kept.json").rename(prepared / "diffaug.json")


def test_trainer_dir_holds_the_trainers_alone(home: Path) -> None:
    folder = Path(run(home, "diffaug", "nnunet", "trainer-dir").strip())
    assert [file.name for file in folder.glob("*.py")] == ["diffaug_trainers.py"]
    code = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "import pickle\n"
        "found = find('nnUNetTrainerDiffAug')\n"
        "assert pickle.loads(pickle.dumps(found)) is found\n"
        "print(found.__module__)"
    )
    environment = os.environ | {"nnUNet_extTrainer": str(folder)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.strip().endswith("diffaug.nnunet.trainers"), process.stderr
