"""What every variation transform shares, whatever the framework: parameters as plain JSON, and applying them.

The parameters of an applied variation are

    {"generator": name or folder, "weights_hash": SHA-256, "verb": "vary", "strength": 0 to 1,
     "sampler": name (the card's where it is not given), "steps": >= 1, "guidance": >= 0, "seed": >= 0}

and together with the case they decide the result. A plug-in draws strength and seed from its framework's
random state, calls `make_parameters`, keeps what that returns, and calls `apply_parameters` with tensors.
"""

import os
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import get_worker_info

from diffaug.errors import CardError, VerbError
from diffaug.generators.card import Card, read_card
from diffaug.generators.generator import Generator
from diffaug.zoo import folder_of, load, names

GeneratorLike = Generator | str | Path

_IMPORTED_IN = os.getpid()
# Generator objects that were given to a transform, by name and weight hash: parameters find them again.
_given: WeakValueDictionary[tuple[str, str], Generator] = WeakValueDictionary()


def reference(generator: GeneratorLike) -> str:
    """How parameters name a generator: a bundled name, an absolute folder, or the name of a Generator object.

    An object is remembered while it lives, so that parameters with its name and weight hash find it.
    """
    if isinstance(generator, Generator):
        _given[generator.name, generator.weights_hash] = generator
        return generator.name
    name = str(generator)
    return str(Path(name).absolute()) if name not in names() and Path(name).is_dir() else name


def card_of(generator: GeneratorLike) -> Card:
    """The card of a generator, read without its weights.

    Raises:
        CardError: for an unknown name, or a card that is missing or not valid.
    """
    if isinstance(generator, Generator):
        return generator.card
    return read_card(folder_of(generator) / "card.json")


def resolve(generator: GeneratorLike, weights_hash: str | None = None) -> Generator:
    """The generator that a name, a folder or recorded parameters mean; loaded once per process, on the CPU.

    Args:
        generator: a bundled name, a folder, or a Generator object.
        weights_hash: if given, the weights it must have.

    Raises:
        CardError: where it cannot be found or loaded, or has other weights.
    """
    if isinstance(generator, Generator):
        found = generator
    else:
        given = None if weights_hash is None else _given.get((str(generator), weights_hash))
        found = _load(reference(generator)) if given is None else given
    if weights_hash not in (None, found.weights_hash):
        raise CardError(
            f"the parameters were recorded with the weights {weights_hash} of {generator}, which now has "
            f"{found.weights_hash}: use the generator that they were recorded with"
        )
    return found


@cache
def _load(name_or_folder: str) -> Generator:
    return load(name_or_folder)


def strength_range(strength: float | tuple[float, float] | None, card: Card) -> tuple[float, float]:
    """Lowest and highest strength from a pair, from one number for both, or from None for the card's range.

    Raises:
        ValueError: unless 0 <= low <= high <= 1.
    """
    if strength is None:
        strength = card.defaults.strength_range
    bounds = (strength, strength) if isinstance(strength, int | float) else strength
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"strength must be a number or a pair (low, high) within [0, 1], got {strength!r}")
    return low, high


def make_parameters(
    generator: GeneratorLike,
    *,
    strength: float,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    weights_hash: str | None = None,
) -> dict[str, Any]:
    """The parameters of one variation, with the card's defaults for what is None.

    Raises:
        CardError, DiffaugError: see `resolve` and `Card.sampling`.
    """
    loaded = resolve(generator, weights_hash)
    sampling = loaded.card.sampling("vary", steps, guidance, sampler)
    return {
        "generator": reference(generator),
        "weights_hash": loaded.weights_hash,
        "verb": "vary",
        "strength": float(strength),
        "sampler": sampling.sampler,
        "steps": int(sampling.steps),
        "guidance": float(sampling.guidance),
        "seed": int(seed),
    }


def apply_parameters(
    parameters: Mapping[str, Any],
    image: Tensor,
    label: Tensor | None,
    affine: ArrayLike,
    *,
    label_mapping: Mapping[int, int] | None = None,
    allow_label_drift: bool = False,
) -> Tensor:
    """Apply the parameters of a variation to a case; also in worker processes, forked ones included.

    Args:
        parameters: see the module.
        image: `(C, I, J, K)`, any numeric dtype, unit, orientation and spacing.
        label: `(1, I, J, K)`, integers, or None.
        affine: `(4, 4)`, voxel to world, mm, RAS+.
        label_mapping: ids of the label map to the generator's.
        allow_label_drift: vary without a label; the anatomy may move.

    Returns:
        The varied image, shape and dtype as given; the image itself, with a warning, where the label map
            shows no structure to make another image of, as in a crop beside it.

    Raises:
        CardError, LabelError, VerbError, ValueError: see `resolve` and `Generator.vary`.
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
    if label is not None and generator.knows_labels and not _shows_structure(label, label_mapping):
        warnings.warn("a label map shows no structure: its image was left as it is", stacklevel=2)
        return image.clone()
    return generator.vary(
        image[None],
        None if label is None else label[None],
        affine,
        strength=parameters["strength"],
        seed=[parameters["seed"]],
        steps=parameters["steps"],
        guidance=parameters["guidance"],
        sampler=parameters.get("sampler"),
        label_mapping=label_mapping,
        allow_label_drift=allow_label_drift,
    )[0]


def _shows_structure(label: Tensor, label_mapping: Mapping[int, int] | None) -> bool:
    """Whether any label but the background is left after the mapping."""
    mapping = label_mapping or {}
    return any(mapping.get(int(value), int(value)) != 0 for value in torch.unique(label))
