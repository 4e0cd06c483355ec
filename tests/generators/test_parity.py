"""Medical Diffusion here against a literal implementation of its description, with the same weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffaug.generators.generator import Generator
from diffaug.generators.medical_diffusion.vqgan import Codebook
from diffaug.generators.model import Sampling
from diffaug.generators.seeds import CaseNoise
from diffaug.training.medical_diffusion import codebook
from diffaug.zoo.medical_diffusion import Choices, import_medical_diffusion
from diffaug.zoo.medical_diffusion.choices import percentiles, window
from tests.generators import literal_medical_diffusion as literal
from tests.zoo.upstream import diffusion_state, vqgan_state, write_pt

FACTORS, GROUPS = (2, 2, 2), 4


Both = tuple[Generator, dict[str, Tensor], dict[str, Tensor]]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def imported(
    folder: Path, steps: int, clip: bool = True, **sizes: int
) -> tuple[Generator, dict[str, Tensor], dict[str, Tensor]]:
    """A generator of an upstream-layout file, and the state dicts of its VQ-GAN and its denoiser."""
    vqgan = vqgan_state()
    state = diffusion_state(vqgan, steps=steps, **sizes)
    choices = Choices(
        downsampling=FACTORS,
        groups=GROUPS,
        padding="replicate",
        denoiser_groups=4,
        clip=clip,
        shape=(16, 16, 8),
        spacing=(1, 1, 1),
        intensity=window([(-1.0, 1.0)]) if sizes else percentiles(0, 100, [(0, 1)]),
    )
    file = write_pt(folder / "model.pt", state)
    return import_medical_diffusion(file, folder / "generator", choices=choices), vqgan, state


@pytest.fixture(scope="module")
def unconditional(
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    return imported(tmp_path_factory.mktemp("unconditional"), steps=300)


@torch.no_grad()
def test_encoding_quantising_and_decoding(unconditional: Both) -> None:
    generator, vqgan, _ = unconditional
    network = generator.model.autoencoder
    x = torch.rand(2, 1, 8, 16, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = literal.encode(vqgan, x, FACTORS, GROUPS)
    assert relative(network.encode(x), z) < 1e-5
    indices, _ = literal.quantise(vqgan, z)
    assert torch.equal(network.codebook.nearest(z), indices)
    assert relative(network.decode(z), literal.decode(vqgan, z, FACTORS, GROUPS)) < 1e-5


@torch.no_grad()
def test_a_denoiser_call(unconditional: Both) -> None:
    generator, _, state = unconditional
    x = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(2))
    steps = torch.tensor([3, 299])
    assert relative(generator.model.denoiser(x, steps), literal.unet(state, x, steps, groups=4)) < 1e-5


@torch.no_grad()
def test_a_whole_seeded_run(unconditional: Both) -> None:
    generator, vqgan, state = unconditional
    noise = CaseNoise([11])
    start = noise.draw(generator.model.image_latent)
    expected = literal.ancestral(state, start, lambda: noise.draw(start.shape[1:]), groups=4)
    found, _ = generator.model.sample(CaseNoise([11]), Sampling("ancestral", steps=300))
    assert relative(found, expected) < 1e-4
    volume = literal.decode(vqgan, literal.unscale(vqgan, expected), FACTORS, GROUPS)
    assert relative(generator.model.decode_image(found), volume.permute(0, 1, 3, 4, 2)) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("steps", "sampler"), [(4, "ancestral"), (200, "ddim")])
def test_difftumors_condition_and_both_its_samplers(tmp_path: Path, steps: int, sampler: str) -> None:
    generator, vqgan, state = imported(tmp_path, steps=steps, clip=sampler == "ancestral", channels=9, out=4)
    image = torch.rand(1, 1, 16, 16, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mask = torch.zeros(1, 1, 16, 16, 8)
    mask[:, :, 5:11, 4:9, 2:6] = 1
    condition = literal.difftumor_condition(vqgan, image, mask, FACTORS, GROUPS)
    noise = CaseNoise([5])
    start = noise.draw(generator.model.image_latent)
    if sampler == "ancestral":
        expected = literal.ancestral(
            state, start, lambda: noise.draw(start.shape[1:]), cond=condition, groups=4
        )
    else:
        expected = literal.ddim(state, start, condition, steps=50, groups=4)
    found = generator.model.inpaint(
        image, mask, condition[:, :0], CaseNoise([5]), Sampling(sampler, min(steps, 50))
    )
    assert relative(found, expected) < 1e-4


def test_the_codebook_moves_alike() -> None:
    generator = torch.Generator().manual_seed(4)
    book = Codebook(12, 3)
    z = torch.randn(2, 3, 2, 3, 4, generator=generator)
    codebook.initialise(book, z, generator)
    other = {name: getattr(book, name).clone() for name in ("embeddings", "z_avg", "N")}
    for _ in range(30):
        z = torch.randn(2, 3, 2, 3, 4, generator=generator)
        indices = book.nearest(z)
        _, literal_indices, _, perplexity, other = literal.codebook_forward(other, z)
        assert torch.equal(indices, literal_indices)
        assert codebook.perplexity(indices, 12) == pytest.approx(float(perplexity), rel=1e-5)
        codebook.update(book, z, indices, generator)
        live = book.live
        assert torch.allclose(book.embeddings[live], other["embeddings"][live], rtol=1e-5)
        # Dead codes are drawn at random.
        other["embeddings"] = book.embeddings.clone()
