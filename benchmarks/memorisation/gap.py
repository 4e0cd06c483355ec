"""How much better does a denoiser know its training scans than others? For an attacker who has the weights.

python benchmarks/memorisation/gap.py --generator hippocampus-mr CURVE/step-* --data SCANS --work CACHE

The error of the image's velocity at four noise levels, label map and image at one level as in `sample`, with
the same four draws of noise for every scan; training scans beside validation scans. No test scan is read.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from diffaug.datasets.reading import read_dataset
from diffaug.files import atomic_write_json
from diffaug.generators.generator import Generator
from diffaug.generators.hardware import has_bfloat16
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.samplers import add_noise
from diffaug.progress import Progress
from diffaug.training.cases import Canvases, make_canvases
from diffaug.training.joint_flow.autoencoder import one_hot
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.subsets import split_cases
from diffaug.zoo import load

HERE = Path(__file__).parent
LEVELS, DRAWS = (0.2, 0.4, 0.6, 0.8), 4


def main() -> None:
    """Parse the command line, and measure each generator."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", nargs="+", required=True, help="names or folders of generators")
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--work", type=Path, required=True, help="folder for scans on the grid")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data, or set DIFFAUG_DATA")
    dataset, progress = read_dataset(options.data / "Task04_Hippocampus"), Progress()
    for name in options.generator:
        generator = load(name)
        plan = JointFlowPlan.model_validate(generator.plan)
        subsets = split_cases(dataset, plan.seed)
        errors = {
            subset: velocity_errors(
                generator, plan, make_canvases(plan, cases, options.work / "canvases" / subset, progress)
            )
            for subset, cases in (("train", subsets.train), ("validation", subsets.validation))
        }
        found = [
            compare(level, errors["train"][n], errors["validation"][n]) for n, level in enumerate(LEVELS)
        ]
        card = generator.card
        own = {"name": card.name, "architecture": card.architecture, "steps": card.training.denoiser_steps}
        atomic_write_json(
            options.results / "gap" / f"{card.name}.json",
            {"generator": own, "weights": generator.weights_hash, "levels": found},
        )
        progress.note(f"{card.name}: " + ", ".join(f"{one['excess']:.1%} at {one['level']}" for one in found))


@torch.no_grad()
def velocity_errors(generator: Generator, plan: JointFlowPlan, canvases: Canvases) -> NDArray[np.float64]:
    """Mean squared error of the image's velocity `(levels, cases)`, over the draws of noise."""
    model = generator.model
    assert isinstance(model, JointFlow)
    assert model.label is not None
    images, labels = [], []
    for number in range(len(canvases)):
        image, label = canvases.on_grid(number, plan.grid.shape)
        images.append(model.image.encode(torch.from_numpy(image[None])))
        labels.append(model.label.encode(one_hot(label[None], len(plan.labels))))
    image, label = torch.cat(images), torch.cat(labels)
    found = torch.zeros(len(LEVELS), len(image))
    for n, level in enumerate(LEVELS):
        for draw in range(DRAWS):
            random = torch.Generator().manual_seed(draw)
            noise = [
                torch.randn(latent.shape[1:], generator=random).expand_as(latent) for latent in (image, label)
            ]
            for rows in torch.arange(len(image)).split(24):
                at = torch.full((len(rows),), level)
                noised = [
                    add_noise(latent[rows], own[rows], at)
                    for latent, own in zip((image, label), noise, strict=True)
                ]
                with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
                    velocity, _ = model.denoiser(*noised, at, at)
                error = (velocity - (noise[0][rows] - image[rows])).square().mean((1, 2, 3, 4))
                found[n, rows] += error / DRAWS
    return found.double().numpy()


def compare(level: float, training: NDArray[np.float64], others: NDArray[np.float64]) -> dict[str, float]:
    """Mean errors, how much larger the other scans' is, and how well a scan's error tells on which side it is
    (area under the curve)."""
    area = mannwhitneyu(-training, -others).statistic / (len(training) * len(others))
    return {
        "level": level,
        "training": float(training.mean()),
        "validation": float(others.mean()),
        "excess": float(others.mean() / training.mean() - 1),
        "auc": float(area),
    }


if __name__ == "__main__":
    main()
