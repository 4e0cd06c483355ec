"""Pretraining for nnU-Net, by its own commands: plans carried along, and weights that diffaug pretrained."""

import shutil
from pathlib import Path

import pytest

from diffaug.files import read_json
from tests.nnunet.test_nnunet import home, run

__all__ = ["home"]  # the fixture: a planned dataset 901 of five cases

# Two iterations of training and one of validation, and no sliding windows over whole cases.
TINY = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerShort(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    def perform_actual_validation(self, save_probabilities=False):
        pass
"""


@pytest.mark.slow
def test_the_recipe_is_nnunets_own(home: Path) -> None:
    """One command, then the two that it prints, with a short trainer."""
    shutil.copytree(home / "raw" / "Dataset901_Things", home / "raw" / "Dataset902_Synthetic")
    printed = run(home, "diffaug", "nnunet", "pretrain-recipe", "901", "902")
    commands = [line for line in printed.splitlines() if line.startswith("nnUNetv2_train")]
    assert len(commands) == 2
    plans = read_json(home / "preprocessed" / "Dataset902_Synthetic" / "nnUNetPlansOf901.json")
    own = read_json(home / "preprocessed" / "Dataset901_Things" / "nnUNetPlans.json")
    assert (
        plans["configurations"]["3d_fullres"]["architecture"]
        == (own["configurations"]["3d_fullres"]["architecture"])
    )
    (home / "trainers").mkdir(exist_ok=True)
    (home / "trainers" / "short.py").write_text(TINY)
    for command in commands:
        short = f"{command} -tr nnUNetTrainerShort -device cpu".replace(
            "nnUNetTrainer__", "nnUNetTrainerShort__"
        )
        log = run(home, *short.split())
    assert "Loading pretrained weights from file" in log
    with_other = run(home, "diffaug", "nnunet", "pretrain-recipe", "901", "903", fails=True)
    assert "nnU-Net knows no dataset 903" in with_other


@pytest.mark.slow
def test_weights_of_a_pretraining_start_a_training(home: Path, tiny_generator_folder: Path) -> None:
    """diffaug pretrains the network of the plans; nnUNetv2_train takes it."""
    plans = home / "preprocessed" / "Dataset901_Things" / "nnUNetPlans.json"
    out = home / "pretrained"
    arguments = ["--network", "nnunet", "--plans", plans, "--generator", tiny_generator_folder]
    arguments += ["--method", "masked", "--steps", "2", "--output", out, "--device", "cpu"]
    run(home, "diffaug", "pretrain", *arguments)
    (home / "trainers").mkdir(exist_ok=True)
    (home / "trainers" / "short.py").write_text(TINY)
    train = ["nnUNetv2_train", "901", "3d_fullres", "0", "-tr", "nnUNetTrainerShort", "-device", "cpu"]
    log = run(home, *train, "-pretrained_weights", out / "nnunet.pth")
    assert "Loading pretrained weights from file" in log
