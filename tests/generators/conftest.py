"""A small Medical Diffusion generator with random weights."""

from collections.abc import Callable

import pytest
import torch

from diffaug.generators.card import Card, CardGrid, Defaults, Training
from diffaug.generators.factorised_unet import UNetConfig
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.medical_diffusion import MedicalDiffusion
from diffaug.generators.networks import VERBS, MedicalDiffusionNetworks
from diffaug.generators.vqgan import VQGANConfig

GRID = (14, 20, 12)


@pytest.fixture
def medical_generator() -> Callable[..., Generator]:
    """A maker of generators of 14 x 20 x 12 voxels of 2 mm; arguments change the networks."""

    def make(masked: bool = False, **changes: object) -> Generator:
        networks = MedicalDiffusionNetworks(
            **{
                "autoencoder": VQGANConfig(
                    hidden=4, groups=4, downsampling=(2, 4, 2), latent_channels=3, codes=24
                ),
                "denoiser": UNetConfig(
                    channels=7 if masked else 3, out_channels=3, dim=8, dim_mults=(1, 2), heads=2, head_dim=4
                ),
                "shape": GRID,
                "axes": (2, 0, 1),
                "steps": 12,
                "latent_range": (-2.0, 2.5),
            }
            | changes
        )
        card = Card(
            name="seed",
            description="random weights",
            architecture="medical-diffusion",
            networks=networks,
            grid=CardGrid(orientation=("R", "A", "S"), spacing=(2, 2, 2), shape=GRID),
            extent="object",
            channels=["MR"],
            intensity=IntensityConvention(kind="percentile", low=0, high=100, clip=1, typical=[(0, 1000)]),
            labels={},
            verbs=[verb for verb in VERBS if verb in networks.verbs],
            defaults=Defaults(sampler="ancestral", steps=12, shift=1, sample_guidance=1),
            training=Training(
                dataset="none", cases={}, patients=None, autoencoder_steps=0, denoiser_steps=0, seconds=None
            ),
            licence="CC0-1.0",
            files={"autoencoder.safetensors": "0" * 64, "denoiser.safetensors": "0" * 64},
        )
        torch.manual_seed(0)
        return Generator(card, MedicalDiffusion(networks))

    return make
