"""Build a labelled synthetic dataset in nnU-Net's raw layout, and look at what it holds.

    python examples/build_a_dataset.py
    python examples/build_a_dataset.py --cases 500 --output nnUNet_raw/Dataset902_More --seed 1

Interrupted, the same command goes on where it stopped. `diffaug build` does the same from the command line.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import diffaug
from diffaug.datasets.building import build_dataset
from diffaug.datasets.reading import read_dataset
from diffaug.datasets.volumes import load_case
from diffaug.progress import Progress

parser = argparse.ArgumentParser()
parser.add_argument("--generator", default="hippocampus-mr", help="name in the zoo, or a folder")
parser.add_argument("--output", type=Path, default="nnUNet_raw/Dataset901_SyntheticHippocampus")
parser.add_argument("--cases", type=int, default=16)
parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    build = build_dataset(
        diffaug.load(arguments.generator).to(device),
        arguments.output,
        cases=arguments.cases,
        seed=arguments.seed,
        progress=Progress(),
    )
    print(f"{build.output}: {build.made} cases made, {build.kept} kept, licence {build.licence}")

    dataset = read_dataset(build.output)
    for case in dataset.cases[:4]:
        image, label, affine = load_case(case)
        voxel = abs(np.linalg.det(affine[:3, :3]))
        volumes = {name: f"{(label == n).sum() * voxel:.0f} mm³" for n, name in dataset.labels.items() if n}
        print(case.name, "x".join(map(str, image.shape[1:])), volumes)
    first = json.loads((build.output / "manifest.json").read_text())["cases"][0]
    print("provenance of the first case:", json.dumps(first, indent=2))


if __name__ == "__main__":
    main()
