"""What operations take and give."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of an applied operation, as plain JSON; see `diffaug.operations`.
Parameters = dict[str, Any]


class Case(NamedTuple):
    """Image `(C, I, J, K)`, any numeric dtype and unit, and label map `(1, I, J, K)`, integers, or None."""

    image: Tensor
    label: Tensor | None


def join_channels(images: Sequence[Tensor]) -> Tensor:
    """Images `(c, I, J, K)` as the channels of one; of several dtypes as float64, which holds the others'
    voxels exactly."""
    if len({image.dtype for image in images}) > 1:
        images = [image.double() for image in images]
    return torch.cat(list(images))
