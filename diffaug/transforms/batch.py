"""The operations on batches that lie on the device of a training loop.

    from diffaug.transforms.batch import BatchVariation

    augment = BatchVariation("hippocampus-mr", p=0.3)
    for image, label, affine in loader:                 # (B, C, I, J, K), (B, 1, I, J, K), (B, 4, 4)
        image = augment(image.to("cuda"), label.to("cuda"), affine)

The generator works on the device of the images. Seeds come from torch's random state on the CPU, whatever
the device. The modules have no parameters and no state: an optimiser, a checkpoint and DDP do not see them.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from diffaug import operations
from diffaug.errors import DiffaugError, LabelError
from diffaug.generators.generator import Generator
from diffaug.operations import Case, Operation, Parameters, apply_to_cases
from diffaug.operations.regions import Shape
from diffaug.operations.sources import GeneratorLike
from diffaug.zoo import load


class _Batch(nn.Module):
    """A random operation on each case of a batch with probability `p`; none in evaluation mode.

    Attributes:
        last_params: of each case of the last batch what was drawn for it, or None.
    """

    kind: ClassVar[type[Operation]]

    def __init__(self, operation: Operation, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        self.operation = operation
        self.p = p
        self.last_params: list[Parameters | None] = []
        # Its own, since it moves to the device of the images.
        self._generator: Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Weights are loaded again where they are needed.
        return {**self.__dict__, "_generator": None}

    def extra_repr(self) -> str:
        return f"generator={self.operation.generator}, p={self.p}"

    def _apply_to(
        self, image: Tensor, label: Tensor | None, affine: ArrayLike
    ) -> tuple[Tensor, Tensor | None]:
        if self.operation.moves_label and label is None:
            raise LabelError(f"{type(self).__name__} deforms label maps: give them")
        if image.ndim != 5:
            raise DiffaugError(f"image must have shape (B, C, I, J, K), got {tuple(image.shape)}")
        affine = torch.as_tensor(affine).cpu().double()
        if affine.shape not in ((4, 4), (len(image), 4, 4)):
            raise DiffaugError(
                f"affine must have shape (4, 4) or ({len(image)}, 4, 4), got {tuple(affine.shape)}"
            )
        affine = affine.expand(len(image), 4, 4)
        if not self.training:
            self.last_params = [None] * len(image)
            return image, label
        chosen = (torch.rand(len(image)) < self.p).nonzero().flatten().tolist()
        seeds = torch.randint(2**31, (len(image),)).tolist()
        drawn = [self.operation.parameters(seeds[n]) for n in chosen]
        for parameters in drawn[1:]:
            if "strength" in parameters:
                # One number of sampler steps for all, so that they are one batch.
                parameters["strength"] = drawn[0]["strength"]
        self.last_params = [None] * len(image)
        image, label = image.clone(), None if label is None else label.clone()
        if not chosen:
            return image, label
        cases = [Case(image[n], None if label is None else label[n]) for n in chosen]
        # Networks have their own precision; that of the loop around would change what they make.
        with torch.autocast(image.device.type, enabled=False):
            made = apply_to_cases(self._on(image.device), drawn, cases, affine[chosen].numpy())
        for n, parameters, case in zip(chosen, drawn, made, strict=True):
            self.last_params[n] = parameters
            image[n] = case.image
            if label is not None and case.label is not None:
                label[n] = case.label
        return image, label

    def _on(self, device: torch.device) -> Generator:
        if self._generator is None:
            source = self.operation.source
            self._generator = source if isinstance(source, Generator) else load(source)
        if self._generator.device != device:
            self._generator.to(device)
        return self._generator


class BatchVariation(_Batch):
    """Another image of the same anatomy, for each case of a batch with probability `p`.

    The cases of a batch share the strength, so that they are sampled together.

    Args:
        generator: bundled name, folder, or `diffaug.Generator`; an object moves to the images' device.
        strength: range within [0, 1], or one number; default: the card's range.
        **kwargs: `steps`, `guidance`, `sampler`, `label_mapping`, `allow_label_drift`, see
            `diffaug.operations.Operation`, and its errors.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        p: float = 0.3,
        strength: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(operations.Variation(generator, strength, **kwargs), p)

    def forward(self, image: Tensor, label: Tensor | None, affine: ArrayLike) -> Tensor:
        """Images `(B, C, I, J, K)` of the same dtype and units.

        Args:
            image: `(B, C, I, J, K)`, any numeric dtype and unit.
            label: `(B, 1, I, J, K)`, integers, or None with `allow_label_drift`.
            affine: `(4, 4)` or `(B, 4, 4)`, voxel to world, mm, RAS+.
        """
        return self._apply_to(image, label, affine)[0]


class BatchInpainting(_Batch):
    """A random region made anew, for each case of a batch with probability `p`.

    Args:
        region: "ellipsoid" or "box" anywhere, "label" (a structure and a margin), or "around" (that margin).
        labels: ids that "label" and "around" choose from; default: all.
        generator, p, **kwargs: as for `BatchVariation`.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        p: float = 0.3,
        region: Shape = "ellipsoid",
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(operations.Inpainting(generator, region, labels, **kwargs), p)

    def forward(self, image: Tensor, label: Tensor | None, affine: ArrayLike) -> Tensor:
        """As `BatchVariation.forward`."""
        return self._apply_to(image, label, affine)[0]


class BatchRepaint(_Batch):
    """Image and label map deformed within bounds and painted anew, for each case with probability `p`.

    Args:
        amplitude: range of the largest displacement in mm, or one number; default: 2 to 7.5 % of the shortest
            side of the generator's grid.
        generator, p, **kwargs: as for `BatchVariation`.
    """

    def __init__(
        self,
        generator: GeneratorLike = "hippocampus-mr",
        p: float = 0.3,
        amplitude: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(operations.Repaint(generator, amplitude, **kwargs), p)

    def forward(self, image: Tensor, label: Tensor, affine: ArrayLike) -> tuple[Tensor, Tensor]:
        """Images and label maps; arguments as for `BatchVariation.forward`."""
        image, moved = self._apply_to(image, label, affine)
        assert moved is not None
        return image, moved
