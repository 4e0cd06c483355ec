"""Variations of the images of a TorchIO subject: for `tio.Compose`, `tio.SubjectsLoader`, `subject.history`.

    import torchio as tio
    from diffaug.transforms.torchio import RandomVariation

    transform = tio.Compose([RandomVariation("hippocampus-mr", p=0.3), tio.RandomAffine()])

Label maps are never touched. TorchIO finds the transforms of a history by their class names: a process that
replays what another one recorded has to import this module first.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.errors import DiffaugError, ExtraError, LabelError, VerbError
from diffaug.generators.card import Card
from diffaug.generators.generator import Generator
from diffaug.generators.labels import Vocabulary
from diffaug.transforms.variation import (
    GeneratorLike,
    apply_parameters,
    card_of,
    make_parameters,
    reference,
    resolve,
    strength_range,
)

try:
    from torchio import Image, LabelMap, ScalarImage, Subject
    from torchio.transforms import IntensityTransform
    from torchio.transforms.augmentation import RandomTransform
except ImportError as error:
    raise ExtraError("TorchIO", "torchio") from error

# Images are on one grid if no corner voxel differs by more than this part of the smallest voxel edge.
SAME_PLACE = 0.05
# Arguments of both transforms that the random one hands to the deterministic one.
SHARED_ARGUMENTS = ("steps", "guidance", "sampler", "label", "label_mapping", "allow_label_drift")


class _VariationTransform(IntensityTransform):
    """What the random and the deterministic transform share: attributes have the arguments' names."""

    def __init__(
        self,
        generator: GeneratorLike,
        *,
        steps: int | None,
        guidance: float | None,
        sampler: str | None,
        label: str | None,
        label_mapping: Mapping[int, int] | None,
        allow_label_drift: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generator = reference(generator)
        # A name or folder stays one: weights are loaded on first use in each process, never pickled.
        self._source = generator if isinstance(generator, Generator) else self.generator
        self.steps = steps
        self.guidance = guidance
        self.sampler = sampler
        self.label = label
        # JSON has text keys; a history gives them back.
        self.label_mapping = {str(k): int(v) for k, v in label_mapping.items()} if label_mapping else None
        self.allow_label_drift = allow_label_drift


class RandomVariation(RandomTransform, _VariationTransform):
    r"""Replace the image by another one of the same anatomy, with random strength and seed.

    The new image follows the subject's label map (see `diffaug.Generator.vary`), which stays as it is. The
    image keeps its grid, units and dtype. Strength and seed come from torch's random state.

    Args:
        generator: name in the zoo, folder that `diffaug fit` wrote, or `diffaug.Generator`. Of a name or
            folder the weights are loaded once per process, and the transform pickles small. An object is
            pickled with its weights; its histories replay while it lives, or where the zoo has its name.
        strength: range $(a, b)$ of the strength $s \sim \mathcal{U}(a, b)$ within [0, 1], or one number for
            both; by default the card's range. 0 changes nothing, at 1 only the label decides.
        p: probability that the transform is applied.
        steps: sampler steps for strength 1, at least 1; lower strengths take their share (default: card's).
        guidance: weight of the label on the image, 1 is none (default: card's).
        sampler: one that the generator's architecture has (default: card's); with another one, `steps` is by
            default what is usual for it.
        label: name of the label map to follow; by default the only one (`exclude` hides others).
        label_mapping: ids of that label map to the generator's, where they differ.
        allow_label_drift: also vary a subject without a label map, or a labelled one with a generator that
            knows no labels: the anatomy may move.
        **kwargs: see `torchio.Transform`. `include` and `exclude` choose the images that change: for a
            generator of C channels one image of C channels, or C images of one channel, in the order of the
            subject, which change together.

    Raises:
        CardError: for an unknown generator, or a card that is not valid.
        VerbError: for a generator that cannot vary, or, when applied, images that do not fit its channels.
        LabelError: when applied, for label maps that are missing, ambiguous, or hold ids that are not known.
        DiffaugError: when applied, for images or label maps on different grids, or for steps, guidance or a
            sampler that the generator cannot work with.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        strength: float | tuple[float, float] | None = None,
        p: float = 0.3,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        label: str | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            generator=generator,
            p=p,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            label=label,
            label_mapping=label_mapping,
            allow_label_drift=allow_label_drift,
            **kwargs,
        )
        card = card_of(generator)
        if "vary" not in card.verbs:
            raise VerbError(f"{card.name} has no verb 'vary'; it has {', '.join(sorted(card.verbs))}")
        Vocabulary(card.labels).check_mapping(label_mapping)
        self.strength = strength_range(strength, card)
        self.p = p
        self.args_names = ["generator", "strength", "p", *SHARED_ARGUMENTS]

    def apply_transform(self, subject: Subject) -> Subject:
        """Draw strength and seed, and apply a `Variation`."""
        low, high = self.strength
        strength = low + (high - low) * torch.rand(1).item()
        seed = self._get_random_seed()
        arguments: dict[str, Any] = {name: getattr(self, name) for name in SHARED_ARGUMENTS}
        self._add_base_args(arguments)
        return Variation(self._source, strength, seed, **arguments)(subject)


class Variation(_VariationTransform):
    """Replace the image by another one of the same anatomy, with a given strength and seed.

    The arguments that are not explained here are those of `RandomVariation`.

    Args:
        strength: noise level to start from, 0 (changes nothing) to 1 (only the label decides).
        seed: of the noise, at least 0. Same seed, arguments, subject and machine: same bytes.
        weights_hash: the weights that the generator must have (as a history holds them); by default any, and
            from the first application on the same.

    Raises:
        CardError: when applied, for an unknown generator or one with other weights.
    """

    def __init__(
        self,
        generator: GeneratorLike,
        strength: float,
        seed: int,
        steps: int | None = None,
        *,
        guidance: float | None = None,
        sampler: str | None = None,
        label: str | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        weights_hash: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            generator,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
            label=label,
            label_mapping=label_mapping,
            allow_label_drift=allow_label_drift,
            **kwargs,
        )
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.strength = float(strength)
        self.seed = int(seed)
        self.weights_hash = weights_hash
        self.args_names = ["generator", "weights_hash", "strength", "seed", *SHARED_ARGUMENTS]

    def apply_transform(self, subject: Subject) -> Subject:
        """Vary the chosen images of the subject, in place."""
        parameters = make_parameters(
            self._source,
            strength=self.strength,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            weights_hash=self.weights_hash,
        )
        # The history holds what was used, not "the card's default".
        for name in ("weights_hash", "steps", "guidance", "sampler"):
            setattr(self, name, parameters[name])
        card = resolve(self._source, self.weights_hash).card
        images = self._choose_images(subject, card)
        label = self._choose_label(subject, card)
        _check_grids(images | label)
        tensors = [image.data for image in images.values()]
        if len({tensor.dtype for tensor in tensors}) > 1:
            # float64 holds the voxels of the other dtypes exactly.
            tensors = [tensor.double() for tensor in tensors]
        try:
            varied = apply_parameters(
                parameters,
                torch.cat(tensors),
                next((image.data for image in label.values()), None),
                next(iter(images.values())).affine,
                label_mapping={int(k): v for k, v in (self.label_mapping or {}).items()},
                allow_label_drift=self.allow_label_drift,
            )
        except ValueError as error:
            error.add_note(f"while varying {_described(images | label)}")
            raise
        parts = varied.split([len(tensor) for tensor in tensors])
        for image, part in zip(images.values(), parts, strict=True):
            image.set_data(_to_dtype(part, image.data.dtype).clone())
        return subject

    def _choose_images(self, subject: Subject, card: Card) -> dict[str, Image]:
        """The image of C channels, or the C images of one channel, that change together."""
        images: dict[str, Image] = dict(self.get_images_dict(subject))
        counts = [image.num_channels for image in images.values()]
        wanted = len(card.channels)
        if counts not in ([wanted], [1] * wanted):
            chosen = ", ".join(f"{name} ({count})" for name, count in zip(images, counts, strict=True))
            several = f", or {wanted} images of one channel," if wanted > 1 else ""
            raise VerbError(
                f"{card.name} varies one image of {wanted} channel(s){several} at a time "
                f"({', '.join(card.channels)}); chosen, with their numbers of channels: {chosen or 'none'}. "
                "Choose with include=[...] or exclude=[...] among "
                f"{[name for name, image in subject.items() if isinstance(image, ScalarImage)]}"
            )
        return images

    def _choose_label(self, subject: Subject, card: Card) -> dict[str, Image]:
        """The label map to follow, by its name; empty where there is none and the label may drift."""
        maps = {name: image for name, image in subject.items() if isinstance(image, LabelMap)}
        if not card.labels:
            if maps and not self.allow_label_drift:
                raise LabelError(
                    f"{card.name} knows no labels and cannot keep {', '.join(maps)} true: remove them from "
                    "the subject, or pass allow_label_drift=True if the anatomy may move"
                )
            return {}
        if self.label is not None:
            if self.label not in maps:
                raise LabelError(f"the subject has no label map {self.label!r}; it has {list(maps)}")
            return {self.label: maps[self.label]}
        candidates: dict[str, Image] = {k: v for k, v in maps.items() if k not in (self.exclude or ())}
        if len(candidates) > 1:
            raise LabelError(
                f"the subject has several label maps, {list(candidates)}: name the one that shows the labels "
                f"of {card.name} ({', '.join(card.labels.values())}) with label=..."
            )
        if not candidates and not self.allow_label_drift:
            raise LabelError(
                f"{card.name} keeps a label true only if it is given, and the subject has no label map to "
                f"follow (of {list(maps)}, excluded are {list(self.exclude or ())}): add a tio.LabelMap, "
                "or pass allow_label_drift=True if the anatomy may move"
            )
        return candidates


def _check_grids(images: Mapping[str, Image]) -> None:
    """Raise DiffaugError unless all images have one shape and lie in one place."""
    (first_name, first), *others = images.items()
    corners = np.array(np.meshgrid(*([0, size - 1] for size in first.spatial_shape))).reshape(3, -1)
    for name, other in others:
        moved = (first.affine - other.affine) @ np.vstack([corners, np.ones((1, corners.shape[1]))])
        apart = float(np.abs(moved).max()) / min(first.spacing)
        if other.spatial_shape != first.spatial_shape or apart > SAME_PLACE:
            raise DiffaugError(
                f"{_described({first_name: first, name: other})} are not on one grid: "
                f"shapes {first.spatial_shape} and {other.spatial_shape}, "
                f"affines {first.affine.tolist()} and {other.affine.tolist()}. "
                f"Bring them onto one with tio.ToCanonical() and tio.Resample({first_name!r}) before"
            )


def _described(images: Mapping[str, Image]) -> str:
    return " and ".join(f"{name} ({image.path})" if image.path else name for name, image in images.items())


def _to_dtype(volume: Tensor, dtype: torch.dtype) -> Tensor:
    """The volume in `dtype`, rounded and clipped where that holds integers."""
    if volume.dtype == dtype or dtype.is_floating_point:
        return volume.to(dtype)
    limits = torch.iinfo(dtype)
    return volume.round().clamp(limits.min, limits.max).to(dtype)
