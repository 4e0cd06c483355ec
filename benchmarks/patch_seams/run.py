"""Are there seams where the windows of a patch generator meet?

python benchmarks/patch_seams/run.py --generator FOLDER --data SCANS

A fetal atlas is varied as a whole, and once in pieces of one window each. The change of the image is compared
across the faces of windows and across the planes around them: a ratio of 1 is no seam.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffaug.datasets.reading import read_dataset
from diffaug.datasets.volumes import load_case
from diffaug.files import atomic_path, atomic_write_json
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import fit_intensity_map
from diffaug.generators.windows import window_starts
from diffaug.progress import Progress

HERE = Path(__file__).parent
STRENGTHS = (0.5, 0.9)
# Planes on each side of a face that it is compared with. They lie as far apart as the latent's points, since
# a decoder's own pattern repeats so.
AROUND = 3
# Of planes, for the chance that faces are like them.
DRAWS = 10_000


def main() -> None:
    """Vary, measure the faces, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=os.environ.get("DIFFAUG_DATA"))
    parser.add_argument("--case", default="fetal_SB_atlas_GA28_operated")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    progress = Progress()
    generator = Generator.load(options.generator)
    dataset = read_dataset(options.data / "FetalAtlas_SB")
    loaded = load_case(next(case for case in dataset.cases if case.name == options.case))
    assert loaded.label is not None
    image, label = (torch.from_numpy(part)[None] for part in (loaded.image, loaded.label))
    found, shown = [], {"original": loaded.image[0]}
    for strength in STRENGTHS:
        whole = generator.vary(image, label, loaded.affine, strength=strength, seed=1)
        pieces = in_pieces(generator, image, label, loaded.affine, strength, progress)
        for how, varied in (("windows that share their noise", whole), ("pieces", pieces)):
            change = (varied - image)[0, 0]
            measured = faces(generator, image, loaded.affine, change, pieces=how == "pieces")
            found.append({"strength": strength, "how": how, "axes": measured})
            shown[f"{how}, {strength}"] = varied[0, 0].numpy()
            progress.note(str(found[-1]))
    atomic_write_json(options.results / "seams.json", {"case": options.case, "found": found})
    draw(shown, options.results / "seams.png")


def in_pieces(
    generator: Generator,
    image: torch.Tensor,
    label: torch.Tensor,
    affine: NDArray[np.float64],
    strength: float,
    progress: Progress,
) -> torch.Tensor:
    """Varied piece by piece: each window by itself, with noise of its own, side by side."""
    out = image.clone()
    sides = list(generator.grid.shape)
    corners = [
        (i, j, k)
        for i in range(0, image.shape[2], sides[0])
        for j in range(0, image.shape[3], sides[1])
        for k in range(0, image.shape[4], sides[2])
    ]
    maps = [fit_intensity_map(image[0], generator.card.intensity)]
    with progress.task("pieces", total=len(corners)) as task:
        for number, corner in enumerate(corners):
            part = (..., *(slice(c, c + s) for c, s in zip(corner, sides, strict=True)))
            how = {"strength": strength, "seed": [number], "intensity": maps, "unlike": "ignore"}
            out[part] = generator.vary(image[part], label[part], affine, **how)
            task.advance()
    return out


def faces(
    generator: Generator,
    image: torch.Tensor,
    affine: NDArray[np.float64],
    change: torch.Tensor,
    *,
    pieces: bool,
) -> list[dict[str, float]]:
    """For each axis of the grid, how much more the change `(I, J, K)` varies across faces of windows, or of
    pieces, than across planes around them; and the same of planes that are no faces."""
    placement = generator.placement(image.shape[2:], affine)
    turned = placement.reorient(change).numpy()
    found = []
    for n, (size, axis) in enumerate(zip(turned.shape, placement.axes, strict=True)):
        own, factor = generator.grid.shape[n], generator.card.networks.downsampling[n]
        if pieces:
            planes = {size - p if placement.flips[n] else p for p in range(own, image.shape[2 + axis], own)}
        else:
            starts = window_starts(placement.grid.shape[n] // factor, own // factor)
            corners = {start * factor for start in starts} | {start * factor + own for start in starts}
            planes = {round(placement.offset[n]) + corner for corner in corners}
        steps = np.abs(np.diff(turned, axis=n)).mean(axis=tuple(a for a in range(3) if a != n))
        offsets = [factor * d for d in range(-AROUND, AROUND + 1) if d != 0]
        inside = range(AROUND * factor + 1, len(steps) - AROUND * factor)
        ratios = {p: float(steps[p - 1] / np.mean([steps[p - 1 + d] for d in offsets])) for p in inside}
        phases = {plane % factor for plane in planes}
        at_faces = [ratio for plane, ratio in ratios.items() if plane in planes]
        others = [r for p, r in ratios.items() if p not in planes and p % factor in phases]
        found.append(
            {
                "p": by_chance(at_faces, others),
                "faces": len(at_faces),
                "mean": float(np.mean(at_faces)),
                "largest": max(at_faces),
                "others": len(others),
                "mean_of_others": float(np.mean(others)),
                "largest_of_others": max(others),
            }
        )
    return found


def by_chance(at_faces: list[float], others: list[float]) -> float:
    """How often as many planes that have no face, or any, taken at random would have so large a mean."""
    planes, rng = np.array(at_faces + others), np.random.default_rng(0)
    means = np.array([rng.permutation(planes)[: len(at_faces)].mean() for _ in range(DRAWS)])
    return float((1 + (means >= np.mean(at_faces)).sum()) / (1 + DRAWS))


def draw(volumes: dict[str, NDArray[np.float32]], path: Path) -> None:
    """The middle slice of each volume along its last axis, where the head is."""
    figure = Figure(figsize=(3 * len(volumes), 4.2), layout="constrained")
    box = tuple(slice(n.min(), n.max() + 1) for n in np.nonzero(volumes["original"]))
    for axes, (title, volume) in zip(figure.subplots(1, len(volumes)), volumes.items(), strict=True):
        head = volume[box]
        axes.imshow(head[:, :, head.shape[2] // 2].T, cmap="gray", origin="lower")
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


if __name__ == "__main__":
    main()
