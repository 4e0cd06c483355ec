"""Overlap of label maps."""

import torch
from torch import Tensor

from diffaug.errors import DiffaugError


def dice(predicted: Tensor, true: Tensor, labels: tuple[int, ...] = (1, 2)) -> Tensor:
    """Dice coefficient of each case and label.

    Args:
        predicted: label maps (B, 1, I, J, K), integers.
        true: label maps of the same shape.
        labels: the label ids to compare.

    Returns:
        Coefficients (B, len(labels)), float64, 0 to 1; NaN where neither map has the label.

    Raises:
        DiffaugError: where the shapes differ.
    """
    if predicted.shape != true.shape:
        raise DiffaugError(
            f"label maps of shapes {tuple(predicted.shape)} and {tuple(true.shape)} cannot be compared"
        )
    coefficients = []
    for label in labels:
        a, b = (predicted == label).flatten(1), (true == label).flatten(1)
        coefficients.append(2 * (a & b).sum(1).double() / (a.sum(1) + b.sum(1)))
    return torch.stack(coefficients, 1)
