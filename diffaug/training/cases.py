"""The training cases as canvases: grid plus margin, in network units, on disk and memory-mapped."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.errors import DiffaugError
from diffaug.files import atomic_paths
from diffaug.generators.grid import Box, Grid, place
from diffaug.generators.intensity import fit_intensity_map
from diffaug.generators.labels import Vocabulary
from diffaug.generators.seeds import case_seed
from diffaug.progress import Progress
from diffaug.training.plan import PlanBase

# Places of patches in all training cases together, and in each validation case.
PLACES, VALIDATION_PLACES = 512, 4
# Cases that an evaluation during training takes at most: it runs the denoiser a hundred times for them.
EVALUATED = 20


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

    def evaluated(self) -> list[int]:
        """The cases that a training is evaluated on as it goes: all, or 20 of them evenly spread."""
        return [n * len(self) // min(len(self), EVALUATED) for n in range(min(len(self), EVALUATED))]

    def on_grid(
        self, index: int, shape: tuple[int, int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The case without augmentation: the middle of the canvas."""
        starts = [(n - s) // 2 for n, s in zip(self.images.shape[2:], shape, strict=True)]
        i, j, k = (slice(a, a + s) for a, s in zip(starts, shape, strict=True))
        image, label = self.images[index][:, i, j, k], self.labels[index][i, j, k]
        return np.asarray(image, dtype=np.float32), np.asarray(label)


def check_extents(plan: PlanBase, cases: Sequence[CaseFiles]) -> None:
    """Raise a DiffaugError that names every case without a label map whose scan is so much larger than the
    plan's grid that the place of the grid in it would have to be said. Reads headers only. A generator of
    patches takes them from anywhere."""
    if plan.extent == "patch":
        return
    grid, found = canvas_grid(plan), []
    for case in cases:
        if case.label is None:
            header: Any = nib.load(case.images[0])
            try:
                place(grid, header.shape[:3], header.affine)
            except DiffaugError as error:
                found.append(f"  {case.images[0]}: {error}")
    if found:
        raise DiffaugError(
            f"{len(found)} scan(s) are too large for the plan's grid: crop them, or give label maps, around "
            "which the grid is laid\n" + "\n".join(found)
        )


def make_canvases(
    plan: PlanBase,
    cases: tuple[CaseFiles, ...],
    folder: Path,
    progress: Progress,
    *,
    places: int | None = None,
) -> Canvases:
    """Bring all cases onto the plan's grid plus margin and keep them under `folder`; reuse what is there.

    Args:
        places: of each case, for a generator of patches; default: `places_per_case`.
    """
    each = 1 if plan.extent == "object" else places or places_per_case(len(cases))
    names = tuple(c.name for c in cases for _ in range(each))
    files = {part: folder / f"{part}.npy" for part in ("images", "labels", "labelled")}
    if not all(file.exists() for file in files.values()):
        with atomic_paths(list(files.values())) as temporaries:
            _write_canvases(plan, cases, each, temporaries, progress)
    return Canvases(
        np.load(files["images"], mmap_mode="r"),
        np.load(files["labels"], mmap_mode="r"),
        np.load(files["labelled"]),
        names,
    )


def _write_canvases(
    plan: PlanBase, cases: tuple[CaseFiles, ...], each: int, paths: list[Path], progress: Progress
) -> None:
    """Fill the files of images, labels and of who has a label, a case at a time: they may be larger than
    memory. Of a generator of patches each case gives several canvases, one for each of its places."""
    grid, vocabulary = canvas_grid(plan), Vocabulary(plan.labels)
    count = each * len(cases)
    shape = count, len(plan.channels), *grid.shape
    images = open_memmap(paths[0], mode="w+", dtype=np.float16, shape=shape)
    labels = open_memmap(paths[1], mode="w+", dtype=np.uint8, shape=(count, *grid.shape))
    labelled = np.zeros(count, bool)
    with progress.task("reading cases", total=len(cases)) as task:
        for n, case in enumerate(cases):
            loaded = load_case(case)
            image = torch.from_numpy(loaded.image)
            label = None if loaded.label is None else torch.from_numpy(loaded.label)
            foreground = None if label is None else label[0] > 0
            normalised = fit_intensity_map(image, plan.intensity).normalise(image)
            places = None
            if label is not None and plan.labels:
                places = vocabulary.indices(label[None])
            for row in range(each * n, each * (n + 1)):
                box = None
                if plan.extent == "patch":
                    box = patch_box(image.shape[1:], case_seed(plan.seed, row))
                try:
                    placement = place(grid, image.shape[1:], loaded.affine, foreground=foreground, box=box)
                except DiffaugError as error:
                    raise DiffaugError(f"{case.images[0]}: {error}") from error
                images[row] = placement.image_to_grid(normalised[None])[0].numpy()
                if places is not None:
                    labels[row] = placement.label_to_grid(places)[0, 0].numpy()
                    labelled[row] = True
            task.advance()
    images.flush()
    labels.flush()
    np.save(paths[2], labelled)


def places_per_case(cases: int) -> int:
    """Places of each case that a generator of patches is trained on: 512 of all cases, 4 to 64 of each."""
    return max(4, min(64, -(-PLACES // max(cases, 1))))


def patch_box(shape: Sequence[int], seed: int) -> Box:
    """A voxel of a volume, around which a patch is taken."""
    rng = np.random.default_rng(seed)
    i, j, k = (int(rng.integers(n)) for n in shape)
    return (i, i + 1), (j, j + 1), (k, k + 1)


def canvas_grid(plan: PlanBase) -> Grid:
    """The plan's grid with the augmentation's margin on every side: a small one where what lies beyond is the
    mirror image, all that it can reach where that would be background."""
    grid, augmentation = plan.grid, plan.augmentation
    margins = (augmentation.margin,) * 3
    if grid.outside == "background":
        margins = augmentation.reach(grid.shape, grid.spacing)
    i, j, k = (n + 2 * margin for n, margin in zip(grid.shape, margins, strict=True))
    return Grid(grid.orientation, grid.spacing, (i, j, k), grid.outside)
