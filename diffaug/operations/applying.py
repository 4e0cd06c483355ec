"""Applying parameters of an operation, as `Operation.parameters` draws them, to cases."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from diffaug.errors import LabelError, VerbError
from diffaug.generators.generator import Generator
from diffaug.operations.case import Case
from diffaug.operations.deformation import deform
from diffaug.operations.regions import region_mask
from diffaug.operations.sources import resolve

_IMPORTED_IN = os.getpid()


def apply(parameters: Mapping[str, Any], case: Case, affine: ArrayLike) -> Case:
    """Apply recorded parameters to a case; also in worker processes, forked ones included.

    A case whose label map shows no structure, as a crop beside it, comes back as it is, with a warning.

    Args:
        parameters: see the module.
        case: image and label map.
        affine: `(4, 4)`, voxel to world, mm, RAS+.

    Raises:
        CardError, LabelError, VerbError, DiffaugError: see `resolve` and the generator's verbs.
    """
    generator = resolve(parameters["generator"], parameters["weights_hash"])
    if get_worker_info() is not None and generator.device.type != "cpu":
        raise VerbError(
            f"{generator.name} is on {generator.device}, which worker processes cannot use: give the "
            "transform the generator's name or folder, or load the data with num_workers=0"
        )
    if os.getpid() != _IMPORTED_IN:
        # A fork copies the parent's record of its thread pool but no threads: to wait for them is a deadlock.
        torch.set_num_threads(1)
    return apply_to_cases(generator, [parameters], [case], affine)[0]


def apply_to_cases(
    generator: Generator, parameters: Sequence[Mapping[str, Any]], cases: Sequence[Case], affine: ArrayLike
) -> list[Case]:
    """`apply` to cases of one shape at once, which a GPU does faster than one by one.

    Args:
        generator: that the parameters name.
        parameters: of each case; they may differ in seed, region and deformation alone.
        affine: `(4, 4)` or one for each case, `(B, 4, 4)`.
    """
    mapping = {int(k): int(v) for k, v in (parameters[0]["label_mapping"] or {}).items()}
    affines = np.broadcast_to(np.asarray(affine, dtype=np.float64), (len(cases), 4, 4))
    shown = [
        n
        for n, (_, label) in enumerate(cases)
        if label is None or not generator.knows_labels or _shows_structure(label, mapping)
    ]
    if len(shown) < len(cases):
        warnings.warn("a label map shows no structure: its case was left as it is", stacklevel=3)
    out = [Case(image.clone(), None if label is None else label.clone()) for image, label in cases]
    if not shown:
        return out
    made = [cases[n] for n in shown]
    if "deformation" in parameters[0]:
        made = [
            _deform(parameters[n]["deformation"], cases[n], generator, affines[n], mapping) for n in shown
        ]
    image = torch.stack([case.image for case in made])
    labels = [case.label for case in made if case.label is not None]
    label = torch.stack(labels) if labels else None
    how = {
        "seed": [parameters[n]["seed"] for n in shown],
        "label_mapping": mapping,
        **{name: parameters[0][name] for name in ("steps", "guidance", "sampler", "allow_label_drift")},
        "unlike": parameters[0].get("unlike", "warn"),
    }
    if parameters[0]["verb"] == "vary":
        strength = parameters[0]["strength"]
        image = generator.vary(image, label, affines[shown], strength=strength, **how)
    else:
        masks = [_mask(parameters[n]["region"], cases[n], generator, affines[n], mapping) for n in shown]
        image = generator.inpaint(image, torch.stack(masks), label, affines[shown], residual=True, **how)
    for row, (n, case) in enumerate(zip(shown, made, strict=True)):
        out[n] = Case(image[row], case.label)
    return out


def _mask(
    region: Mapping[str, Any],
    case: Case,
    generator: Generator,
    affine: NDArray[np.float64],
    mapping: Mapping[int, int],
) -> Tensor:
    """The voxels `(1, I, J, K)` of a case that are made anew."""
    placement = generator.placement(case.image.shape[1:], affine, case.label, label_mapping=mapping)
    mask = region_mask(region, placement, case.label, nib.affines.voxel_sizes(affine))
    return mask.to(case.image.device)


def _deform(
    deformation: Mapping[str, Any],
    case: Case,
    generator: Generator,
    affine: NDArray[np.float64],
    mapping: Mapping[int, int],
) -> Case:
    """The case in another shape, within the bounds of the generator's card."""
    image, label = case
    if label is None:
        raise LabelError(f"{generator.name} deforms a label map: give one")
    bounds = generator.card.label_volumes
    numbers = {value: mapping.get(value, value) for value in (int(v) for v in torch.unique(label))}
    deformed = deform(
        image.cpu(),
        label.cpu(),
        generator.placement(label.shape[1:], affine, label, label_mapping=mapping),
        nib.affines.voxel_sizes(affine),
        amplitude=deformation["amplitude"],
        seed=deformation["seed"],
        volumes={value: bounds[number] for value, number in numbers.items() if number in bounds},
    )
    if deformed.share == 0 and deformation["amplitude"] > 0:
        warnings.warn("no share of a deformation was within bounds: its case keeps its shape", stacklevel=3)
    return Case(deformed.image.to(image.device), deformed.label.to(label.device))


def _shows_structure(label: Tensor, mapping: Mapping[int, int]) -> bool:
    """Whether any label but the background is left after the mapping."""
    return any(mapping.get(int(value), int(value)) != 0 for value in torch.unique(label))
