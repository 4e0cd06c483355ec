"""The operations that arms name."""

from typing import Any

from diffaug.bank.building import OPERATIONS
from diffaug.benchmark.config import TransformUse
from diffaug.operations import Operation


def operation_of(use: TransformUse, generator: str, label_mapping: dict[int, int] | None = None) -> Operation:
    """What an arm draws variants from.

    Raises:
        DiffaugError, TypeError, ValueError: the generator cannot do that, or ranges that it does not know.
    """
    ranges: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in use.ranges.items()
    }
    return OPERATIONS[use.operation](generator, label_mapping=label_mapping, **ranges)
