"""The VQ-GAN against arithmetic written out independently, and its repairs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffaug.generators.blocks import Float32GroupNorm
from diffaug.generators.medical_diffusion import vqgan
from diffaug.generators.medical_diffusion.vqgan import (
    VQGAN,
    Codebook,
    SamePadConv3d,
    SamePadConvTranspose3d,
    VQGANConfig,
)

FACTORS = st.sampled_from([1, 2, 4])


def small(downsampling: tuple[int, int, int] = (2, 2, 2), **changes: object) -> VQGANConfig:
    return VQGANConfig(
        **{"hidden": 4, "groups": 4, "codes": 24, "latent_channels": 3, "downsampling": downsampling}
        | changes
    )


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 2)])
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_padding_puts_the_odd_voxel_first(kernel: int, stride: tuple[int, int, int]) -> None:
    if kernel == 1 and stride != (1, 1, 1):
        pytest.skip("no such layer")
    layer = SamePadConv3d(2, 3, kernel, stride)
    # Two: a single volume is convolved by another implementation, which rounds otherwise.
    x = torch.randn(2, 2, 4, 6, 8)
    amounts = []
    for s in reversed(stride):
        total = kernel - s
        amounts += [total // 2 + total % 2, total // 2]
    expected = F.conv3d(
        F.pad(x, amounts, mode="replicate"), layer.conv.weight, layer.conv.bias, stride=stride
    )
    assert torch.equal(layer(x), expected)
    assert layer(x).shape[2:] == tuple(n // s for n, s in zip((4, 6, 8), stride, strict=True))


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 1, 2)])
def test_transposed_convolution_doubles_the_strided_axes(stride: tuple[int, int, int]) -> None:
    layer = SamePadConvTranspose3d(2, 3, 4, stride)
    x = torch.randn(1, 2, 3, 4, 5)
    out = layer(x)
    assert out.shape[2:] == tuple(n * s for n, s in zip((3, 4, 5), stride, strict=True))
    # Written out for one output voxel: every input voxel (of the padded input) that reaches it.
    amounts = [amount for s in reversed(stride) for amount in ((4 - s) // 2 + (4 - s) % 2, (4 - s) // 2)]
    padded = F.pad(x, amounts, mode="replicate")
    position = (2, 3, 1)
    total = layer.convt.bias.clone()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in padded.shape[2:])):
        tap = [p + 3 - int(i) * s for p, i, s in zip(position, index, stride, strict=True)]
        if all(0 <= t < 4 for t in tap):
            voxel = padded[0, :, *index.tolist()]
            total = total + voxel @ layer.convt.weight[:, :, *tap]
    assert torch.allclose(out[0, :, *position], total, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(
    factors=st.tuples(FACTORS, FACTORS, FACTORS).filter(lambda f: max(f) > 1),
    shape=st.tuples(*[st.integers(3, 11)] * 3),
)
def test_any_size_comes_back_with_its_size(
    factors: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    """The original truncates a size that does not divide, without a word."""
    network = VQGAN(small(factors))
    with torch.no_grad():
        z = network.encode(torch.randn(1, 1, *shape))
        assert z.shape == (1, 3, *(-(-n // f) for n, f in zip(shape, factors, strict=True)))
        assert network.decode(z, shape).shape == (1, 1, *shape)


def test_padding_repeats_the_last_voxels() -> None:
    x = torch.randn(1, 1, 5, 4, 3)
    padded = VQGAN(small()).pad(x)
    assert torch.equal(padded[:, :, :5, :4, :3], x)
    assert torch.equal(padded[:, :, 5, :4, :3], x[:, :, 4])
    network = VQGAN(small())
    whole = torch.randn(1, 1, 6, 4, 4)
    assert torch.equal(network.pad(whole), whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsampling": (1, 1, 1)}, "one of them above 1"),
        ({"downsampling": (2, 3, 2)}, "powers of two"),
        ({"hidden": 6, "groups": 32}, "groups 32 must divide the channel counts"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VQGANConfig(**{"downsampling": (2, 2, 2)} | changes)


def test_anisotropic_factors_halve_the_first_stages() -> None:
    assert VQGANConfig(downsampling=(2, 4, 4)).strides == [(2, 2, 2), (1, 2, 2)]
    assert VQGANConfig(downsampling=(1, 2, 8)).strides == [(1, 2, 2), (1, 1, 2), (1, 1, 2)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([64, 400, 10**6]))
def test_nearest_code_in_chunks(seed: int, limit: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    book = Codebook(17, 3)
    z = torch.randn(2, 3, 2, 3, 4, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqgan, "DISTANCE_BYTES", limit)
        found = book.nearest(z)
    distances = (z.movedim(1, -1)[..., None, :] - book.embeddings).square().sum(-1)
    assert torch.equal(found, distances.argmin(-1))
    assert torch.equal(book.quantise(z), book.embeddings[found].movedim(-1, 1))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_quantiser_memory_is_bounded() -> None:
    """The original holds the distances of all latents to all codes, and a one-hot matrix of that size."""
    z, book = torch.randn(1, 4, 40, 40, 40), Codebook(1000, 4)
    with LargestTensor() as largest:
        book.nearest(z)
    assert vqgan.DISTANCE_BYTES / 2 < largest.bytes <= vqgan.DISTANCE_BYTES < 4 * 64000 * 1000


def test_quantiser_and_norms_are_float32_under_mixed_precision() -> None:
    """In half precision a latent between two close codes finds the wrong one."""
    book = Codebook(2, 1)
    book.embeddings.copy_(torch.tensor([[1.0], [1.004]]))
    z = torch.tensor([1.003]).view(1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert int(book.nearest(z)) == 1
    norm = Float32GroupNorm(1, 2)
    seen = {}
    real = F.group_norm
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "group_norm", lambda x, *rest: seen.update(dtype=x.dtype) or real(x, *rest))
        out = norm(torch.randn(1, 2, 3, 3, 3, dtype=torch.bfloat16))
    assert seen["dtype"] == torch.float32
    assert out.dtype == torch.bfloat16


def test_range_can_leave_out_dead_codes() -> None:
    book = Codebook(4, 2)
    book.embeddings.copy_(torch.tensor([[0.0, 1], [-1, 2], [9, 0], [0, -9]]))
    book.N.copy_(torch.tensor([3.0, 1.0, 0.5, 0.0]))
    assert book.range(live_only=True) == (-1.0, 2.0)
    assert book.range(live_only=False) == (-9.0, 9.0)
    book.N.zero_()
    assert book.range(live_only=True) == (-9.0, 9.0)


def test_a_codebook_without_the_flag_is_taken_for_initialised() -> None:
    book = Codebook(4, 2)
    assert not bool(book.initialised)
    upstream = {k: v for k, v in book.state_dict().items() if k != "initialised"}
    book.load_state_dict(upstream)
    assert bool(book.initialised)
    fresh = Codebook(4, 2)
    fresh.load_state_dict(Codebook(4, 2).state_dict())
    assert not bool(fresh.initialised)


def test_decoding_is_of_the_nearest_codes() -> None:
    network = VQGAN(small())
    z = torch.randn(1, 3, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(network.decode(z), network.decode_quantised(network.codebook.quantise(z)))
        assert not torch.equal(network.decode(z), network.decode_quantised(z))
