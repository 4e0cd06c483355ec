"""The operations that arms name."""

import inspect
from typing import Any

from diffaug.bank.building import OPERATIONS
from diffaug.benchmark.config import TransformUse
from diffaug.errors import DiffaugError
from diffaug.operations import Operation


def operation_of(use: TransformUse, generator: str, label_mapping: dict[int, int] | None = None) -> Operation:
    """What an arm draws variants from.

    Raises:
        DiffaugError, TypeError, ValueError: the generator cannot do that, or ranges that it does not know.
    """
    kind = OPERATIONS[use.operation]
    if unknown := sorted(set(use.ranges) - set(_arguments(kind))):
        raise DiffaugError(f"there is no {', '.join(unknown)}; there are {', '.join(_arguments(kind))}")
    ranges: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in use.ranges.items()
    }
    return kind(generator, label_mapping=label_mapping, **ranges)


def _arguments(kind: type[Operation]) -> list[str]:
    """What an operation and those that it extends are told beside generator and labels."""
    known = {
        name
        for part in kind.__mro__
        if issubclass(part, Operation)
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    return sorted(known - {"self", "generator", "label_mapping", "held_out", "leaks"})
