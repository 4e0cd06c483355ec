"""From a fingerprint, the machine and a time budget to a Medical Diffusion plan."""

import math

import torch
from accelerate import Accelerator

from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.medical_diffusion.factorised_unet import FactorisedUNet, UNetConfig
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.medical_diffusion.vqgan import VQGANConfig
from diffaug.training.augmentation import AugmentationConfig
from diffaug.training.fingerprint import Fingerprint
from diffaug.training.medical_diffusion.autoencoder import Reconstruction
from diffaug.training.medical_diffusion.discriminators import Discriminators, feature_matching
from diffaug.training.medical_diffusion.perceptual import LPIPS, three_planes
from diffaug.training.medical_diffusion.plan import (
    AutoencoderTraining,
    DenoiserTraining,
    MedicalDiffusionPlan,
)
from diffaug.training.medical_diffusion.presets import find_preset
from diffaug.training.plan import GridPlan
from diffaug.training.planning import (
    Request,
    available_memory,
    plan_grid,
    plan_intensity,
    seconds_of,
    shared_evenly,
    too_small,
)

# Shares of the time budget; the rest goes to reading, the latent cache and the report.
AUTOENCODER_SHARE = 0.15
CACHE_SHARE = 0.05
DENOISER_SHARE = 0.75
# Cases in a batch of the autoencoder, and of the denoiser, where memory allows; at least one a process.
AUTOENCODER_BATCH = 2
DENOISER_BATCH = 4
# Last share of the autoencoder's steps in which the discriminators take part.
JUDGED_SHARE = 0.2
# Positions of the largest published latents (32 x 32 x 32 and 8 x 64 x 64).
MOST_POSITIONS = 32768
# Latents that choose among the codes in a batch, for each code: with fewer, codes die.
LATENTS_A_CODE = 8
MOST_CODES = 16384
# Grid sizes are multiples of this, so that any of the published factors divides them.
MULTIPLE = (8, 8, 8)
# Down-samplings of the published runs.
FACTORS = (2, 4, 8)
# Augmented latents in the cache at most, all rounds together.
CACHED_LATENTS = 2304
# Peak bytes of denoiser training per latent position of a batch, with a margin (measured: 1.5 GB for 4
# latents of 20 x 32 x 24).
BYTES_PER_POSITION = 50000
# Peak bytes of a step of the autoencoder and its discriminators per voxel of a batch, with a margin
# (measured: 2.1 GB in all for 2 volumes of 64 x 64 x 64, 5.9 of 96 x 96 x 96, in bfloat16).
BYTES_PER_VOXEL = 4500
# The denoiser is evaluated this many times, the autoencoder after as many steps each.
EVALUATIONS = 12


def make_plan(request: Request, accelerator: Accelerator) -> MedicalDiffusionPlan:
    """Choose grid, networks, batches and iterations.

    Raises:
        DiffaugError: for a dataset or budget that no plan fits, a preset that is not for the dataset, or one
            beside a generator to start from.
    """
    fingerprint, channels, init = request.fingerprint, request.channels, request.init
    if request.extent == "patch":
        raise DiffaugError("generators of patches are joint-flow's: leave --extent or --architecture out")
    preset = None if request.preset is None else find_preset(request.preset)
    augmentation = AugmentationConfig()
    processes, memory = accelerator.num_processes, available_memory(accelerator)
    if init is not None and preset is not None:
        raise DiffaugError(
            f"the preset {preset.name} and {init.name}, the generator to start from, each have a grid and "
            "networks of their own: give one of them"
        )
    if init is not None:
        networks = _networks_of(init, channels)
        card = init.card
        grid = GridPlan(**card.grid.model_dump())
        intensity, axes = card.intensity, networks.axes
        autoencoder, denoiser, diffusion_steps = networks.autoencoder, networks.denoiser, networks.steps
        batch = plan_batch(grid, memory, processes)
    else:
        diffusion_steps = 300
        denoiser = UNetConfig()
        if preset is not None:
            preset.check(fingerprint, channels)
            intensity, grid = preset.intensity(fingerprint), preset.grid(fingerprint)
            factor, axes = preset.downsampling, preset.axes
            augmentation = preset.augmentation
        else:
            intensity = plan_intensity(fingerprint, channels)
            grid = fitting_grid(fingerprint, memory)
            factor = plan_factor(grid.shape)
            axes = plan_axes(grid, factor, denoiser.multiple)
        batch = plan_batch(grid, memory, processes)
        positions = math.prod(n // factor for n in grid.shape)
        autoencoder = VQGANConfig(
            channels=len(channels),
            downsampling=(factor, factor, factor),
            codes=plan_codes(positions * batch),
        )
    if request.mirror_axes is not None:
        augmentation = augmentation.model_copy(update={"mirror_axes": request.mirror_axes})
    latent = autoencoder.latent_shape([grid.shape[axis] for axis in axes])
    affordable = 0.5 * memory / (math.prod(latent) * BYTES_PER_POSITION)
    draft = MedicalDiffusionPlan(
        name=request.name,
        grid=grid,
        channels=list(channels),
        labels={},
        intensity=intensity,
        preset=request.preset,
        autoencoder=autoencoder,
        denoiser=denoiser,
        axes=axes,
        diffusion_steps=diffusion_steps,
        augmentation=augmentation,
        autoencoder_training=AutoencoderTraining(
            steps=1,
            batch=batch,
            discriminator_start=0,
            perceptual=request.perceptual,
        ),
        denoiser_training=DenoiserTraining(
            steps=1, rounds=1, batch=shared_evenly(DENOISER_BATCH, int(affordable), processes)
        ),
        seed=request.seed,
        budget=request.budget,
        init=init.weights_hash if init is not None else None,
    )
    plain, judged, denoising = time_steps(draft, accelerator)
    mean = (1 - JUDGED_SHARE) * plain + JUDGED_SHARE * judged
    autoencoder_steps = int(AUTOENCODER_SHARE * request.budget / mean)
    denoiser_steps = int(DENOISER_SHARE * request.budget / denoising)
    if min(autoencoder_steps, denoiser_steps) < 1:
        raise too_small(request, accelerator, autoencoder=mean, denoiser=denoising)
    encoding = plain / 3 / (draft.autoencoder_training.batch // processes)
    rounds = int(CACHE_SHARE * request.budget / (fingerprint.cases * encoding))
    return draft.model_copy(
        update={
            "autoencoder_training": draft.autoencoder_training.model_copy(
                update={
                    "steps": autoencoder_steps,
                    "discriminator_start": int((1 - JUDGED_SHARE) * autoencoder_steps),
                }
            ),
            "denoiser_training": draft.denoiser_training.model_copy(
                update={
                    "steps": denoiser_steps,
                    "rounds": max(1, min(rounds, math.ceil(CACHED_LATENTS / fingerprint.cases))),
                }
            ),
            "evaluate_every": max(1, math.ceil(denoiser_steps / EVALUATIONS)),
        }
    )


def fitting_grid(fingerprint: Fingerprint, memory: float) -> GridPlan:
    """The grid of the data's median spacing, or of a coarser one where a volume would have more latents than
    the largest published, or a training step on it take more than half of the memory (bytes). The finest axes
    become coarser first, a twentieth at a time."""
    most = min(MOST_POSITIONS * max(FACTORS) ** 3, 0.5 * memory / BYTES_PER_VOXEL)
    spacing = list(fingerprint.spacing_median)
    while math.prod((grid := plan_grid(fingerprint, MULTIPLE, spacing)).shape) > most:
        if math.prod(grid.shape) == math.prod(MULTIPLE):
            break
        finest = min(spacing)
        spacing = [max(s, 1.05 * finest) for s in spacing]
    return grid


def plan_batch(grid: GridPlan, memory: float, processes: int) -> int:
    """Cases in a batch of the autoencoder: two where they take half of a process's memory (bytes) at most.
    Raises DiffaugError where not one fits."""
    check_memory(grid, memory)
    return shared_evenly(
        AUTOENCODER_BATCH, int(0.5 * memory / (math.prod(grid.shape) * BYTES_PER_VOXEL)), processes
    )


def check_memory(grid: GridPlan, memory: float) -> None:
    """Raise a DiffaugError where a training step of the autoencoder on one volume does not fit a process's
    memory (bytes)."""
    needed = math.prod(grid.shape) * BYTES_PER_VOXEL
    if needed > memory:
        size = " x ".join(map(str, grid.shape))
        raise DiffaugError(
            f"a training step on one volume of {size} voxels takes about {needed / 1e9:.0f} GB, and "
            f"{memory / 1e9:.0f} GB are free here: fit on a machine with more memory, or without the plan, "
            "the preset or the generator to start from that fixes the grid"
        )


def plan_factor(shape: tuple[int, int, int]) -> int:
    """The smallest published down-sampling (2, 4 or 8) whose latent is no larger than a published one."""
    for factor in FACTORS:
        if math.prod(n // factor for n in shape) <= MOST_POSITIONS:
            return factor
    size = " x ".join(map(str, shape))
    raise DiffaugError(
        f"a grid of {size} voxels has more than {MOST_POSITIONS} latents even at a down-sampling of 8"
    )


def plan_axes(grid: GridPlan, factor: int, multiple: int) -> tuple[int, int, int]:
    """The grid's axes for depth, height and width: depth is the coarsest one; among equals, the one that
    leaves the least to pad in the plane."""

    def cost(axis: int) -> tuple[float, int, int]:
        padded = [
            n // factor if a == axis else math.ceil(n / factor / multiple) * multiple
            for a, n in enumerate(grid.shape)
        ]
        return -round(grid.spacing[axis], 1), math.prod(padded), -axis

    depth = min(range(3), key=cost)
    height, width = (axis for axis in range(3) if axis != depth)
    return depth, height, width


def plan_codes(latents: int) -> int:
    """A power of two that a batch of latents keeps alive, at most the published 16384."""
    return int(2 ** min(math.log2(MOST_CODES), max(4, math.floor(math.log2(latents / LATENTS_A_CODE)))))


def time_steps(plan: MedicalDiffusionPlan, accelerator: Accelerator) -> tuple[float, float, float]:
    """Seconds of a training step, measured here: of the autoencoder without and with discriminators, and of
    the denoiser."""
    device = accelerator.device
    shape = [plan.grid.shape[axis] for axis in plan.axes]
    autoencoder = Reconstruction(plan.autoencoder).to(device)
    discriminators = Discriminators(plan.autoencoder.channels, plan.autoencoder_training.discriminator_norm)
    discriminators.to(device)
    # What one process has of a batch.
    batch = plan.autoencoder_training.batch // accelerator.num_processes
    x = torch.randn(batch, len(plan.channels), *shape, device=device)
    slices = torch.zeros(batch, dtype=torch.long, device=device)
    # Weights decide nothing about the time.
    lpips = LPIPS().to(device) if plan.autoencoder_training.perceptual else None

    def reconstruction() -> tuple[torch.Tensor, torch.Tensor]:
        output, commitment, _, _ = autoencoder(x)
        loss = (output - x).abs().mean() + commitment
        if lpips is not None:
            loss = loss + three_planes(output, x, lpips, torch.Generator())
        return output, loss

    def plain() -> None:
        with accelerator.autocast():
            _, loss = reconstruction()
        loss.backward()

    def judged() -> None:
        with accelerator.autocast():
            output, loss = reconstruction()
            real, fake = discriminators(x, slices), discriminators(output, slices)
            loss = loss + feature_matching(real, fake)
        loss.backward()
        with accelerator.autocast():
            outputs = [*discriminators(x, slices), *discriminators(output.detach(), slices)]
            loss = torch.stack([layers[-1].float().mean() for layers in outputs]).sum()
        loss.backward()

    denoiser = FactorisedUNet(plan.denoiser).to(device)
    count = plan.denoiser_training.batch // accelerator.num_processes
    latent = torch.randn(count, plan.denoiser.channels, *plan.autoencoder.latent_shape(shape), device=device)
    steps = torch.zeros(count, dtype=torch.long, device=device)

    def denoising() -> None:
        with accelerator.autocast():
            loss = denoiser(latent, steps).abs().mean()
        loss.backward()

    return seconds_of(plain, device), seconds_of(judged, device), seconds_of(denoising, device)


def _networks_of(init: Generator, channels: tuple[str, ...]) -> MedicalDiffusionNetworks:
    networks = init.card.networks
    if not isinstance(networks, MedicalDiffusionNetworks) or networks.masked:
        raise DiffaugError(
            f"cannot start from {init.name}: it is a {init.card.architecture} generator with the verbs "
            f"{', '.join(sorted(init.verbs))}"
        )
    if networks.channels != len(channels):
        raise DiffaugError(
            f"cannot start from {init.name}: it has the channels {init.card.channels}, the dataset "
            f"{list(channels)}"
        )
    return networks
