"""Convolutions on volumes smaller than their kernels, and of single volumes."""

import pytest
import torch
from torch import Tensor, nn

from diffaug.generators.blocks import Conv3d, ConvTranspose3d


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of weights and input."""
    x = x.clone().requires_grad_(True)
    module.zero_grad()
    y = module(x)
    y.float().square().mean().backward()
    return [y.detach(), module.weight.grad, x.grad]


@pytest.mark.parametrize("shape", [(8, 1, 2), (3, 2, 2), (2, 2, 6), (1, 3, 1), (4, 6, 6)])
@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind(16, 32, 3, padding=1),
        lambda kind: kind(16, 32, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)),
        lambda kind: kind(16, 32, (1, 7, 7), padding=(0, 3, 3)),
        lambda kind: kind(16, 32, 4, stride=2, padding=2),
        lambda kind: kind(16, 32, 4, stride=(1, 2, 2), padding=(3, 1, 1)),
    ],
    ids=["3x3x3", "in-plane stride 2", "in-plane 7", "discriminator", "anisotropic"],
)
@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
def test_bfloat16_gradients_are_right_on_small_volumes(make, shape, transposed: bool) -> None:
    """torch's own are garbage for many of these, or never end."""
    torch.manual_seed(0)
    ours, theirs = (ConvTranspose3d, nn.ConvTranspose3d) if transposed else (Conv3d, nn.Conv3d)
    module, plain = make(ours), make(theirs)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 16, *shape)
    try:
        expected = results(plain, x)
    except RuntimeError:
        pytest.skip("smaller than the kernel even with its padding")
    if not expected[0].numel():
        pytest.skip("nothing is left of the output")
    exact = results(module, x)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(exact, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(module, x)
    for a, b in zip(rounded, expected, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()


@pytest.mark.parametrize("shape", [(20, 28, 20), (2, 5, 1)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda kind: kind(8, 6, 3, padding=1),
        lambda kind: kind(8, 6, 1),
        lambda kind: kind(8, 6, (1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)),
        lambda kind: kind(8, 6, (1, 7, 7), padding=(0, 3, 3), bias=False),
    ],
    ids=["3x3x3", "pointwise", "in-plane stride 2", "in-plane 7"],
)
def test_convolutions_of_float32_are_those_of_torch(make, batch: int, shape) -> None:
    torch.manual_seed(0)
    module, plain = make(Conv3d), make(nn.Conv3d)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(batch, 8, *shape)
    try:
        expected = results(plain, x)
    except RuntimeError:
        pytest.skip("smaller than the kernel even with its padding")
    for a, b in zip(results(module, x), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_single_volume_of_float32_goes_to_the_fast_implementation() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    with torch.profiler.profile() as profile, torch.no_grad():
        Conv3d(8, 8, 3, padding=1)(torch.randn(1, 8, 4, 4, 4))
    assert {event.name for event in profile.events()} & {"aten::mkldnn_convolution"}
