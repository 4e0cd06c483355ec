"""What may be done to a case at random, on tensors and without any framework.

- `operation`: `Variation`, `Inpainting`, `Repaint`, and the parameters that they draw, as plain JSON.
- `applying`: these parameters applied to a `case`; with `regions` and `deformation`.
- `sources`: generators by name, folder or object; `guard`: whether held-out scans trained one.
"""

from diffaug.operations.applying import apply, apply_to_cases
from diffaug.operations.case import Case, Parameters
from diffaug.operations.guard import check_held_out
from diffaug.operations.operation import Inpainting, Operation, Repaint, Variation

__all__ = [
    "Case",
    "Inpainting",
    "Operation",
    "Parameters",
    "Repaint",
    "Variation",
    "apply",
    "apply_to_cases",
    "check_held_out",
]
