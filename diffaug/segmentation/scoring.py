"""Scores of predicted label maps: Dice, normalised surface distance and Hausdorff distance, by MONAI."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffaug.errors import ExtraError


class Scores(NamedTuple):
    """Of one case and label. Where neither map shows it, that is right: 1, 1 and 0 mm.

    Attributes:
        dice: 0 to 1.
        nsd: share of both surfaces that lies within the tolerance of the other, 0 to 1.
        hd95: 95th percentile of distances between the surfaces, mm; the volume's diagonal where one map
            alone shows the label.
    """

    dice: float
    nsd: float
    hd95: float


def score(
    predicted: Tensor, true: Tensor, labels: Sequence[int], spacing: Sequence[float], tolerance: float
) -> list[Scores]:
    """Scores of a case for each label.

    Args:
        predicted, true: label maps `(1, I, J, K)`.
        labels: ids.
        spacing: of the voxels, mm.
        tolerance: of the surface distance, mm.
    """
    try:
        from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    except ImportError as error:
        raise ExtraError("MONAI", "monai") from error
    found = []
    for label in labels:
        pair = [(volume == label)[None] for volume in (predicted, true)]
        sizes = [int(volume.sum()) for volume in pair]
        if sum(sizes) == 0:
            found.append(Scores(1.0, 1.0, 0.0))
        elif min(sizes) == 0:
            diagonal = float(np.linalg.norm(np.array(true.shape[1:]) * np.array(spacing)))
            found.append(Scores(0.0, 0.0, diagonal))
        else:
            dice = 2 * int((pair[0] & pair[1]).sum()) / sum(sizes)
            both = [torch.cat([~volume, volume], 1).float() for volume in pair]
            one, other = both
            nsd = compute_surface_dice(one, other, [tolerance], spacing=tuple(map(float, spacing)))
            distance = compute_hausdorff_distance(
                one, other, percentile=95, spacing=tuple(map(float, spacing))
            )
            found.append(Scores(dice, float(nsd), float(distance)))
    return found
