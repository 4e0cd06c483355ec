"""Label maps of whole cases by overlapping patches, on the cases' own voxels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffaug.errors import ExtraError
from diffaug.segmentation.cases import Prepared
from diffaug.segmentation.training import logits

# Of neighbouring patches, as in nnU-Net.
OVERLAP = 0.5


@torch.no_grad()
def predict_case(network: nn.Module, case: Prepared, patch: Sequence[int]) -> Tensor:
    """The label map `(1, *shape)` int16 of a case, on the voxels of its file.

    Patches overlap by half and count less towards their faces (MONAI's sliding window).
    """
    try:
        from monai.inferers import sliding_window_inference
    except ImportError as error:
        raise ExtraError("MONAI", "monai") from error
    device = next(network.parameters()).device
    found = sliding_window_inference(
        case.image[None].to(device),
        tuple(patch),
        1,
        lambda images: logits(network, images),
        overlap=OVERLAP,
        mode="gaussian",
    )
    assert isinstance(found, Tensor)
    placement = case.placement
    shares = found.softmax(1).cpu()
    best, window = placement.from_grid(shares[:, :1])
    own = torch.zeros(best.shape[1:], dtype=torch.int16)
    # Class by class, as large volumes with many classes would not fit into memory at once.
    for number in range(1, shares.shape[1]):
        share, _ = placement.from_grid(shares[:, number : number + 1])
        own[(share > best)[0]] = number
        best = torch.maximum(share, best)
    shape = [placement.source_shape[n] for n in np.argsort(placement.axes)]
    label = torch.zeros((1, *shape), dtype=torch.int16)
    placement.put_back(label, own, window)
    return label
