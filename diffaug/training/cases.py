"""The training cases as canvases: grid plus margin, in network units, on disk and memory-mapped."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.files import atomic_path
from diffaug.generators.grid import Grid, place
from diffaug.generators.intensity import fit_intensity_map
from diffaug.generators.labels import Vocabulary
from diffaug.progress import Progress
from diffaug.training.plan import PlanBase


@dataclass(frozen=True)
class Canvases:
    """Images `(N, C, *canvas)` float16 in network units, label indices `(N, *canvas)` uint8, and who has a
    label."""

    images: NDArray[np.float16]
    labels: NDArray[np.uint8]
    labelled: NDArray[np.bool_]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def case(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """Image and label of one case."""
        label = np.asarray(self.labels[index]) if self.labelled[index] else None
        return np.asarray(self.images[index], dtype=np.float32), label

    def on_grid(
        self, index: int, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The case without augmentation: the middle of the canvas."""
        starts = [(n - s) // 2 for n, s in zip(self.images.shape[2:], shape, strict=True)]
        i, j, k = (slice(a, a + s) for a, s in zip(starts, shape, strict=True))
        image, label = self.images[index][:, i, j, k], self.labels[index][i, j, k]
        return np.asarray(image, dtype=np.float32), np.asarray(label)


def make_canvases(plan: PlanBase, cases: tuple[CaseFiles, ...], folder: Path, progress: Progress) -> Canvases:
    """Bring all cases onto the plan's grid plus margin and keep them under `folder`; reuse what is there."""
    grid = canvas_grid(plan)
    vocabulary = Vocabulary(plan.labels)
    names = tuple(c.name for c in cases)
    files = {part: folder / f"{part}.npy" for part in ("images", "labels", "labelled")}
    if not all(file.exists() for file in files.values()):
        images = np.zeros((len(cases), len(plan.channels), *grid.shape), np.float16)
        labels = np.zeros((len(cases), *grid.shape), np.uint8)
        labelled = np.zeros(len(cases), bool)
        with progress.task("reading cases", total=len(cases)) as task:
            for n, case in enumerate(cases):
                loaded = load_case(case)
                image = torch.from_numpy(loaded.image)
                label = None if loaded.label is None else torch.from_numpy(loaded.label)
                placement = place(
                    grid, image.shape[1:], loaded.affine, foreground=None if label is None else label[0] > 0
                )
                normalised = fit_intensity_map(image, plan.intensity).normalise(image)
                images[n] = placement.image_to_grid(normalised[None])[0].numpy()
                if label is not None and plan.labels:
                    one_hot = vocabulary.one_hot(label[None])
                    labels[n] = placement.label_to_grid(one_hot)[0].argmax(dim=0).numpy()
                    labelled[n] = True
                task.advance()
        for part, array in (("images", images), ("labels", labels), ("labelled", labelled)):
            with atomic_path(files[part]) as temporary:
                np.save(temporary, array)
    return Canvases(
        np.load(files["images"], mmap_mode="r"),
        np.load(files["labels"], mmap_mode="r"),
        np.load(files["labelled"]),
        names,
    )


def canvas_grid(plan: PlanBase) -> Grid:
    """The plan's grid with the augmentation's margin on every side."""
    margin = plan.augmentation.margin
    i, j, k = (n + 2 * margin for n in plan.grid.shape)
    return Grid(plan.grid.orientation, plan.grid.spacing, (i, j, k), plan.grid.outside)
