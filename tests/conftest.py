"""Fixtures that every test may use."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffaug.generators.generator import Generator

# Tiny tensors gain nothing from many threads; parallel test workers share the cores.
_CORES = min(4, os.cpu_count() or 1)
torch.set_num_threads(max(1, _CORES // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# Of the generators that `medical_generator` makes.
MEDICAL_GRID = (14, 20, 12)


@pytest.fixture(scope="session", autouse=True)
def _zoo_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a user has pulled or registered is none of the tests' business."""
    os.environ["DIFFAUG_ZOO"] = str(tmp_path_factory.mktemp("zoo") / "home")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real scans that DIFFAUG_DATA names, Task04_Hippocampus among them; never written to."""
    folder = os.environ.get("DIFFAUG_DATA")
    if not folder:
        pytest.skip("needs real scans: set DIFFAUG_DATA to the folder that holds Task04_Hippocampus")
    if not (Path(folder) / "Task04_Hippocampus" / "dataset.json").is_file():
        pytest.fail(f"DIFFAUG_DATA={folder} holds no Task04_Hippocampus/dataset.json")
    return Path(folder)


def make_tiny_generator(seed: int = 0, channels: int = 1, labels: dict[int, str] | None = None) -> Generator:
    """A generator with random weights on a (16, 24, 16) grid at 1.5 mm: milliseconds a verb, every verb."""
    import torch

    from diffaug.generators.card import Card, CardGrid, Training
    from diffaug.generators.intensity import IntensityConvention
    from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
    from diffaug.generators.joint_flow.denoiser import DenoiserConfig
    from diffaug.generators.joint_flow.model import JointFlow
    from diffaug.generators.joint_flow.networks import JointFlowNetworks
    from diffaug.generators.verbs import VERBS

    labels = {0: "background", 1: "head", 2: "body"} if labels is None else labels
    networks = JointFlowNetworks(
        image_autoencoder=AutoencoderConfig(
            channels=channels, latent_channels=4, downsampling=(4, 4, 4), widths=(8, 16), blocks=1
        ),
        label_autoencoder=AutoencoderConfig(
            channels=len(labels), latent_channels=2, downsampling=(4, 4, 4), widths=(8, 16), blocks=1
        ),
        denoiser=DenoiserConfig(
            image_channels=4,
            label_channels=2,
            latent_shape=(4, 6, 4),
            convolution_width=8,
            width=16,
            depth=2,
            heads=2,
        ),
    )
    card = Card(
        name="tiny",
        description="Random weights, for tests.",
        networks=networks,
        grid=CardGrid(orientation=("R", "A", "S"), spacing=(1.5, 1.5, 1.5), shape=(16, 24, 16)),
        extent="object",
        channels=[f"channel {n}" for n in range(channels)],
        intensity=IntensityConvention(kind="percentile", typical=[(0.0, 1000.0)] * channels),
        labels=labels,
        label_volumes={label: (100.0, 5000.0) for label in labels if label},
        verbs=list(VERBS),
        training=Training(dataset="none", cases={}, patients=None, autoencoder_steps=0, denoiser_steps=0),
        licence="CC0-1.0",
        files={"joint_flow.safetensors": "0" * 64},
    )
    model = JointFlow(networks)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return Generator(card, model)


@pytest.fixture(scope="session")
def tiny_generator() -> Generator:
    """See `make_tiny_generator`."""
    return make_tiny_generator()


@pytest.fixture(scope="session")
def tiny_generator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny generator saved as a folder."""
    folder = tmp_path_factory.mktemp("generators") / "tiny"
    make_tiny_generator().save(folder)
    return folder


@pytest.fixture
def medical_generator() -> Callable[..., Generator]:
    """A maker of Medical Diffusion generators with random weights on a (14, 20, 12) grid at 2 mm, without
    labels; arguments change the networks."""
    from diffaug.generators.card import Card, CardGrid, Defaults, Training
    from diffaug.generators.intensity import IntensityConvention
    from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
    from diffaug.generators.medical_diffusion.model import MedicalDiffusion
    from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
    from diffaug.generators.medical_diffusion.vqgan import VQGANConfig
    from diffaug.generators.verbs import VERBS

    def make(masked: bool = False, **changes: object) -> Generator:
        networks = MedicalDiffusionNetworks(
            **{
                "autoencoder": VQGANConfig(
                    hidden=4, groups=4, downsampling=(2, 4, 2), latent_channels=3, codes=24
                ),
                "denoiser": UNetConfig(
                    channels=7 if masked else 3, out_channels=3, dim=8, dim_mults=(1, 2), heads=2, head_dim=4
                ),
                "shape": MEDICAL_GRID,
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
            grid=CardGrid(orientation=("R", "A", "S"), spacing=(2, 2, 2), shape=MEDICAL_GRID),
            extent="object",
            channels=["MR"],
            intensity=IntensityConvention(kind="percentile", low=0, high=100, clip=1, typical=[(0, 1000)]),
            labels={},
            verbs=[verb for verb in VERBS if verb in networks.verbs],
            defaults=Defaults(sampler=networks.samplers[0], steps=12, shift=1, sample_guidance=1),
            training=Training(
                dataset="none", cases={}, patients=None, autoencoder_steps=0, denoiser_steps=0, seconds=None
            ),
            licence="CC0-1.0",
            files={"autoencoder.safetensors": "0" * 64, "denoiser.safetensors": "0" * 64},
        )
        torch.manual_seed(0)
        return Generator(card, MedicalDiffusion(networks))

    return make
