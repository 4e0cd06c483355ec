"""Seconds of nnU-Net's loading and of its training step, with its own trainer and with a bank; see run.py.

python benchmarks/transform_cost/nnunet_iterations.py PREPROCESSED_DATASET
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from diffaug.nnunet.trainers import nnUNetTrainerDiffAug

BATCHES, STEPS, DRAWS = 200, 6, 400


def main() -> None:
    """Print the seconds as JSON."""
    folder = Path(sys.argv[1])
    with redirect_stdout(sys.stderr):
        found = measure(folder)
    print(json.dumps(found))


def measure(folder: Path) -> dict[str, float]:
    """Seconds of loading a batch, of a step, and what a draw adds to reading a case."""
    trainers = {kind: make(kind, folder) for kind in (nnUNetTrainer, nnUNetTrainerDiffAug)}
    loads, reads = {}, {}
    for kind, trainer in trainers.items():
        trainer.initialize()
        loader, _ = trainer.get_dataloaders()
        loads[kind] = seconds(lambda loader=loader: next(loader), BATCHES)
        data = loader.data_loader._data
        names = iter(data.identifiers * (DRAWS // len(data.identifiers) + 2))
        reads[kind] = seconds(
            lambda data=data, names=names: np.asarray(data.load_case(next(names))[0][:]), DRAWS
        )
        batch = next(loader)
    trainer = trainers[nnUNetTrainerDiffAug]
    step = seconds(lambda: trainer.train_step(batch), STEPS)
    return {
        "batch": trainer.batch_size,
        "load": loads[nnUNetTrainer],
        "load_bank": loads[nnUNetTrainerDiffAug],
        "step": step,
        "draw_extra": reads[nnUNetTrainerDiffAug] - reads[nnUNetTrainer],
    }


def make(kind: type[nnUNetTrainer], folder: Path) -> nnUNetTrainer:
    """A trainer of the "all" fold on the CPU."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    description = json.loads((folder / "dataset.json").read_text())
    return kind(plans, "3d_fullres", "all", description, torch.device("cpu"))


def seconds(function: Callable[[], object], count: int) -> float:
    """Mean wall-clock time of a call: nnU-Net's augmentation does much in few of them."""
    function()
    started = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - started) / count


if __name__ == "__main__":
    main()
