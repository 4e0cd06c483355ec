"""Swin UNETR's self-supervision: its three tasks."""

import math

import pytest
import torch

from diffaug.errors import DiffaugError
from diffaug.pretraining.swin import TEMPERATURE, contrast, cut_out, turning_plane


def test_contrast_of_known_vectors() -> None:
    """Two patches whose views are equal, and orthogonal to the other's."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    wanted = -math.log(math.exp(1 / TEMPERATURE) / (math.exp(1 / TEMPERATURE) + 2))
    assert float(contrast(vectors)) == pytest.approx(wanted)
    assert float(contrast(vectors.roll(1, 0)[[0, 1, 3, 2]])) > wanted


def test_boxes_cover_their_share() -> None:
    view = torch.ones(2, 32, 32, 64)
    cut_out(view, torch.Generator().manual_seed(0))
    shares = (view == 0).float().mean((1, 2, 3))
    assert torch.equal(view[0], view[1])
    assert 0.3 <= float(shares[0]) < 0.32


def test_turning_plane() -> None:
    assert turning_plane((64, 64, 32)) == (1, 2)
    assert turning_plane((32, 64, 32)) == (1, 3)
    with pytest.raises(DiffaugError, match="two equal sides"):
        turning_plane((32, 64, 96))
