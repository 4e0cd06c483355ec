"""The random operations, and the parameters that they draw, as plain JSON.

| operation | verb | what comes back |
|---|---|---|
| `Variation` | `vary` | another image of the same anatomy |
| `Inpainting` | `inpaint` | the image with a region made anew |
| `Repaint` | `vary` | both deformed, and all but the finest grain painted anew from the label map |

A plug-in draws a seed from its framework's random state, asks the operation for `parameters(seed)`, keeps
what that returns, and calls `apply` with tensors. Parameters and case together decide the result:

    {"verb": "vary", "generator": name or folder, "weights_hash": SHA-256, "seed": >= 0,
     "strength", "region", "deformation": where the operation has them,
     "sampler": name, "steps": >= 1, "guidance": >= 0,
     "label_mapping": {id in the label map: id of the generator} or null, "allow_label_drift": bool}
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from diffaug.errors import CardError, LabelError, VerbError
from diffaug.generators.card import Card
from diffaug.generators.generator import Generator, Unlike
from diffaug.generators.labels import Vocabulary
from diffaug.generators.verbs import Verb
from diffaug.operations.case import Parameters
from diffaug.operations.guard import Leaks, ScanLike, check_held_out
from diffaug.operations.regions import Shape, draw_region
from diffaug.operations.sources import GeneratorLike, card_of, reference

# Largest displacement of a Repaint, as shares of the grid's shortest side: of hippocampi at 2 mm (0.05) a
# segmenter kept 0.991 of its Dice, at 4 mm 0.981.
AMPLITUDE = (0.02, 0.075)


class Operation(ABC):
    """A random operation: which generator, how it samples, and the ranges that parameters are drawn from.

    Args:
        generator: bundled name, folder, or `diffaug.Generator`. Of a name or folder the weights are loaded
            once per process, on first use, and the operation pickles small.
        steps, guidance, sampler: how to sample (default: the card's; with another sampler than the card's,
            `steps` is what is usual for it).
        label_mapping: ids of the label map to the generator's, where they differ.
        allow_label_drift: also without a label map, or with a generator that knows no labels: the anatomy may
            move.
        unlike: "warn", "raise" or "ignore" where an image is unlike what the generator was trained on.
        held_out: image files of your validation and test cases, which must not have trained the generator;
            all are read, see `diffaug.operations.check_held_out`.
        leaks: "refuse" or "warn", where some did.

    Raises:
        LeakError: held-out scans trained the generator, and leaks are refused.
        CardError: for an unknown generator, or a card that is not valid.
        VerbError: for a generator that lacks the verb.
        LabelError: for a mapping to labels that the generator does not know.
        DiffaugError: for steps, guidance or a sampler that it cannot work with.
    """

    verb: ClassVar[Verb]
    # Names of the arguments that only this operation has.
    own: ClassVar[tuple[str, ...]]
    # Whether the label map changes, too.
    moves_label: ClassVar[bool] = False

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        label_mapping: Mapping[int, int] | None = None,
        allow_label_drift: bool = False,
        unlike: Unlike = "warn",
        held_out: Sequence[ScanLike] | None = None,
        leaks: Leaks = "refuse",
    ) -> None:
        self.card: Card = card_of(generator)
        if self.verb not in self.card.verbs:
            raise VerbError(
                f"{self.card.name} has no verb {self.verb!r}; it has {', '.join(sorted(self.card.verbs))}"
            )
        Vocabulary(self.card.labels).check_mapping(label_mapping)
        self.sampling = self.card.sampling(self.verb, steps, guidance, sampler)
        self.generator = reference(generator)
        # An object given as such lives as long as the operation does.
        self._given = generator if isinstance(generator, Generator) else None
        self.label_mapping = dict(label_mapping) if label_mapping else None
        self.allow_label_drift = allow_label_drift
        self.unlike: Unlike = unlike
        if held_out is not None:
            check_held_out(held_out, generator, leaks=leaks)

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        """Itself, as nothing in it changes: frameworks copy transforms for each thread."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "card"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.card = card_of(self.source)
        reference(self.source)

    @property
    def source(self) -> GeneratorLike:
        """The generator as it was given: an object, or a name."""
        return self._given or self.generator

    def check_labels(self, ids: Iterable[int], where: Path) -> None:
        """Refuse label ids of a dataset that the generator does not know, before any case is touched.

        Raises:
            LabelError: names them and `where` they were found.
        """
        mapping = self.label_mapping or {}
        unknown = sorted(value for value in ids if mapping.get(value, value) not in self.card.labels)
        if unknown:
            raise LabelError(
                f"{where} has the label id(s) {unknown}, which {self.card.name} does not know (it knows "
                f"{dict(self.card.labels)}): say which is which with label_mapping={{your id: generator id}} "
                "(0 is background)"
            )

    def parameters(self, seed: int) -> Parameters:
        """The parameters of one application; equal seeds give equal ones."""
        rng = torch.Generator().manual_seed(seed)
        return {
            "verb": self.verb,
            "generator": self.generator,
            "weights_hash": self.card.weights_hash,
            "seed": int(seed),
            **self._draw(rng),
            "sampler": self.sampling.sampler,
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "label_mapping": self._mapping(),
            "allow_label_drift": self.allow_label_drift,
            "unlike": self.unlike,
        }

    def _mapping(self) -> dict[str, int] | None:
        """With text keys, as JSON has them."""
        return {str(k): int(v) for k, v in (self.label_mapping or {}).items()} or None

    def ranges(self) -> dict[str, Any]:
        """What parameters are drawn from, as plain JSON."""
        own = {name: getattr(self, name) for name in self.own}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()} | {
            "sampler": self.sampling.sampler,
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "label_mapping": self._mapping(),
            "allow_label_drift": self.allow_label_drift,
        }

    @abstractmethod
    def _draw(self, rng: torch.Generator) -> dict[str, Any]:
        """What is random besides the noise."""


class Variation(Operation):
    """Another image of the same anatomy: `Generator.vary` at a random strength.

    Args:
        strength: range within [0, 1], or one number; default: the card's range.

    Parameters: `"strength"`.
    """

    verb: ClassVar[Verb] = "vary"
    own = ("strength",)

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        strength: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, **kwargs)
        default = self.card.defaults.strength_range
        self.strength = pair("strength", default if strength is None else strength, 0, 1)

    def _draw(self, rng: torch.Generator) -> dict[str, Any]:
        return {"strength": uniform(self.strength, rng)}


class Inpainting(Operation):
    """A random region made anew: `Generator.inpaint`, with the scan's own grain, by whose lack a segmenter
    could tell the region.

    Args:
        region: "ellipsoid" or "box", anywhere that the generator reaches; "label": a structure of the label
            map and a margin around it; "around": that margin alone.
        labels: ids of the label map that "label" and "around" are about; default: all of the vocabulary's.

    Parameters: `"region"`, see `diffaug.operations.regions`.
    """

    verb: ClassVar[Verb] = "inpaint"
    own = ("region", "labels")

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        region: Shape = "ellipsoid",
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, **kwargs)
        own = {number: number for number in self.card.labels} | (self.label_mapping or {})
        known = tuple(value for value, number in own.items() if number != 0)
        if region in ("label", "around") and not known:
            raise LabelError(
                f"{self.card.name} knows no labels, so that no region can be about one: use "
                "region='ellipsoid' or 'box'"
            )
        if unknown := sorted(set(labels or ()) - set(known)):
            raise LabelError(f"labels names {unknown}; the label maps may hold {sorted(known)}")
        self.region: Shape = region
        self.labels = tuple(labels or known)
        self._draw(torch.Generator())

    def _draw(self, rng: torch.Generator) -> dict[str, Any]:
        return {"region": draw_region(self.region, self.card.to_grid(), self.labels, rng)}


class Repaint(Operation):
    """Another shape and another look: image and label map deformed within bounds, and the image painted anew
    from the label map.

    Painted is `Generator.vary` at strength 1: nothing but the label map decides the anatomy, and the scan
    gives its finest grain, which moved along. A plain `Generator.paint` would be as smooth as the
    autoencoder, and a segmenter could tell by that.

    Bounds: nothing folds, every label keeps its number of connected components, and its volume stays between
    the 5th and 95th percentile of the generator's training cases (or comes nearer to them).

    Args:
        amplitude: range of the largest displacement in mm, or one number; default: 2 to 7.5 % of the shortest
            side of the generator's grid.

    Parameters: `"strength": 1` and `"deformation": {"amplitude": mm, "seed": >= 0}`.
    """

    verb: ClassVar[Verb] = "vary"
    own = ("amplitude",)
    moves_label: ClassVar[bool] = True

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        amplitude: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(generator, **kwargs)
        if not self.card.labels:
            raise LabelError(f"{self.card.name} knows no labels, from which it could paint a case anew")
        if not self.card.label_volumes:
            raise CardError(
                f"the card of {self.card.name} has no label_volumes, which bound a deformation: fit it "
                "again, or add to card.json the 5th and 95th percentile of each label's volume in the "
                'training cases (mm^3), such as "label_volumes": {"1": [950, 2100]}'
            )
        grid = self.card.to_grid()
        side = min(n * s for n, s in zip(grid.shape, grid.spacing, strict=True))
        default = (AMPLITUDE[0] * side, AMPLITUDE[1] * side)
        self.amplitude = pair("amplitude", default if amplitude is None else amplitude, 0, float("inf"))

    def _draw(self, rng: torch.Generator) -> dict[str, Any]:
        seed = int(torch.randint(2**31, (1,), generator=rng))
        deformation = {"amplitude": uniform(self.amplitude, rng), "seed": seed}
        return {"strength": 1.0, "deformation": deformation}


def pair(name: str, value: float | tuple[float, float], least: float, most: float) -> tuple[float, float]:
    """Lowest and highest from a pair, or from one number for both.

    Raises:
        ValueError: unless least <= low <= high <= most.
    """
    bounds = (value, value) if isinstance(value, int | float) else value
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not least <= low <= high <= most:
        raise ValueError(
            f"{name} must be a number or a pair (low, high) within [{least}, {most}], got {value!r}"
        )
    return low, high


def uniform(bounds: tuple[float, float], rng: torch.Generator) -> float:
    """A number between the bounds."""
    low, high = bounds
    return low + (high - low) * float(torch.rand(1, generator=rng, dtype=torch.float64))
