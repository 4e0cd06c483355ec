import pytest
import torch

from diffaug.generators.blocks import ResidualBlock, depth_to_space, space_to_depth
from diffaug.generators.joint_flow.autoencoder import Autoencoder, AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import PLAIN_TOKENS, DenoiserConfig, JointDenoiser, attention
from diffaug.generators.model import latent_mask


@pytest.mark.parametrize("factors", [(2, 2, 2), (2, 2, 1), (1, 3, 2), (4, 1, 1)])
def test_depth_to_space_inverts_space_to_depth(factors: tuple[int, int, int]) -> None:
    i, j, k = factors
    x = torch.arange(2 * 3 * 4 * i * 5 * j * 6 * k).view(2, 3, 4 * i, 5 * j, 6 * k)
    deep = space_to_depth(x, factors)
    assert deep.shape == (2, 3 * i * j * k, 4, 5, 6)
    assert torch.equal(depth_to_space(deep, factors), x)


def test_space_to_depth_gathers_each_block() -> None:
    x = torch.arange(64).view(1, 1, 4, 4, 4)
    deep = space_to_depth(x, (2, 2, 2))
    assert sorted(deep[0, :, 1, 0, 1].tolist()) == sorted(x[0, 0, 2:4, 0:2, 2:4].flatten().tolist())


@pytest.mark.parametrize(
    ("downsampling", "widths", "levels"),
    [
        ((4, 4, 4), (8, 16), [(2, 2, 2), (2, 2, 2)]),
        ((4, 4, 2), (8, 16), [(2, 2, 2), (2, 2, 1)]),
        ((4, 4, 1), (8, 16), [(2, 2, 1), (2, 2, 1)]),
        ((8, 4, 2), (8, 8, 16), [(2, 2, 2), (2, 2, 1), (2, 1, 1)]),
        ((2, 2, 2), (8,), [(2, 2, 2)]),
    ],
)
def test_autoencoder_shapes(
    downsampling: tuple[int, int, int], widths: tuple[int, ...], levels: list[tuple[int, int, int]]
) -> None:
    config = AutoencoderConfig(
        channels=2, latent_channels=3, downsampling=downsampling, widths=widths, blocks=1
    )
    assert config.levels == levels
    network = Autoencoder(config).eval()
    x = torch.randn(2, 2, 16, 8, 8)
    latent = network.encode(x)
    assert latent.shape == (2, 3, *network.latent_shape(x.shape[2:]))
    assert latent.shape[2:] == tuple(n // f for n, f in zip(x.shape[2:], downsampling, strict=True))
    assert network.decode(latent).shape == x.shape


@pytest.mark.parametrize(
    ("downsampling", "widths"),
    [((4, 4, 4), (8,)), ((2, 2, 2), (8, 8)), ((3, 3, 3), (8,)), ((6, 2, 2), (8, 8)), ((0, 2, 2), (8,))],
)
def test_downsampling_that_halving_cannot_reach_is_refused(
    downsampling: tuple[int, int, int], widths: tuple[int, ...]
) -> None:
    config = AutoencoderConfig(channels=1, latent_channels=2, downsampling=downsampling, widths=widths)
    with pytest.raises(ValueError, match="powers of two and one width per halving"):
        Autoencoder(config)


def test_latent_is_standardised_in_training() -> None:
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=1, latent_channels=3, downsampling=(2, 2, 2), widths=(8,), blocks=1)
    network = Autoencoder(config)
    latent = network.encode(5 + 20 * torch.randn(4, 1, 8, 8, 8)).detach()
    assert torch.allclose(latent.mean(dim=(0, 2, 3, 4)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(latent.var(dim=(0, 2, 3, 4), correction=0), torch.ones(3), atol=1e-2)


def test_latent_noise_comes_from_the_given_generator_and_only_in_training() -> None:
    config = AutoencoderConfig(channels=1, latent_channels=3, downsampling=(2, 2, 2), widths=(8,), blocks=1)
    network = Autoencoder(config)
    x = torch.randn(2, 1, 8, 8, 8)
    first, again, other = (network(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    network.eval()
    assert torch.equal(network(x, torch.Generator().manual_seed(1)), network(x))


def denoiser(label_channels: int = 2) -> JointDenoiser:
    torch.manual_seed(0)
    config = DenoiserConfig(
        image_channels=3,
        label_channels=label_channels,
        latent_shape=(4, 6, 2),
        convolution_width=8,
        width=16,
        depth=3,
        heads=2,
    )
    network = JointDenoiser(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    return network


def test_denoiser_gives_a_velocity_of_each_latents_shape() -> None:
    image, label = torch.randn(2, 3, 4, 6, 2), torch.randn(2, 2, 4, 6, 2)
    velocities = denoiser()(image, label, torch.rand(2), torch.rand(2))
    assert [v.shape for v in velocities] == [image.shape, label.shape]


def test_denoiser_without_labels() -> None:
    image = torch.randn(2, 3, 4, 6, 2)
    velocity, none = denoiser(0)(image, image[:, :0], torch.rand(2), torch.ones(2))
    assert velocity.shape == image.shape
    assert none.shape == (2, 0, 4, 6, 2)


def test_denoiser_tells_the_two_levels_apart() -> None:
    network = denoiser()
    image, label = torch.randn(1, 3, 4, 6, 2), torch.randn(1, 2, 4, 6, 2)
    low, high = torch.tensor([0.2]), torch.tensor([0.9])
    one, swapped = network(image, label, low, high)[0], network(image, label, high, low)[0]
    assert not torch.allclose(one, swapped, atol=1e-3)


@pytest.mark.parametrize("tokens", [3, PLAIN_TOKENS, PLAIN_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_scaled_dot_product(tokens: int, dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 2, tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    found = attention(query, key, value)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2
    )


def test_cases_of_a_batch_do_not_mix() -> None:
    network = denoiser()
    image, label, level = torch.randn(2, 3, 4, 6, 2), torch.randn(2, 2, 4, 6, 2), torch.rand(2)
    together = network(image, label, level, level)[0]
    alone = network(image[1:], label[1:], level[1:], level[1:])[0]
    assert torch.allclose(together[1:], alone, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 6, 4), (4, 6, 3)])
def test_latents_that_do_not_split_into_patches_are_refused(shape: tuple[int, int, int]) -> None:
    config = DenoiserConfig(image_channels=2, label_channels=0, latent_shape=shape)
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        JointDenoiser(config)


def test_a_latent_of_another_shape_is_an_error() -> None:
    image, label = torch.randn(1, 3, 4, 4, 2), torch.randn(1, 2, 4, 4, 2)
    with pytest.raises(RuntimeError, match="must match"):
        denoiser()(image, label, torch.rand(1), torch.rand(1))


def test_residual_block_starts_as_the_identity() -> None:
    x = torch.randn(1, 8, 3, 3, 3)
    assert torch.equal(ResidualBlock(8, condition=4)(x, torch.randn(1, 4)), x)


def test_latent_mask_counts_any_voxel_and_its_neighbours() -> None:
    mask = torch.zeros(1, 1, 16, 16, 8)
    mask[0, 0, 5, 9, 0] = 1
    found = latent_mask(mask, (4, 4, 2))
    assert found.shape == (1, 1, 4, 4, 4)
    expected = torch.zeros_like(found)
    # The voxel lies in latent voxel (1, 2, 0).
    expected[0, 0, 0:3, 1:4, 0:2] = 1
    assert torch.equal(found, expected)
