"""Train a small U-Net in a MONAI pipeline that varies a part of the cases, and print its Dice.

    python examples/train_with_monai.py
    python examples/train_with_monai.py --dataset Task04_Hippocampus --steps 1000
    python examples/train_with_monai.py --dataset Task04_Hippocampus --bank BANK

Without a dataset (the decathlon's layout, nnU-Net raw, or folders of images and labels) the generator makes
the cases. `--bank` draws from a bank that `diffaug bank build` made of the dataset, instead of varying cases
while training. `--probability 0` trains without variations, for comparison.
"""

import argparse
import tempfile
from itertools import chain, islice, repeat
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandGaussianNoised,
    ResizeWithPadOrCropd,
)
from monai.utils import set_determinism

import diffaug
from diffaug.datasets.building import build_dataset
from diffaug.datasets.reading import read_dataset
from diffaug.transforms.monai import RandFromBankd, RandVariationd

KEYS = ["image", "label"]

parser = argparse.ArgumentParser()
parser.add_argument("--generator", default="hippocampus-mr", help="name in the zoo, or a folder")
parser.add_argument("--dataset", type=Path, help="folder with labelled scans")
parser.add_argument("--bank", type=Path, help="bank of that dataset")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--probability", type=float, default=0.3, help="of a variation, per case and epoch")


def read_items(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Files for training and for validation: by the dataset's split, or every fifth patient validates."""
    dataset = read_dataset(folder)
    patients = sorted({case.patient for case in dataset.cases})
    train, validation = [], []
    for case in dataset.cases:
        item = {"image": [str(file) for file in case.images], "label": str(case.label)}
        if case.name in dataset.split["validation"] if dataset.split else case.patient in patients[::5]:
            validation.append(item)
        elif dataset.split is None or case.name in dataset.split["train"]:
            train.append(item)
    return train, validation


def main() -> None:
    arguments = parser.parse_args()
    set_determinism(seed=0)
    generator = diffaug.load(arguments.generator)
    with tempfile.TemporaryDirectory() as made:
        if arguments.dataset is None:
            build_dataset(generator, made, cases=40, layout="decathlon")
        train_and_test(generator, arguments.dataset or Path(made), arguments)


def train_and_test(generator: diffaug.Generator, folder: Path, arguments: argparse.Namespace) -> None:
    """The usual loop; what varies cases is one line of it."""
    train, validation = read_items(folder)
    if arguments.bank:
        vary = RandFromBankd("image", arguments.bank, prob=arguments.probability)
    else:
        vary = RandVariationd("image", generator=arguments.generator, prob=arguments.probability)
    load = [LoadImaged(KEYS), EnsureChannelFirstd(KEYS)]
    prepare = [
        Orientationd(KEYS, "RAS", labels=None),
        NormalizeIntensityd("image"),
        ResizeWithPadOrCropd(KEYS, generator.grid.shape),
    ]
    augment = Compose([*load, vary, *prepare, RandGaussianNoised("image")])
    cases = CacheDataset(train, augment, num_workers=0, progress=False)
    loader = DataLoader(cases, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)

    classes = len(generator.card.labels)
    network = UNet(3, len(generator.card.channels), classes, (16, 32, 64), (2, 2), num_res_units=1)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), arguments.steps), start=1):
        loss = criterion(network(batch["image"].as_tensor()), batch["label"].as_tensor())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == arguments.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    dice = DiceMetric(include_background=False, num_classes=classes)
    network.eval()
    for item in validation:
        case = Compose([*load, *prepare])(item)
        with torch.no_grad():
            found = network(case["image"].as_tensor()[None]).argmax(1, keepdim=True)
        dice(found, case["label"].as_tensor()[None])
    print(f"Dice on {len(validation)} validation cases: {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
