"""Plot what each operation does to one case: variation, the four kinds of inpainting, and repaint.

    python examples/show_the_operations.py
    python examples/show_the_operations.py --image scan.nii.gz --label segmentation.nii.gz

Without a case of your own, the generator makes one. Each row is one draw; the outlines are the label map that
comes back.
"""

import argparse
from typing import get_args

import nibabel as nib
import numpy as np
import torch

import diffaug
from diffaug.figures import montage
from diffaug.operations import Case, Inpainting, Repaint, Variation, apply
from diffaug.operations.regions import Shape

parser = argparse.ArgumentParser()
parser.add_argument("--generator", default="hippocampus-mr", help="name in the zoo, or a folder")
parser.add_argument("--image", help="NIfTI file; needs --label")
parser.add_argument("--label", help="NIfTI file with its label map")
parser.add_argument("--output", default="operations.png", help="PNG file to write")
parser.add_argument("--seed", type=int, default=0)


def main() -> None:
    arguments = parser.parse_args()
    generator = diffaug.load(arguments.generator)
    if arguments.image:
        scan, label = nib.load(arguments.image), nib.load(arguments.label)
        affine = scan.affine
        image = torch.from_numpy(scan.get_fdata(dtype=np.float32))[None]
        case = Case(image, torch.from_numpy(np.asarray(label.dataobj, dtype=np.int16))[None])
    else:
        images, labels, affine = generator.sample(1, seed=arguments.seed)
        case = Case(images[0], labels[0])

    operations = {"variation": Variation(arguments.generator), "repaint": Repaint(arguments.generator)}
    operations |= {
        f"inpainting, {shape}": Inpainting(arguments.generator, shape) for shape in get_args(Shape)
    }
    shown = {"original": case}
    for name, operation in operations.items():
        shown[name] = apply(operation.parameters(arguments.seed), case, affine)
        changed = float((shown[name].image != case.image).float().mean())
        print(f"{name}: {100 * changed:.0f} % of the voxels changed")
    montage(
        [made.image for made in shown.values()],
        [made.label for made in shown.values()],
        list(shown),
        arguments.output,
        affines=[affine] * len(shown),
        names=generator.card.labels,
        heading=f"One case, and what operations with {generator.name} make of it",
        footer=f"Licence of the generator: {generator.card.licence}",
    )
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
