"""Compare settings of the verbs on validation data: what a card's defaults are chosen by.

python benchmarks/generator_quality/choose.py --generator FOLDER --data SCANS --work CACHE

Each line is one setting: for sampled pairs the energy distance of images and of label maps
to all real cases but the test ones (Szekely and Rizzo 2013; 0 is the same distribution; the first line gives
it for validation against training cases), the Kolmogorov-Smirnov statistics of the label volumes, and the
judge's Dice between image and label; for painted images the judge's Dice as a share of that on the scans.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from bench import STEPS, Bench, say
from cases import GRID, LABELS, Cases
from figures import segmenter_dice
from torch import Tensor

from diffaug.evaluation.statistics import ks_statistic
from diffaug.files import atomic_write_json

SAMPLES = 100
SETTINGS = [
    {"steps": steps, "guidance": guidance, "shift": shift, "sampler": sampler}
    for steps, guidance, shift, sampler in (
        (20, 1.0, 1.0, "euler"),
        (40, 1.0, 1.0, "euler"),
        (10, 1.0, 2.5, "heun"),
        (12, 1.0, 1.0, "adams-bashforth"),
        (12, 1.0, 2.5, "adams-bashforth"),
        (12, 1.5, 2.5, "adams-bashforth"),
        (12, 2.0, 2.5, "adams-bashforth"),
    )
]


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
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    bench = Bench(options.generator, "validation", Path(options.data), options.work, STEPS, SAMPLES, 3)
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
    for setting in SETTINGS:
        update = {**setting, "sample_guidance": setting["guidance"]}
        generator.card = generator.card.model_copy(
            update={"defaults": generator.card.defaults.model_copy(update=update)}
        )
        sample = generator.sample(SAMPLES, seed=0)
        names = tuple(map(str, range(SAMPLES)))
        cases = Cases(names, names, sample.image, sample.label)
        painted = generator.paint(held_out.labels, GRID.affine, seed=0)
        row = {
            **setting,
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
            options.output, {"generator": bench.generator_hash, "reference": reference, "settings": rows}
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
