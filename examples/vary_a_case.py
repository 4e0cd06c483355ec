"""Vary a case and plot it: the same anatomy at rising strengths, with the outlines of its label.

    python examples/vary_a_case.py
    python examples/vary_a_case.py --image scan.nii.gz --label segmentation.nii.gz

Without a case of your own, the generator makes the one that is varied.
"""

import argparse

import nibabel as nib
import numpy as np
import torch

import diffaug
from diffaug.figures import montage

parser = argparse.ArgumentParser()
parser.add_argument("--generator", default="hippocampus-mr", help="name in the zoo, or a folder")
parser.add_argument("--image", help="NIfTI file to vary; needs --label")
parser.add_argument("--label", help="NIfTI file with its label map")
parser.add_argument("--output", default="varied.png", help="PNG file to write")
parser.add_argument("--strengths", type=float, nargs="+", default=[0.2, 0.4, 0.6, 0.8])
parser.add_argument("--seed", type=int, default=0)


def read(path: str) -> tuple[torch.Tensor, np.ndarray]:
    """A scan as a batch of one, (1, 1, I, J, K), and its affine."""
    scan = nib.load(path)
    return torch.from_numpy(scan.get_fdata(dtype=np.float32))[None, None], scan.affine


def main() -> None:
    arguments = parser.parse_args()
    generator = diffaug.load(arguments.generator)
    if arguments.image:
        image, affine = read(arguments.image)
        label = read(arguments.label)[0].short()
    else:
        image, label, affine = generator.sample(1, seed=arguments.seed)

    volumes, titles = [image], ["original"]
    for strength in arguments.strengths:
        varied = generator.vary(image, label, affine, strength=strength, seed=arguments.seed)
        change = float((varied - image).abs().mean() / image.std())
        print(f"strength {strength}: changed by {change:.3f} standard deviations of the image")
        volumes.append(varied)
        titles.append(f"strength {strength}")

    montage(
        [volume[0] for volume in volumes],
        [label[0]] * len(volumes),
        titles,
        arguments.output,
        affines=[affine] * len(volumes),
        names=generator.card.labels,
        heading=f"One anatomy, varied by {generator.name}",
        footer=f"Licence of the generator: {generator.card.licence}",
    )
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
