"""From a fingerprint to the parts of a plan that do not depend on the architecture."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from accelerate import Accelerator

from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityConvention
from diffaug.training.fingerprint import ORIENTATION, Fingerprint
from diffaug.training.plan import GridPlan

# Voxels along each side of a patch.
PATCH = 48


@dataclass(frozen=True)
class Request:
    """What a plan is made from: the data, and what the user asked for.

    Attributes:
        budget: seconds of training that the user grants; becomes a number of iterations by timing a few here
            and now.
        init: the generator to start from: its grid, intensity convention and networks are kept.
        perceptual: SHA-256 of the files with a perceptual loss's weights, where the architecture has one.
        mirror_axes: grid axes that are mirrored; None for the preset's, or none.
        extent: whether the generator makes one structure, or patches of larger volumes.
        preset: name of a recipe that fixes grid, intensity and networks, where the architecture has some.
    """

    name: str
    fingerprint: Fingerprint
    channels: tuple[str, ...]
    labels: dict[int, str]
    budget: float
    mirror_axes: tuple[int, ...] | None
    seed: int
    init: Generator | None = None
    preset: str | None = None
    perceptual: tuple[str, ...] = ()
    extent: Literal["object", "patch"] = "object"


def plan_grid(
    fingerprint: Fingerprint,
    multiple: tuple[int, ...],
    spacing: Sequence[float] | None = None,
    extent: Literal["object", "patch"] = "object",
) -> GridPlan:
    """Median spacing, or the one given (mm); a shape that holds every label with 2 voxels around it, and of
    the image around it as much as half the labels' size again, rounded up to the networks' `multiple`. For
    patches a window of 48 voxels a side, or of the median scan's where that is less."""
    median = fingerprint.spacing_median
    spacing = [round(s, 4) for s in (spacing or median)]
    shape = []
    for axis in range(3):
        wanted = fingerprint.shape_median[axis] * (median[axis] / spacing[axis])
        if extent == "patch":
            wanted = min(wanted, PATCH)
        elif fingerprint.label_box_largest_mm is not None:
            box = fingerprint.label_box_largest_mm[axis] / spacing[axis]
            wanted = max(box + 4, min(wanted, 1.5 * box))
        shape.append(math.ceil(wanted / multiple[axis]) * multiple[axis])
    return GridPlan(
        orientation=ORIENTATION,
        spacing=(spacing[0], spacing[1], spacing[2]),
        shape=(shape[0], shape[1], shape[2]),
    )


def plan_intensity(fingerprint: Fingerprint, channels: tuple[str, ...]) -> IntensityConvention:
    """Fixed windows where every channel is CT (HU), each volume's own percentiles otherwise."""
    pairs = list(zip(fingerprint.intensity_low, fingerprint.intensity_high, strict=True))
    if channels and all(c.strip().upper() == "CT" for c in channels):
        return IntensityConvention(kind="window", windows=pairs, typical=pairs)
    return IntensityConvention(kind="percentile", typical=pairs)


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Seconds that a step takes here, the best of three."""
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def available_memory(accelerator: Accelerator) -> float:
    """Bytes of memory that a process of the training may count on."""
    if accelerator.device.type == "cuda":
        return float(torch.cuda.mem_get_info(accelerator.device)[0])
    return float(psutil.virtual_memory().available) / accelerator.num_processes


def shared_evenly(cases: int, affordable: int, processes: int) -> int:
    """A batch of about `cases`, of which each process has as many: at least one, and no more than it can
    afford."""
    return processes * max(1, min(round(cases / processes), affordable))


def too_small(request: Request, accelerator: Accelerator, **seconds: float) -> DiffaugError:
    """The error for a budget in which not a step of each stage fits."""
    steps = ", ".join(f"one of the {stage} {value:.2f} s" for stage, value in seconds.items())
    return DiffaugError(
        f"a budget of {request.budget:.0f} s is too small on {accelerator.device}: of the training steps, "
        f"{steps}; a useful fit needs thousands of each"
    )
