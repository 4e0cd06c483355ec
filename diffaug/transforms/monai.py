"""The operations as MONAI transforms, for arrays and for dictionaries of `MetaTensor`s.

    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
    from diffaug.transforms.monai import RandVariationd

    transform = Compose([
        LoadImaged(["image", "label"]),
        EnsureChannelFirstd(["image", "label"]),
        RandVariationd("image", label_key="label", generator="hippocampus-mr", prob=0.3),
    ])

Images are `(C, I, J, K)` tensors that know their affine; what comes back has the same type, dtype, shape and
affine. What was applied is in `applied_operations`, its parameters as JSON text; `inverse` takes the entry
off again and leaves the voxels, as no image can be varied back.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diffaug import operations
from diffaug.bank import open_bank
from diffaug.errors import DiffaugError, ExtraError, LabelError, VerbError
from diffaug.generators.cases import to_dtype
from diffaug.operations import Operation, apply
from diffaug.operations.case import Case, Parameters, join_channels
from diffaug.operations.guard import Leaks, ScanLike
from diffaug.operations.regions import Shape
from diffaug.operations.sources import GeneratorLike, card_of
from diffaug.transforms.one_grid import Place, check_one_grid

try:
    from monai.config import KeysCollection
    from monai.data import MetaTensor, get_track_meta
    from monai.transforms import InvertibleTransform, MapTransform, RandomizableTransform
    from monai.utils import convert_to_tensor
except ImportError as error:
    raise ExtraError("MONAI", "monai") from error

PARAMETERS = "parameters"


# -- arrays --------------------------------------------------------------------------------------------------


class Replay(InvertibleTransform):
    """Apply given parameters, such as those that `recorded` finds in an image.

    Args:
        parameters: see `diffaug.operations`.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = dict(parameters)

    def __call__(self, img: Tensor, label: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """See `RandVariation` and `RandRepaint`."""
        made = _apply(self, self.parameters, {"img": img}, label)
        return (made["img"], made["label"]) if "label" in made else made["img"]

    def inverse(self, data: Tensor) -> Tensor:
        """The image as it is, without the record."""
        self.pop_transform(data)
        return data


class _Drawing(RandomizableTransform):
    """Draws an operation's parameters from `self.R`, MONAI's random state."""

    def __init__(self, operation: Operation, prob: float) -> None:
        RandomizableTransform.__init__(self, prob)
        self.operation = operation
        self.parameters: Parameters = {}

    def randomize(self, data: Any = None) -> None:
        """Decide whether to apply the operation, and draw its parameters."""
        super().randomize(None)
        if self._do_transform:
            self.parameters = self.operation.parameters(int(self.R.randint(2**31, dtype=np.int64)))


class _Rand(_Drawing, InvertibleTransform):
    """A random operation on an image."""

    def __call__(
        self, img: Tensor, label: Tensor | None = None, randomize: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the operation with probability `prob`.

        Args:
            img: `(C, I, J, K)` with an affine (a `MetaTensor`).
            label: `(1, I, J, K)`, integers, on the same grid.
            randomize: False applies what was drawn last.
        """
        if randomize:
            self.randomize()
        if self._do_transform:
            made = _apply(self, self.parameters, {"img": img}, label)
        else:
            changing = {"img": img} | ({"label": label} if self.operation.moves_label else {})
            made = {name: _leave(self, value) for name, value in changing.items()}
        return (made["img"], made["label"]) if "label" in made else made["img"]

    def inverse(self, data: Tensor) -> Tensor:
        """The image as it is, without the record."""
        self.pop_transform(data)
        return data


class RandVariation(_Rand):
    """Another image of the same anatomy.

    Args:
        generator: bundled name, folder, or `diffaug.Generator`.
        prob: probability that it is applied.
        strength: range within [0, 1], or one number; default: the card's range. 0 changes nothing, at 1 only
            the label decides.
        **kwargs: `steps`, `guidance`, `sampler`, `label_mapping`, `allow_label_drift`, `held_out`, `leaks`,
            see `diffaug.operations.Operation`.

    Raises:
        CardError, VerbError, LabelError, DiffaugError: see `Operation`; when applied, also for images without
            an affine, on several grids, or of other channels than the generator's.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        prob: float = 0.3,
        strength: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(operations.Variation(generator, strength, **kwargs), prob)


class RandInpainting(_Rand):
    """The image with a random region made anew.

    Args:
        region: "ellipsoid" or "box" anywhere, "label" (a structure and a margin), or "around" (that margin).
        labels: ids that "label" and "around" choose from; default: all.
        generator, prob, **kwargs: as for `RandVariation`, and its errors.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        prob: float = 0.3,
        region: Shape = "ellipsoid",
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(operations.Inpainting(generator, region, labels, **kwargs), prob)


class RandRepaint(_Rand):
    """Image and label map deformed within bounds and painted anew; returns both.

    Args:
        amplitude: range of the largest displacement in mm, or one number; default: 2 to 7.5 % of the shortest
            side of the generator's grid.
        generator, prob, **kwargs: as for `RandVariation`, and its errors.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        prob: float = 0.3,
        amplitude: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(operations.Repaint(generator, amplitude, **kwargs), prob)


# -- dictionaries --------------------------------------------------------------------------------------------


class Replayd(MapTransform, InvertibleTransform):
    """Apply given parameters to the images of a dictionary, which change together.

    Args:
        keys: of one image of the generator's C channels, or of C images of one channel each.
        parameters: see `diffaug.operations`.
        label_key: of the label map that they follow.
    """

    def __init__(
        self, keys: KeysCollection, parameters: Parameters, label_key: Hashable | None = "label"
    ) -> None:
        MapTransform.__init__(self, keys)
        self.label_key = label_key
        self.parameters = dict(parameters)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A dictionary with the changed images, and the label map where that changes, too."""
        return _apply_to(self, self.parameters, data, self.keys, self.label_key)

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary as it is, without the records."""
        return _forget(self, data, _changing("deformation" in self.parameters, self.keys, self.label_key))


class _Randd(_Drawing, MapTransform, InvertibleTransform):
    """A random operation on the images of a dictionary, which change together."""

    def __init__(self, keys: KeysCollection, label_key: Hashable | None, transform: _Rand) -> None:
        MapTransform.__init__(self, keys)
        _Drawing.__init__(self, transform.operation, transform.prob)
        self.label_key = label_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply the operation with probability `prob`."""
        self.randomize()
        if self._do_transform:
            return _apply_to(self, self.parameters, data, self.keys, self.label_key)
        left = dict(data)
        _check_keys(data, self.keys, self.label_key)
        for key in _changing(self.operation.moves_label, self.keys, self.label_key):
            left[key] = _leave(self, left[key])
        return left

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary as it is, without the records."""
        return _forget(self, data, _changing(self.operation.moves_label, self.keys, self.label_key))


class RandVariationd(_Randd):
    """Dictionary form of `RandVariation`.

    Args:
        keys: of one image of the generator's C channels, or of C images of one channel each, which change
            together.
        label_key: of the label map that the images follow; None with `allow_label_drift`.
        generator, prob, strength, **kwargs: as for `RandVariation`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: Hashable | None = "label",
        generator: GeneratorLike = "hippocampus-mr",
        prob: float = 0.3,
        strength: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(keys, label_key, RandVariation(generator, prob, strength, **kwargs))


class RandInpaintingd(_Randd):
    """Dictionary form of `RandInpainting`; `keys` and `label_key` as for `RandVariationd`."""

    def __init__(
        self,
        keys: KeysCollection,
        label_key: Hashable | None = "label",
        generator: GeneratorLike = "hippocampus-mr",
        prob: float = 0.3,
        region: Shape = "ellipsoid",
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(keys, label_key, RandInpainting(generator, prob, region, labels, **kwargs))


class RandRepaintd(_Randd):
    """Dictionary form of `RandRepaint`; `keys` and `label_key` as for `RandVariationd`. Other entries stay as
    they are, also where they show the old anatomy."""

    def __init__(
        self,
        keys: KeysCollection,
        label_key: Hashable = "label",
        generator: GeneratorLike = "hippocampus-mr",
        prob: float = 0.3,
        amplitude: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(keys, label_key, RandRepaint(generator, prob, amplitude, **kwargs))


# -- from a bank ---------------------------------------------------------------------------------------------


class RandFromBankd(RandomizableTransform, MapTransform, InvertibleTransform):
    """Replace an image by a random variation of it from a bank, at the cost of reading it.

    The bank finds a case by the name of its image file (`meta["filename_or_obj"]`), so the images must come
    from the files that the bank was built for, on their own grid: put this transform right after loading.

    Args:
        keys: of the image, or of the images of one channel each that the bank holds together.
        bank: folder that `diffaug bank build` wrote.
        label_key: of the label map that changes along, where the bank holds repaints.
        prob: probability that it is applied.
        held_out: image files of your validation and test cases, which must neither have trained the bank's
            generator nor fill the bank; all are read once.
        leaks: "refuse" or "warn", where some do.

    Raises:
        LeakError: some do, and leaks are refused.
        DiffaugError: for a folder that holds no finished bank, or, when applied, images on another grid than
            their files.
        DatasetError: when applied, for a case that the bank does not hold.
    """

    def __init__(
        self,
        keys: KeysCollection,
        bank: Path | str,
        label_key: Hashable | None = "label",
        prob: float = 0.5,
        *,
        held_out: Sequence[ScanLike] | None = None,
        leaks: Leaks = "refuse",
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if held_out is not None:
            open_bank(bank).check_held_out(held_out, leaks=leaks)
        self.bank = str(Path(bank).absolute())
        self.label_key = label_key
        # All records, so that an unfinished bank is found at once.
        self._entries = len(next(iter(open_bank(bank).cases.values())).parameters)
        if open_bank(bank).moves_label and label_key is None:
            raise LabelError(
                f"{self.bank} holds other shapes of the structures: name the label map (label_key)"
            )
        self._changing = _changing(open_bank(bank).moves_label, self.keys, label_key)
        self.entry = 0

    def randomize(self, data: Any = None) -> None:
        """Decide whether to draw, and which variation."""
        super().randomize(None)
        if self._do_transform:
            self.entry = int(self.R.randint(self._entries))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Draw with probability `prob`."""
        self.randomize()
        out = dict(data)
        if not self._do_transform:
            return out | {key: _leave(self, out[key]) for key in self._changing}
        bank = open_bank(self.bank)
        images = {str(key): data[key] for key in self.keys}
        places = {name: _place(name, image) for name, image in images.items()}
        file = next(iter(images.values())).meta.get("filename_or_obj")
        if not file:
            raise DiffaugError(f"{self.bank} finds a case by the name of its file: load it with LoadImaged")
        case = bank.find(str(file))
        there = Place(case.shape[1:], np.array(case.affine))
        advice = "RandFromBankd before all that move or resample the images"
        check_one_grid(places | {f"{case.name} in {self.bank}": there}, advice)
        counts = [len(image) for image in images.values()]
        if sum(counts) != case.shape[0]:
            raise VerbError(
                f"{self.bank} holds {case.shape[0]} channels of {case.name}, {list(images)} are {sum(counts)}"
            )
        bank.check(case, [image.as_tensor().cpu().numpy() for image in images.values()], str(file))
        if bank.moves_label:
            label_place = {str(self.label_key): _place(str(self.label_key), data[self.label_key])}
            check_one_grid(places | label_place, "ResampleToMatchd before")
        made = bank.draw(case, self.entry)
        new = dict(zip(self.keys, made.image.split(counts), strict=True))
        if made.label is not None and self.label_key is not None:
            new[self.label_key] = made.label
        record = {"bank": bank.hash, "case": case.name, "entry": self.entry}
        for key, tensor in new.items():
            out[key] = _traced(self, data[key], to_dtype(tensor, data[key].dtype), record)
        return out

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The dictionary as it is, without the records."""
        return _forget(self, data, self._changing)


# -- shared --------------------------------------------------------------------------------------------------


def recorded(image: MetaTensor) -> list[Parameters]:
    """The parameters of diffaug's operations that were applied to an image, in their order; what was drawn
    from a bank is recorded by its case and entry instead."""
    infos = (entry.get("extra_info") or {} for entry in image.applied_operations)
    return [json.loads(info[PARAMETERS]) for info in infos if PARAMETERS in info]


def _changing(moves_label: bool, keys: Sequence[Hashable], label_key: Hashable | None) -> list[Hashable]:
    """Keys of what an operation changes."""
    return [*keys, label_key] if moves_label and label_key is not None else list(keys)


def _leave(transform: InvertibleTransform, image: Any) -> Tensor:
    """An image to which the operation was not applied."""
    return transform.push_transform(convert_to_tensor(image, track_meta=get_track_meta()))


def _forget(
    transform: InvertibleTransform, data: Mapping[Hashable, Any], keys: Sequence[Hashable]
) -> dict[Hashable, Any]:
    for key in keys:
        transform.pop_transform(data[key])
    return dict(data)


def _check_keys(data: Mapping[Hashable, Any], keys: Sequence[Hashable], label_key: Hashable | None) -> None:
    for key in (*keys, label_key):
        if key is not None and key not in data:
            raise DiffaugError(f"there is no {key!r} in the data, which holds {sorted(map(str, data))}")


def _apply_to(
    transform: InvertibleTransform,
    parameters: Parameters,
    data: Mapping[Hashable, Any],
    keys: Sequence[Hashable],
    label_key: Hashable | None,
) -> dict[Hashable, Any]:
    _check_keys(data, keys, label_key)
    label = None if label_key is None else data[label_key]
    made = _apply(transform, parameters, {str(key): data[key] for key in keys}, label, str(label_key))
    out = dict(data)
    for key in _changing("deformation" in parameters, keys, label_key):
        out[key] = made[str(key)]
    return out


def _apply(
    transform: InvertibleTransform,
    parameters: Parameters,
    images: Mapping[str, Any],
    label: Any,
    label_name: str = "label",
) -> dict[str, Tensor]:
    """The changed images and the label map by their names, with a record of the parameters."""
    card = card_of(parameters["generator"], parameters["weights_hash"])
    if label is not None and not card.labels and not parameters["allow_label_drift"]:
        raise LabelError(
            f"{card.name} knows no labels and cannot keep {label_name} true: leave it out, or pass "
            "allow_label_drift=True if the anatomy may move"
        )
    if label is None and card.labels and not parameters["allow_label_drift"]:
        raise LabelError(
            f"{card.name} keeps a label true only if it is given: pass the label map (label_key), or "
            "allow_label_drift=True if the anatomy may move"
        )
    given = dict(images) | ({} if label is None else {label_name: label})
    check_one_grid({name: _place(name, value) for name, value in given.items()}, "ResampleToMatchd before")
    counts = [len(image) for image in images.values()]
    wanted = len(card.channels)
    if counts not in ([wanted], [1] * wanted):
        raise VerbError(
            f"{card.name} works on one image of {wanted} channel(s) ({', '.join(card.channels)}), or on as "
            f"many images of one channel; given, with their numbers of channels: "
            f"{', '.join(f'{n} ({c})' for n, c in zip(images, counts, strict=True))}"
        )
    joined = join_channels([image.as_tensor() for image in images.values()])
    label_map = None if label is None or not card.labels else label.as_tensor()
    affine = next(iter(images.values())).affine.cpu()
    made = apply(parameters, Case(joined, label_map), affine)
    parts = made.image.split(counts)
    changed = {
        name: to_dtype(part, image.dtype).clone()
        for (name, image), part in zip(images.items(), parts, strict=True)
    }
    if made.label is not None and "deformation" in parameters:
        changed[label_name] = made.label
    record = {PARAMETERS: json.dumps(parameters)}
    return {name: _traced(transform, given[name], tensor, record) for name, tensor in changed.items()}


def _traced(
    transform: InvertibleTransform, old: MetaTensor, new: Tensor, record: Mapping[str, Any]
) -> MetaTensor:
    """New voxels in the place of old ones, with a record of where they come from."""
    made = MetaTensor(new, meta=old.meta, applied_operations=list(old.applied_operations))
    return transform.push_transform(made, extra_info=dict(record))


def _place(name: str, image: Any) -> Place:
    if not isinstance(image, MetaTensor):
        raise DiffaugError(
            f"{name} is a {type(image).__name__}, which says nothing of its spacing and orientation: load it "
            "with LoadImaged, or make it a monai.data.MetaTensor(x, affine=...) (mm, RAS+)"
        )
    if image.ndim != 4:
        raise DiffaugError(
            f"{name} must have shape (C, I, J, K), got {tuple(image.shape)}: add EnsureChannelFirstd before"
        )
    return Place(image.shape[1:], np.asarray(image.affine.cpu(), dtype=np.float64))
