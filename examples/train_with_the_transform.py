"""Train a small MONAI U-Net in a TorchIO pipeline that varies a part of the cases, and print its Dice.

    python examples/train_with_the_transform.py
    python examples/train_with_the_transform.py --dataset Task04_Hippocampus --steps 1000

Without a dataset (the decathlon's layout, nnU-Net raw, or folders of images and labels) the generator makes
the cases. `--probability 0` trains without variations, for comparison.
"""

import argparse
from itertools import chain, islice, repeat
from pathlib import Path

import torch
import torchio as tio
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet

import diffaug
from diffaug.datasets.reading import read_dataset
from diffaug.transforms.torchio import RandomVariation

parser = argparse.ArgumentParser()
parser.add_argument("--generator", default="hippocampus-mr", help="name in the zoo, or a folder")
parser.add_argument("--dataset", type=Path, help="folder with labelled scans")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--probability", type=float, default=0.3, help="of a variation, per case and epoch")


def made_subjects(generator: diffaug.Generator) -> tuple[list[tio.Subject], list[tio.Subject]]:
    """Subjects for training and for validation that the generator makes from nothing."""
    images, labels, affine = generator.sample(40, seed=1)
    scans = [tio.ScalarImage(tensor=image, affine=affine) for image in images]
    maps = [tio.LabelMap(tensor=label, affine=affine) for label in labels]
    subjects = [tio.Subject(image=image, label=label) for image, label in zip(scans, maps, strict=True)]
    return subjects[:32], subjects[32:]


def read_subjects(folder: Path) -> tuple[list[tio.Subject], list[tio.Subject]]:
    """Subjects for training and for validation: by the dataset's split, or every fifth patient validates."""
    dataset = read_dataset(folder)
    patients = sorted({case.patient for case in dataset.cases})
    train, validation = [], []
    for case in dataset.cases:
        subject = tio.Subject(image=tio.ScalarImage(list(case.images)), label=tio.LabelMap(case.label))
        if case.name in dataset.split["validation"] if dataset.split else case.patient in patients[::5]:
            validation.append(subject)
        elif dataset.split is None or case.name in dataset.split["train"]:
            train.append(subject)
    return train, validation


def main() -> None:
    arguments = parser.parse_args()
    torch.manual_seed(0)
    generator = diffaug.load(arguments.generator)
    train, validation = read_subjects(arguments.dataset) if arguments.dataset else made_subjects(generator)
    vary = RandomVariation(arguments.generator, p=arguments.probability)
    prepare = tio.Compose([tio.ToCanonical(), tio.ZNormalization(), tio.CropOrPad(generator.grid.shape)])
    augment = tio.Compose([vary, prepare, tio.RandomAffine(), tio.RandomNoise(p=0.3)])
    cases = tio.SubjectsDataset(train, transform=augment)
    loader = tio.SubjectsLoader(cases, batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)

    classes = len(generator.card.labels)
    network = UNet(3, len(generator.card.channels), classes, (16, 32, 64), (2, 2), num_res_units=1)
    criterion = DiceCELoss(to_onehot_y=True, softmax=True)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), arguments.steps), start=1):
        loss = criterion(network(batch["image"]["data"].float()), batch["label"]["data"])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0 or step == arguments.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    dice = DiceMetric(include_background=False, num_classes=classes)
    network.eval()
    for subject in tio.SubjectsDataset(validation, transform=prepare):
        with torch.no_grad():
            found = network(subject["image"].data[None].float()).argmax(1, keepdim=True)
        dice(found, subject["label"].data[None])
    print(f"Dice on {len(validation)} validation cases: {dice.aggregate().item():.3f}")


if __name__ == "__main__":
    main()
