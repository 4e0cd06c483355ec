"""Who is timed: each competitor's settings, and its networks with all that samples from them.

Importing this module costs nothing; a competitor's libraries are imported when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

FLAGSHIP = "hippocampus-mr"
EQUAL_STEPS = 20
LATENT_CHANNELS = 8
# Of MONAI's networks that have the seed's parameter counts to 10 and 5 %: see README.md.
MONAI_AUTOENCODER: dict[str, Any] = {
    "channels": (32, 32),
    "num_res_blocks": 1,
    "norm_num_groups": 16,
    "attention_levels": (False, False),
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
MONAI_DENOISER: dict[str, Any] = {
    "channels": (32, 64, 128),
    "num_res_blocks": 2,
    "norm_num_groups": 32,
    "attention_levels": (False, False, True),
    "num_head_channels": (0, 0, 64),
}
MONAI_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "schedule": "scaled_linear_beta",
    "beta_start": 0.0015,
    "beta_end": 0.0205,
    "clip_sample": False,
}


@dataclass(frozen=True)
class Competitor:
    """Settings of one row.

    Args:
        name: of its file.
        system: whose networks; "seed" is Medical Diffusion's.
        steps: of the sampler; None takes the card's, which the flagship alone has.
        sampler: by the name that the system has for it; None takes the card's.
        bfloat16: the seed's networks as if they were trained in it, MONAI's under bfloat16 autocast. The
            flagship chooses by itself.
        plain: the seed's convolutions as torch runs them, and so the original; `Generator` has torch take
            faster ones for single volumes in float32.
        downsampling: of the autoencoder, every axis; the flagship has its own.
        guidance: weight of the label on the image, which the flagship alone has; None takes the card's.
        batch: volumes that are drawn at once, which MONAI's inferer alone makes use of on a CPU.
        draws: number of batches that are timed.
    """

    name: str
    system: Literal["seed", "monai", "flagship"]
    steps: int | None
    sampler: str | None
    bfloat16: bool = False
    plain: bool = False
    downsampling: int | None = 2
    guidance: float | None = None
    batch: int = 1
    draws: int = 5


SEED_RECIPE = Competitor("seed-300", "seed", 300, "ancestral", plain=True, draws=3)
COMPETITORS = (
    SEED_RECIPE,
    Competitor("seed-20", "seed", EQUAL_STEPS, "dpm-solver++", plain=True),
    Competitor("seed-20-diffaug", "seed", EQUAL_STEPS, "dpm-solver++"),
    Competitor("seed-20-bfloat16", "seed", EQUAL_STEPS, "dpm-solver++", bfloat16=True),
    Competitor("seed-20-latent4", "seed", EQUAL_STEPS, "dpm-solver++", plain=True, downsampling=4),
    Competitor("monai-50", "monai", 50, "ddim"),
    Competitor("monai-50-bfloat16", "monai", 50, "ddim", bfloat16=True),
    Competitor("monai-20", "monai", EQUAL_STEPS, "ddim"),
    Competitor("monai-20-bfloat16", "monai", EQUAL_STEPS, "ddim", bfloat16=True),
    Competitor("monai-20-batch2", "monai", EQUAL_STEPS, "ddim", batch=2),
    Competitor("flagship-default", "flagship", None, None, downsampling=None, draws=10),
    Competitor("flagship-20", "flagship", EQUAL_STEPS, None, downsampling=None, draws=10),
    Competitor(
        "flagship-20-unguided", "flagship", EQUAL_STEPS, None, downsampling=None, guidance=1.0, draws=10
    ),
)


@dataclass(frozen=True)
class Contestant:
    """A competitor made: `draw(seed)` gives volumes `(batch, C, I, J, K)`.

    `sampler`, `steps` and `guidance` are those in force; the networks are there to be counted.
    """

    draw: Callable[[int], Tensor]
    denoiser: nn.Module
    autoencoders: Sequence[nn.Module]
    sampler: str
    steps: int
    guidance: float = 1.0


def make(competitor: Competitor, shape: tuple[int, int, int]) -> Contestant:
    """The competitor's networks and sampler for volumes of `shape`; the flagship has a shape of its own."""
    makers = {"seed": make_seed, "monai": make_monai, "flagship": make_flagship}
    return makers[competitor.system](competitor, shape)


def make_seed(competitor: Competitor, shape: tuple[int, int, int]) -> Contestant:
    """Medical Diffusion's networks, random weights, behind a Generator."""
    from torch import nn

    from diffaug.generators.blocks import Conv3d
    from diffaug.generators.card import Card, CardGrid, Defaults, Training
    from diffaug.generators.generator import Generator
    from diffaug.generators.intensity import IntensityConvention
    from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
    from diffaug.generators.medical_diffusion.model import MedicalDiffusion
    from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
    from diffaug.generators.medical_diffusion.vqgan import VQGANConfig

    assert competitor.downsampling is not None
    assert competitor.steps is not None
    assert competitor.sampler is not None
    factors = (competitor.downsampling,) * 3
    networks = MedicalDiffusionNetworks(
        autoencoder=VQGANConfig(downsampling=factors, latent_channels=LATENT_CHANNELS, codes=16384),
        denoiser=UNetConfig(channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, dim=32),
        shape=shape,
        steps=300,
        # The extremes of a codebook of standard normal numbers.
        latent_range=(-4.5, 4.5),
        bfloat16=competitor.bfloat16,
    )
    card = Card(
        name=competitor.name,
        description="Random weights, to be timed.",
        architecture="medical-diffusion",
        networks=networks,
        grid=CardGrid(orientation=("R", "A", "S"), spacing=(1.0, 1.0, 1.0), shape=shape),
        extent="object",
        channels=["MR"],
        intensity=IntensityConvention(kind="percentile", typical=[(0.0, 1000.0)]),
        labels={},
        verbs=["sample"],
        defaults=Defaults(sampler=competitor.sampler, steps=competitor.steps, shift=1.0, sample_guidance=1.0),
        training=Training(dataset="none", cases={}, patients=None, autoencoder_steps=0, denoiser_steps=0),
        licence="CC0-1.0",
        files={"denoiser.safetensors": "0" * 64},
    )
    model = MedicalDiffusion(networks)
    if competitor.plain:
        for module in model.modules():
            if isinstance(module, Conv3d):
                module.__class__ = nn.Conv3d
    generator = Generator(card, model)
    return Contestant(
        lambda seed: generator.sample(competitor.batch, seed=seed).image,
        model.denoiser,
        [model.autoencoder],
        competitor.sampler,
        competitor.steps,
    )


def monai_networks() -> tuple[nn.Module, nn.Module]:
    """MONAI's autoencoder and denoiser of the seed's parameter counts, random weights."""
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

    autoencoder = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=LATENT_CHANNELS, **MONAI_AUTOENCODER
    )
    denoiser = DiffusionModelUNet(
        spatial_dims=3, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, **MONAI_DENOISER
    )
    return autoencoder.eval(), denoiser.eval()


def make_monai(competitor: Competitor, shape: tuple[int, int, int]) -> Contestant:
    """MONAI's networks, random weights, with MONAI's own inferer."""
    import torch
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.schedulers import DDIMScheduler

    assert competitor.downsampling is not None
    assert competitor.steps is not None
    assert competitor.sampler is not None
    autoencoder, denoiser = monai_networks()
    scheduler = DDIMScheduler(**MONAI_SCHEDULE)
    scheduler.set_timesteps(competitor.steps)
    inferer = LatentDiffusionInferer(scheduler)
    latent = [size // competitor.downsampling for size in shape]

    if competitor.bfloat16:
        # Autocast keeps the bfloat16 copies of weights that could have a gradient, and casts others anew.
        denoiser.requires_grad_(True)

    @torch.no_grad()
    def draw(seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(competitor.batch, LATENT_CHANNELS, *latent, generator=random)
        with torch.autocast("cpu", torch.bfloat16, enabled=competitor.bfloat16):
            return inferer.sample(noise, autoencoder, denoiser, verbose=False)

    return Contestant(draw, denoiser, [autoencoder], competitor.sampler, competitor.steps)


def make_flagship(competitor: Competitor, shape: tuple[int, int, int]) -> Contestant:
    """The bundled generator, as a user loads it."""
    from diffaug.generators.joint_flow.model import JointFlow
    from diffaug.zoo import load

    generator = load(FLAGSHIP)
    assert isinstance(generator.model, JointFlow)
    sampling = generator.card.sampling("sample", competitor.steps, competitor.guidance, competitor.sampler)
    settings = {"steps": sampling.steps, "guidance": sampling.guidance, "sampler": sampling.sampler}
    autoencoders = [net for net in (generator.model.image, generator.model.label) if net is not None]
    return Contestant(
        lambda seed: generator.sample(competitor.batch, seed=seed, **settings).image,
        generator.model.denoiser,
        autoencoders,
        sampling.sampler,
        sampling.steps,
        sampling.guidance,
    )
