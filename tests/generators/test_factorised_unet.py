"""The pieces of the depth-factorised U-Net against formulas written out independently."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from diffaug.generators.medical_diffusion.factorised_unet import (
    Attention,
    ChannelNorm,
    FactorisedUNet,
    ResnetBlock,
    RotaryEmbedding,
    SpatialLinearAttention,
    StepEmbedding,
    UNetConfig,
    relative_buckets,
)

SMALL = UNetConfig(channels=3, out_channels=3, dim=8, dim_mults=(1, 2), heads=2, head_dim=4)


def test_buckets_of_relative_positions() -> None:
    far = [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        8,
        9,
        9,
        10,
        10,
        11,
        11,
        12,
        12,
        12,
        12,
        13,
        13,
        13,
        14,
        14,
        14,
        14,
        15,
        15,
    ]
    buckets = relative_buckets(29)
    assert buckets[:, 0].tolist() == far, "key before query"
    assert buckets[0, 1:].tolist() == [16 + b for b in far[1:]], "key after query"
    assert relative_buckets(200)[199, 0] == 15


def test_rotary_turns_neighbouring_pairs() -> None:
    rotary = RotaryEmbedding(4)
    assert torch.allclose(rotary.freqs, torch.tensor([1.0, 0.01]))
    x = torch.randn(2, 3, 6)
    out = rotary(x)
    for position in range(3):
        for pair, frequency in enumerate((1.0, 0.01)):
            a, b = x[:, position, 2 * pair], x[:, position, 2 * pair + 1]
            angle = position * frequency
            assert torch.allclose(
                out[:, position, 2 * pair], a * math.cos(angle) - b * math.sin(angle), atol=1e-6
            )
            assert torch.allclose(
                out[:, position, 2 * pair + 1], b * math.cos(angle) + a * math.sin(angle), atol=1e-6
            )
    assert torch.equal(out[..., 4:], x[..., 4:])


def test_step_embedding_has_sines_first() -> None:
    found = StepEmbedding(8)(torch.tensor([0, 7]))
    frequencies = [math.exp(-i * math.log(10000) / 3) for i in range(4)]
    expected = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    assert torch.allclose(found[1], torch.tensor(expected), atol=1e-6)
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_channel_norm_has_biased_variance_and_no_bias() -> None:
    norm = ChannelNorm(5)
    with torch.no_grad():
        norm.gamma.uniform_(0.5, 2)
    x = torch.randn(2, 5, 2, 3, 4)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    assert torch.allclose(norm(x), (x - mean) / torch.sqrt(variance + 1e-5) * norm.gamma, atol=1e-6)
    assert {name for name, _ in norm.named_parameters()} == {"gamma"}


def test_depth_attention_head_by_head() -> None:
    rotary = RotaryEmbedding(4)
    attention = Attention(6, heads=2, head_dim=4, rotary_emb=rotary)
    x, bias = torch.randn(3, 5, 6), torch.randn(2, 5, 5)
    q, k, v = attention.to_qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        qh, kh = rotary(q[..., part] * 4**-0.5), rotary(k[..., part])
        weights = (qh @ kh.transpose(1, 2) + bias[h]).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    assert torch.allclose(attention(x, bias), attention.to_out(torch.cat(heads, dim=-1)), atol=1e-5)


def test_linear_attention_head_by_head() -> None:
    attention = SpatialLinearAttention(3, heads=2)
    x = torch.randn(2, 3, 2, 3, 4)
    out = attention(x)
    for depth in range(2):
        flat = attention.to_qkv(x[:, :, depth]).flatten(2)
        q, k, v = flat.chunk(3, dim=1)
        heads = []
        for h in range(2):
            part = slice(32 * h, 32 * h + 32)
            qh = q[:, part].softmax(dim=1) * 32**-0.5
            kh = k[:, part].softmax(dim=2)
            context = torch.einsum("bdn,ben->bde", kh, v[:, part])
            heads.append(torch.einsum("bde,bdn->ben", context, qh))
        expected = attention.to_out(torch.cat(heads, dim=1).view(2, 64, 3, 4))
        assert torch.allclose(out[:, :, depth], expected, atol=1e-5)


def test_the_first_half_of_the_modulation_is_the_scale() -> None:
    block = ResnetBlock(8, 8, groups=4, time=6)
    x, time = torch.randn(1, 8, 2, 4, 4), torch.randn(1, 6)
    scale, shift = block.mlp(time).view(2, 8, 1, 1, 1)
    h = torch.nn.functional.silu(block.block1.norm(block.block1.proj(x)) * (scale + 1) + shift)
    expected = torch.nn.functional.silu(block.block2.norm(block.block2.proj(h))) + x
    assert torch.allclose(block(x, time), expected, atol=1e-6)


def test_convolutions_stay_in_the_plane() -> None:
    network = FactorisedUNet(SMALL)
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d)]
    assert len(convolutions) > 20
    assert all(m.kernel_size[0] == m.stride[0] == 1 for m in convolutions)


def test_depth_attention_joins_the_slices() -> None:
    network = FactorisedUNet(SMALL).eval()
    x = torch.randn(1, 3, 4, 6, 8)
    changed = x.clone()
    changed[:, :, 2] += 1
    with torch.no_grad():
        difference = (network(x, torch.tensor([3])) - network(changed, torch.tensor([3]))).abs()
    assert difference[:, :, 0].max() > 1e-6


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (2, 6, 9)])
def test_any_latent_size_works(shape: tuple[int, int, int]) -> None:
    """The original needs height and width that the levels divide."""
    network = FactorisedUNet(SMALL)
    with torch.no_grad():
        assert network(torch.randn(2, 3, *shape), torch.tensor([0, 299])).shape == (2, 3, *shape)


class StatisticsTypes(TorchDispatchMode):
    """Types that norms and softmax compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("native_group_norm", "var_mean", "_softmax"):
            self.found.setdefault(name, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_norms_and_softmax_are_float32_under_mixed_precision() -> None:
    network = FactorisedUNet(SMALL).eval()
    x, step = torch.randn(1, 3, 4, 8, 8), torch.tensor([10])
    products = set()
    network.mid_block1.block1.proj.register_forward_hook(lambda _, i, o: products.add(o.dtype))
    with torch.no_grad(), StatisticsTypes() as types, torch.autocast("cpu", torch.bfloat16):
        network(x, step)
    assert products == {torch.bfloat16}
    float32 = {torch.float32}
    assert types.found == {"native_group_norm": float32, "var_mean": float32, "_softmax": float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dim_mults": ()}, "dim_mults is empty"), ({"dim": 12}, "groups 8"), ({"kernel": 4}, "kernel odd")],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**changes)
