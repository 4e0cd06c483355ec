"""Compare settings of the verbs on validation data: what a card's defaults are chosen by.

python benchmarks/generator_quality/choose.py --generator FOLDER --data SCANS --work CACHE

Each line is one setting. Of sampled pairs: the difference of the images to, and the ratio of the structures'
volumes over, those of the same seeds integrated in many steps; the energy distance of images and
of label maps to all real cases but the test ones (Szekely and Rizzo 2013; 0 is the same distribution; the
first line gives it for validation against training cases); the Kolmogorov-Smirnov statistics of the label
volumes; the judge's Dice between image and label. Of painted images: the judge's Dice as a share of that on
the scans.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import STEPS, Bench, say
from cases import GRID, LABELS, Cases
from figures import segmenter_dice
from torch import Tensor

from diffaug.evaluation.statistics import ks_statistic
from diffaug.files import atomic_write_json
from diffaug.generators.generator import Generator, Sample

SAMPLES = 60
# Steps that stand for the exact flow, and the cases that it is computed for.
EXACT = {"sampler": "adams-bashforth", "steps": 60, "shift": 2.0}
EXACT_CASES = 8
SETTINGS = [
    {"sampler": sampler, "steps": steps, "shift": shift, "guidance": guidance}
    for sampler, steps, shift, guidance in (
        ("euler", 20, 1.0, 1.0),
        ("euler", 40, 1.0, 1.0),
        ("heun", 10, 3.0, 1.0),
        ("adams-bashforth", 10, 1.0, 1.0),
        ("adams-bashforth", 10, 3.0, 1.0),
        ("adams-bashforth", 10, 3.0, 1.5),
        ("adams-bashforth", 10, 3.0, 2.0),
    )
]


def with_settings(generator: Generator, setting: dict[str, Any]) -> Generator:
    """The generator with other defaults; its networks are shared."""
    update = {**setting, "sample_guidance": setting["guidance"]}
    defaults = generator.card.defaults.model_copy(update=update)
    return Generator(generator.card.model_copy(update={"defaults": defaults}), generator.model)


def deviation(found: Sample, exact: Sample) -> dict[str, float]:
    """RMS difference of the images in their standard deviations, and the ratio of the structures' volumes."""
    return {
        "error_image": float((found.image - exact.image).square().mean().sqrt() / exact.image.std()),
        "volume_ratio": float((found.label > 0).sum() / (exact.label > 0).sum()),
    }


def energy_distance(first: Tensor, second: Tensor) -> float:
    """`(2 E|X - Y| - E|X - X'| - E|Y - Y'|) / E|Y - Y'|` of rows, over pairs of different rows."""
    between = torch.cdist(first, second).mean()
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (first, second)]
    return float((2 * between - within[0] - within[1]) / within[1])


def main() -> None:
    """Parse the command line, measure each setting, print and keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", required=True)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("DIFFAUG_DATA"),
        help="folder that holds Task04_Hippocampus",
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.data is None:
        parser.error("say where the scans are: --data, or the environment variable DIFFAUG_DATA")
    bench = Bench(options.generator, "validation", options.data, options.work, STEPS, SAMPLES, 3)
    generator, held_out, everyone = bench.generator, bench.held_out, bench.everyone
    original = np.mean(segmenter_dice(bench.judge, held_out.images, held_out.labels))
    spaces = {"image": Cases.network_units, "label": Cases.foreground}
    real = {name: describe(everyone).flatten(1) for name, describe in spaces.items()}
    reference = {
        name: energy_distance(describe(held_out).flatten(1), describe(bench.train).flatten(1))
        for name, describe in spaces.items()
    }
    say(f"judge on the scans {original:.4f}; energy distance of validation to training cases {reference}")
    rows = []
    exact: dict[float, Sample] = {}
    for setting in SETTINGS:
        guidance = setting["guidance"]
        if guidance not in exact:
            exact[guidance] = with_settings(generator, {**EXACT, "guidance": guidance}).sample(EXACT_CASES)
        chosen = with_settings(generator, setting)
        sample = chosen.sample(SAMPLES, seed=0)
        names = tuple(map(str, range(SAMPLES)))
        cases = Cases(names, names, sample.image, sample.label)
        painted = chosen.paint(held_out.labels, GRID.affine, seed=0)
        row = {
            **setting,
            **deviation(
                Sample(sample.image[:EXACT_CASES], sample.label[:EXACT_CASES], sample.affine), exact[guidance]
            ),
            **{
                f"energy_{name}": energy_distance(describe(cases).flatten(1), real[name])
                for name, describe in spaces.items()
            },
            **{
                f"ks_{label}": ks_statistic(
                    *((c.labels == label).flatten(1).sum(1).tolist() for c in (everyone, cases))
                )
                for label in LABELS
            },
            "judge_dice": float(np.mean(segmenter_dice(bench.judge, cases.images, cases.labels))),
            "paint_share": float(np.mean(segmenter_dice(bench.judge, painted, held_out.labels)) / original),
        }
        rows.append(row)
        say(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if options.output:
        atomic_write_json(
            options.output,
            {"weights": generator.weights_hash, "reference": reference, "settings": rows},
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
