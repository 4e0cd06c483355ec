"""What operations take and give."""

from typing import Any, NamedTuple

from torch import Tensor

# Of an applied operation, as plain JSON; see `diffaug.transforms.operations`.
Parameters = dict[str, Any]


class Case(NamedTuple):
    """Image `(C, I, J, K)`, any numeric dtype and unit, and label map `(1, I, J, K)`, integers, or None."""

    image: Tensor
    label: Tensor | None
