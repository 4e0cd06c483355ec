"""The operations as transforms of batchgeneratorsv2, nnU-Net's library, for pipelines of your own.

    from batchgeneratorsv2.transforms.utils.random import RandomTransform
    from diffaug.transforms.batchgenerators import VariationTransform

    transforms = nnUNetTrainer.get_training_transforms(...)
    vary = VariationTransform(patch_affine(axes, transpose_forward, spacing), "hippocampus-mr")
    transforms.transforms.insert(0, RandomTransform(vary, apply_probability=0.3))

Put them first, while patches are not turned yet. They run in nnU-Net's worker processes, a fraction of a
second each, which `nnUNetTrainerDiffAug` with a bank spares. Arrays are `(C, X, Y, Z)` in nnU-Net's axis
order; `diffaug.nnunet.trainers.patch_affine` gives their affine.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from diffaug import operations
from diffaug.errors import DiffaugError, ExtraError
from diffaug.operations import Case, Operation, Parameters, apply
from diffaug.operations.regions import Shape
from diffaug.operations.sources import GeneratorLike

try:
    from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
except ImportError as error:
    raise ExtraError("batchgeneratorsv2", "nnunet") from error


class _OperationTransform(BasicTransform):  # type: ignore[misc]
    """Applies an operation to `image`, following the first channel of `segmentation`.

    Voxels of the segmentation below 0, nnU-Net's mark for what lies outside the scan, count as background and
    come back as they were.
    """

    def __init__(self, affine: ArrayLike, operation: Operation) -> None:
        super().__init__()
        self.affine = np.asarray(affine, dtype=np.float64)
        self.operation = operation

    def get_parameters(self, **data_dict: Any) -> dict[str, Parameters]:
        """Draw from torch's random state, as most of batchgeneratorsv2 does."""
        return {"parameters": self.operation.parameters(int(torch.randint(2**31, (1,))))}

    def apply(self, data_dict: dict[str, Any], parameters: Parameters) -> dict[str, Any]:
        """Change the image, and the segmentation where the operation moves it."""
        image, segmentation = data_dict["image"], data_dict.get("segmentation")
        others = [key for key in ("regression_target", "keypoints", "bbox") if data_dict.get(key) is not None]
        if self.operation.moves_label and (others or (segmentation is not None and len(segmentation) > 1)):
            raise DiffaugError(
                "a repaint moves the first channel of the segmentation alone, and other channels, "
                "regression_target, keypoints or bbox would show the old anatomy: use a VariationTransform"
            )
        label = None if segmentation is None else segmentation[:1].clamp(min=0)
        made = apply(parameters, Case(image, label), self.affine)
        data_dict["image"] = made.image
        if self.operation.moves_label and segmentation is not None and made.label is not None:
            data_dict["segmentation"] = torch.where(segmentation < 0, segmentation, made.label)
        return data_dict


class VariationTransform(_OperationTransform):
    """Another image of the same anatomy.

    Args:
        affine: `(4, 4)`, voxel to world of the arrays but for their place, mm, RAS+.
        generator: bundled name, or folder.
        strength: range within [0, 1], or one number; default: the card's range.
        **kwargs: see `diffaug.operations.Operation`, and its errors.
    """

    def __init__(
        self,
        affine: ArrayLike,
        generator: GeneratorLike = "hippocampus-mr",
        strength: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(affine, operations.Variation(generator, strength, **kwargs))


class InpaintingTransform(_OperationTransform):
    """A random region made anew.

    Args:
        region: "ellipsoid" or "box" anywhere, "label" (a structure and a margin), or "around" (that margin).
        labels: ids that "label" and "around" choose from; default: all.
        affine, generator, **kwargs: as for `VariationTransform`.
    """

    def __init__(
        self,
        affine: ArrayLike,
        generator: GeneratorLike = "hippocampus-mr",
        region: Shape = "ellipsoid",
        labels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(affine, operations.Inpainting(generator, region, labels, **kwargs))


class RepaintTransform(_OperationTransform):
    """Image and segmentation deformed within bounds, and the image painted anew.

    Args:
        amplitude: range of the largest displacement in mm, or one number; default: 2 to 7.5 % of the shortest
            side of the generator's grid.
        affine, generator, **kwargs: as for `VariationTransform`.
    """

    def __init__(
        self,
        affine: ArrayLike,
        generator: GeneratorLike = "hippocampus-mr",
        amplitude: float | tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(affine, operations.Repaint(generator, amplitude, **kwargs))
