"""The operations on images of a TorchIO subject: for `tio.Compose`, `tio.SubjectsLoader`, `subject.history`.

    import torchio as tio
    from diffaug.transforms.torchio import RandomVariation

    transform = tio.Compose([RandomVariation("hippocampus-mr", p=0.3), tio.RandomAffine()])

TorchIO finds the transforms of a history by their class names: a process that replays what another one
recorded has to import this module first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffaug import operations
from diffaug.bank import open_bank
from diffaug.errors import DiffaugError, ExtraError, LabelError, VerbError
from diffaug.generators.card import Card
from diffaug.generators.cases import to_dtype
from diffaug.generators.generator import Generator, Unlike
from diffaug.operations import Operation, apply
from diffaug.operations.case import Case, Parameters, join_channels
from diffaug.operations.deformation import check_deformation
from diffaug.operations.guard import Leaks, ScanLike
from diffaug.operations.regions import Shape, check_region
from diffaug.operations.sources import GeneratorLike, card_of, reference
from diffaug.transforms.one_grid import Place, check_one_grid

try:
    from torchio import Image, LabelMap, ScalarImage, Subject
    from torchio.transforms import IntensityTransform, SpatialTransform, Transform
    from torchio.transforms.augmentation import RandomTransform
except ImportError as error:
    raise ExtraError("TorchIO", "torchio") from error

# Arguments that an operation's random and its deterministic transform share.
SHARED_ARGUMENTS = ("steps", "guidance", "sampler", "label", "label_mapping", "allow_label_drift", "unlike")


class _Deterministic(Transform):
    """Applies an operation's parameters to the chosen images; attributes have the arguments' names."""

    operation: ClassVar[type[Operation]]
    # The argument that only this operation has.
    own: ClassVar[str]

    def __init__(
        self,
        generator: GeneratorLike,
        seed: int,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        label: str | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        unlike: Unlike = "warn",
        weights_hash: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.generator = reference(generator)
        # A name or folder stays one: weights are loaded on first use in each process, never pickled.
        self._source = generator if isinstance(generator, Generator) else self.generator
        self.seed = int(seed)
        self.steps = steps
        self.guidance = guidance
        self.sampler = sampler
        self.label = label
        # JSON has text keys; a history gives them back.
        self.label_mapping = {str(k): int(v) for k, v in label_mapping.items()} if label_mapping else None
        self.allow_label_drift = allow_label_drift
        self.unlike: Unlike = unlike
        self.weights_hash = weights_hash
        self.args_names = ["generator", "weights_hash", self.own, "seed", *SHARED_ARGUMENTS]

    def apply_transform(self, subject: Subject) -> Subject:
        """Apply the parameters to the chosen images of the subject, in place."""
        card = card_of(self._source, self.weights_hash)
        parameters = self._parameters(card)
        images = _choose_images(self, subject, card.channels, card.name)
        label = self._choose_label(subject, card)
        self._check_others(subject, images | label)
        _check_grids(images | label)
        joined = join_channels([image.data for image in images.values()])
        label_map = next((image.data for image in label.values()), None)
        try:
            made = apply(parameters, Case(joined, label_map), next(iter(images.values())).affine)
        except ValueError as error:
            error.add_note(f"while working on {_described(images | label)}")
            raise
        _set_images(images, made.image)
        if made.label is not label_map and made.label is not None:
            next(iter(label.values())).set_data(made.label)
        return subject

    def _parameters(self, card: Card) -> Parameters:
        sampling = card.sampling(self.operation.verb, self.steps, self.guidance, self.sampler)
        # The history holds what was used, not "the card's default".
        self.weights_hash = card.weights_hash
        self.steps, self.guidance, self.sampler = sampling.steps, sampling.guidance, sampling.sampler
        names = ["generator", "weights_hash", self.own, "seed", *SHARED_ARGUMENTS]
        own = {name: getattr(self, name) for name in names if name != "label"}
        return {"verb": self.operation.verb, "strength": 1.0} | own

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

    def _check_others(self, subject: Subject, chosen: Mapping[str, Image]) -> None:
        """Refuse images that would no longer match the chosen ones; none where the anatomy stays."""


class _Random(RandomTransform):
    """Draws an operation's parameters, and applies them by its deterministic transform."""

    deterministic: ClassVar[type[_Deterministic]]

    def __init__(
        self,
        generator: GeneratorLike,
        p: float,
        own: Mapping[str, Any],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        label: str | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        unlike: Unlike = "warn",
        held_out: Sequence[ScanLike] | None = None,
        leaks: Leaks = "refuse",
        **kwargs: Any,
    ) -> None:
        super().__init__(p=p, **kwargs)
        shared: dict[str, Any] = {
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "label_mapping": None if label_mapping is None else {int(k): v for k, v in label_mapping.items()},
            "allow_label_drift": allow_label_drift,
            "unlike": unlike,
        }
        self._operation = self.deterministic.operation(
            generator, **own, **shared, held_out=held_out, leaks=leaks
        )
        self.generator = reference(generator)
        self.p = p
        self.label = label
        for name, value in shared.items():
            setattr(self, name, value)
        for name in own:
            setattr(self, name, getattr(self._operation, name))
        self.args_names = ["generator", *own, "p", *SHARED_ARGUMENTS]

    def apply_transform(self, subject: Subject) -> Subject:
        """Draw, and apply what was drawn."""
        drawn = self._operation.parameters(self._get_random_seed())
        names = (self.deterministic.own, "seed", "weights_hash", *SHARED_ARGUMENTS)
        arguments = {name: drawn[name] for name in names if name in drawn}
        arguments |= {"generator": self._operation.source, "label": self.label}
        self._add_base_args(arguments)
        return self.deterministic(**arguments)(subject)


# -- variation -----------------------------------------------------------------------------------------------


class Variation(_Deterministic, IntensityTransform):
    """Replace the image by another one of the same anatomy, with a given strength and seed.

    Args:
        generator: name in the zoo, folder that `diffaug fit` wrote, or `diffaug.Generator`.
        strength: noise level to start from, 0 (changes nothing) to 1 (only the label decides).
        seed: of the noise, at least 0. Same seed, arguments, subject and machine: same bytes.
        weights_hash: the weights that the generator must have (as a history holds them); by default any, and
            from the first application on the same.
        **kwargs: the other arguments of `RandomVariation`.

    Raises:
        CardError: when applied, for an unknown generator or one with other weights.
    """

    operation = operations.Variation
    own = "strength"

    def __init__(
        self, generator: GeneratorLike, strength: float, seed: int, steps: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(generator, seed, steps=steps, **kwargs)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in [0, 1], got {strength}")
        self.strength = float(strength)


class RandomVariation(_Random, IntensityTransform):
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
        unlike: "warn", "raise" or "ignore" where an image is unlike what the generator was trained on.
        held_out: image files of your validation and test cases, which must not have trained the generator;
            all are read once.
        leaks: "refuse" or "warn", where some did.
        allow_label_drift: also vary a subject without a label map, or a labelled one with a generator that
            knows no labels: the anatomy may move.
        **kwargs: see `torchio.Transform`. `include` and `exclude` choose the images that change: for a
            generator of C channels one image of C channels, or C images of one channel, in the order of the
            subject, which change together.

    Raises:
        CardError: for an unknown generator, or a card that is not valid.
        LeakError: held-out scans trained the generator, and leaks are refused.
        VerbError: for a generator that cannot vary, or, when applied, images that do not fit its channels.
        LabelError: when applied, for label maps that are missing, ambiguous, or hold ids that are not known.
        DiffaugError: for steps, guidance or a sampler that the generator cannot work with, or, when applied,
            for images or label maps on different grids.
    """

    deterministic = Variation

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        strength: float | tuple[float, float] | None = None,
        p: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, p, {"strength": strength}, **kwargs)


# -- inpainting ----------------------------------------------------------------------------------------------


class Inpainting(_Deterministic, IntensityTransform):
    """Make a given region anew, with a given seed.

    Args:
        region: see `diffaug.operations.regions`, such as
            `{"shape": "ellipsoid", "centre": [0.5, 0.5, 0.5], "radii": [5, 5, 5]}` or
            `{"shape": "label", "labels": [2], "margin": 2}`.
        generator, seed, weights_hash: as for `Variation`.
        **kwargs: the other arguments of `RandomInpainting`.
    """

    operation = operations.Inpainting
    own = "region"

    def __init__(self, generator: GeneratorLike, region: Mapping[str, Any], seed: int, **kwargs: Any) -> None:
        super().__init__(generator, seed, **kwargs)
        self.region = check_region(region)


class RandomInpainting(_Random, IntensityTransform):
    """Make a random region of the image anew: the rest and the label map stay as they are, to the last bit.

    Args:
        region: "ellipsoid" or "box" anywhere that the generator reaches; "label", a structure of the label
            map with a margin; "around", that margin alone.
        labels: ids of the label map that "label" and "around" choose from; default: all that the generator
            knows.
        generator, p: as for `RandomVariation`.
        **kwargs: the other arguments of `RandomVariation`; errors are the same.
    """

    deterministic = Inpainting

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        region: Shape = "ellipsoid",
        p: float = 0.3,
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, p, {"region": region, "labels": labels}, **kwargs)


# -- repaint -------------------------------------------------------------------------------------------------


class Repaint(_Deterministic, SpatialTransform):
    """Deform the label map as given, and replace the image by one painted from it.

    Args:
        deformation: `{"amplitude": largest displacement in mm, "seed": of the displacement}`.
        generator, seed, weights_hash: as for `Variation`; the seed is that of the image.
        **kwargs: the other arguments of `RandomRepaint`.
    """

    operation = operations.Repaint
    own = "deformation"

    def __init__(
        self, generator: GeneratorLike, deformation: Mapping[str, Any], seed: int, **kwargs: Any
    ) -> None:
        super().__init__(generator, seed, **kwargs)
        self.deformation = check_deformation(deformation)

    def _check_others(self, subject: Subject, chosen: Mapping[str, Image]) -> None:
        _refuse_others(self, subject, chosen)


class RandomRepaint(_Random, SpatialTransform):
    """Give the subject another anatomy: its label map deformed within bounds, and an image painted from it.

    Image and label map both change, and keep their grids, dtypes and units. Of points or other entries of
    the subject that are no images nothing is known: they stay as they are.

    Args:
        amplitude: range of the largest displacement in mm, or one number; default: 2 to 7.5 % of the shortest
            side of the generator's grid.
        generator, p: as for `RandomVariation`.
        **kwargs: the other arguments of `RandomVariation`; errors are the same.
    """

    deterministic = Repaint

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        amplitude: float | tuple[float, float] | None = None,
        p: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, p, {"amplitude": amplitude}, **kwargs)


# -- from a bank ---------------------------------------------------------------------------------------------


class FromBank(Transform):
    """Replace the image by a given variation of it from a bank.

    Args:
        bank: folder that `diffaug bank build` wrote.
        entry: which variation, from 0.
        bank_hash: the bank it must be (as a history holds it); by default any.
        label: name of the label map that changes along, where the bank holds repaints.
        **kwargs: as for `RandomFromBank`.
    """

    def __init__(
        self,
        bank: Path | str,
        entry: int,
        *,
        label: str | None = None,
        bank_hash: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._bank = open_bank(bank)
        self.bank = str(self._bank.folder)
        self.entry = int(entry)
        self.label = label
        self.bank_hash = bank_hash
        self.args_names = ["bank", "bank_hash", "entry", "label"]

    def apply_transform(self, subject: Subject) -> Subject:
        """Replace the chosen images of the subject, in place."""
        bank = self._bank
        if self.bank_hash not in (None, bank.hash):
            raise DiffaugError(
                f"{self.bank} is another bank than the one that was recorded, {self.bank_hash}: put that "
                "one there"
            )
        self.bank_hash = bank.hash
        intensities = subject.get_images(intensity_only=True, include=self.include, exclude=self.exclude)
        file = next((image.path for image in intensities if image.path), None)
        if file is None:
            raise DiffaugError(
                f"{self.bank} finds a case by the names of its files, and the images of the subject have "
                "none: load them from files"
            )
        case = bank.find(str(file))
        images = _choose_images(self, subject, [f"channel {n}" for n in range(case.shape[0])], self.bank)
        first = next(iter(images))
        places = {
            first: Place(images[first].spatial_shape, images[first].affine),
            f"{case.name} in {self.bank}": Place(case.shape[1:], np.array(case.affine)),
        }
        check_one_grid(places, "the bank's transform before all that move or resample the subject")
        bank.check(case, [image.data.numpy() for image in images.values()], str(file))
        made = bank.draw(case, self.entry)
        if made.label is not None:
            label = self._choose_label(subject)
            _refuse_others(self, subject, images | label)
            _check_grids(images | label)
            for own in label.values():
                own.set_data(to_dtype(made.label, own.data.dtype))
        _set_images(images, made.image)
        return subject

    def _choose_label(self, subject: Subject) -> dict[str, Image]:
        maps: dict[str, Image] = {
            name: image for name, image in subject.items() if isinstance(image, LabelMap)
        }
        names = [self.label] if self.label else [n for n in maps if n not in (self.exclude or ())]
        if len(names) != 1 or names[0] not in maps:
            raise LabelError(
                f"{self.bank} holds another shape for one of the label maps {list(maps)}: name it with "
                "label=..."
            )
        return {names[0]: maps[names[0]]}


class RandomFromBank(RandomTransform):
    """Replace the image by a random variation of it from a bank, at the cost of reading it.

    The bank finds a case by the name of its image file, so the images must come from the files that the bank
    was built for, on their own grid: put this transform first.

    Args:
        bank: folder that `diffaug bank build` wrote.
        p: probability that the transform is applied.
        label: name of the label map that changes along, where the bank holds repaints; by default the only
            one.
        held_out, leaks: as for `RandomVariation`; held-out scans must not fill the bank, either.
        **kwargs: see `torchio.Transform`; `include` and `exclude` as for `RandomVariation`.

    Raises:
        LeakError: held-out scans trained the generator or fill the bank, and leaks are refused.
        DiffaugError: for a folder that holds no finished bank, or, when applied, images on another grid than
            their files.
        DatasetError: when applied, for a case that the bank does not hold.
    """

    def __init__(
        self,
        bank: Path | str,
        p: float = 0.5,
        *,
        label: str | None = None,
        held_out: Sequence[ScanLike] | None = None,
        leaks: Leaks = "refuse",
        **kwargs: Any,
    ) -> None:
        super().__init__(p=p, **kwargs)
        if held_out is not None:
            open_bank(bank).check_held_out(held_out, leaks=leaks)
        # All records, so that an unfinished bank is found at once.
        self._entries = len(next(iter(open_bank(bank).cases.values())).parameters)
        self.bank = str(Path(bank).absolute())
        self.p = p
        self.label = label
        self.args_names = ["bank", "p", "label"]

    def apply_transform(self, subject: Subject) -> Subject:
        """Choose a variation, and apply a `FromBank`."""
        entry = int(torch.randint(self._entries, (1,)))
        arguments: dict[str, Any] = {"label": self.label}
        self._add_base_args(arguments)
        return FromBank(self.bank, entry, **arguments)(subject)


# -- shared --------------------------------------------------------------------------------------------------


def _described(images: Mapping[str, Image]) -> str:
    return " and ".join(f"{name} ({image.path})" if image.path else name for name, image in images.items())


def _choose_images(
    transform: Transform, subject: Subject, channels: Sequence[str], who: str
) -> dict[str, Image]:
    """The image of C channels, or the C images of one channel, that change together."""
    intensities = subject.get_images_dict(
        intensity_only=True, include=transform.include, exclude=transform.exclude
    )
    images: dict[str, Image] = dict(intensities)
    counts = [image.num_channels for image in images.values()]
    wanted = len(channels)
    if counts not in ([wanted], [1] * wanted):
        chosen = ", ".join(f"{name} ({count})" for name, count in zip(images, counts, strict=True))
        several = f", or {wanted} images of one channel," if wanted > 1 else ""
        raise VerbError(
            f"{who} works on one image of {wanted} channel(s){several} at a time "
            f"({', '.join(channels)}); chosen, with their numbers of channels: {chosen or 'none'}. "
            "Choose with include=[...] or exclude=[...] among "
            f"{[name for name, image in subject.items() if isinstance(image, ScalarImage)]}"
        )
    return images


def _refuse_others(transform: Transform, subject: Subject, chosen: Mapping[str, Image]) -> None:
    """Refuse images beside those that get another anatomy, unless they were excluded."""
    excluded = transform.exclude or ()
    others = [
        name
        for name, image in subject.items()
        if isinstance(image, Image) and name not in chosen and name not in excluded
    ]
    if others:
        raise DiffaugError(
            f"{' and '.join(chosen)} get another anatomy, and {', '.join(others)} would still show the "
            "old one: remove them from the subject, or leave them as they are with exclude=[...]"
        )


def _check_grids(images: Mapping[str, Image]) -> None:
    places = {_described({n: image}): Place(image.spatial_shape, image.affine) for n, image in images.items()}
    check_one_grid(places, f"tio.ToCanonical() and tio.Resample({next(iter(images))!r}) before")


def _set_images(images: Mapping[str, Image], made: Tensor) -> None:
    """Give each image its channels of what was made, in its own dtype."""
    parts = made.split([image.num_channels for image in images.values()])
    for image, part in zip(images.values(), parts, strict=True):
        image.set_data(to_dtype(part, image.data.dtype).clone())
