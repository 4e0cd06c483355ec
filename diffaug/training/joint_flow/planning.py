"""From a fingerprint, the machine and a time budget to a joint-flow plan."""

import math

import torch
from accelerate import Accelerator

from diffaug.errors import DiffaugError
from diffaug.generators.card import Card
from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import DenoiserConfig, JointDenoiser
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.training.augmentation import AugmentationConfig
from diffaug.training.cases import places_per_case
from diffaug.training.joint_flow.autoencoder import Autoencoders, image_loss, label_loss
from diffaug.training.joint_flow.plan import AutoencoderTraining, DenoiserTraining, JointFlowPlan
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

# Shares of the time budget; the rest goes to reading and the report.
AUTOENCODER_SHARE = 0.15
CACHE_SHARE = 0.07
DENOISER_SHARE = 0.75
# Cases in a batch, where memory allows; at least one a process.
AUTOENCODER_BATCH = 8
DENOISER_BATCH = 32
# Augmented volumes in the latent cache at most, all rounds together.
CACHED_LATENTS = 9216
# Augmenting and encoding a volume, relative to training the autoencoders on it (measured: 45 to 100 ms).
ENCODING_COST = 0.5
# Transformer tokens that two cores still sample in half a second.
MOST_TOKENS = 1024
# Peak bytes of autoencoder training per voxel of a batch, with a margin (measured: 2.1 GB for 8 volumes of
# 40 x 56 x 40).
BYTES_PER_VOXEL = 4000


def make_plan(request: Request, accelerator: Accelerator) -> JointFlowPlan:
    """Choose grid, networks, batches and iterations.

    Raises:
        DiffaugError: for a dataset or budget that no plan fits.
    """
    fingerprint, channels, labels = request.fingerprint, request.channels, request.labels
    budget, init = request.budget, request.init
    if init is not None:
        card = init.card
        networks = card.networks
        if not isinstance(networks, JointFlowNetworks):
            raise DiffaugError(f"cannot start from {card.name}: it is a {card.architecture} generator")
        _check_init(card, channels, labels)
        grid = GridPlan(**card.grid.model_dump())
        intensity = card.intensity
        image, label = networks.image_autoencoder, networks.label_autoencoder
        denoiser = networks.denoiser
    else:
        intensity = plan_intensity(fingerprint, channels)
        spacing = fingerprint.spacing_median
        downsampling = plan_downsampling(spacing)
        patch = (2, 2, 2)
        grid = plan_grid(
            fingerprint, tuple(d * p for d, p in zip(downsampling, patch, strict=True)), extent=request.extent
        )
        while (
            math.prod(n // (d * p) for n, d, p in zip(grid.shape, downsampling, patch, strict=True))
            > MOST_TOKENS
        ):
            downsampling = tuple(2 * d for d in downsampling)
            grid = plan_grid(
                fingerprint,
                tuple(d * p for d, p in zip(downsampling, patch, strict=True)),
                extent=request.extent,
            )
        image, label = plan_autoencoders(downsampling, len(channels), len(labels))
        denoiser = DenoiserConfig(
            image_channels=image.latent_channels,
            label_channels=label.latent_channels if label else 0,
            latent_shape=tuple(n // d for n, d in zip(grid.shape, downsampling, strict=True)),
            patch=patch,
        )
    voxels = math.prod(grid.shape)
    affordable = int(0.4 * available_memory(accelerator) / (voxels * BYTES_PER_VOXEL))
    processes = accelerator.num_processes
    batch = shared_evenly(AUTOENCODER_BATCH, affordable, processes)
    extent = request.extent if init is None else init.card.extent
    canvases = fingerprint.cases * (places_per_case(fingerprint.cases) if extent == "patch" else 1)
    draft = JointFlowPlan(
        name=request.name,
        grid=grid,
        extent=extent,
        channels=list(channels),
        labels=labels,
        intensity=intensity,
        image_autoencoder=image,
        label_autoencoder=label,
        denoiser=denoiser,
        augmentation=AugmentationConfig(mirror_axes=request.mirror_axes or ()),
        autoencoder_training=AutoencoderTraining(steps=1, batch=batch),
        denoiser_training=DenoiserTraining(
            steps=1, rounds=1, batch=shared_evenly(DENOISER_BATCH, DENOISER_BATCH, processes)
        ),
        seed=request.seed,
        budget=budget,
        init=init.weights_hash if init is not None else None,
    )
    autoencoder_seconds, denoiser_seconds = time_steps(draft, accelerator)
    autoencoder_steps = int(AUTOENCODER_SHARE * budget / autoencoder_seconds)
    denoiser_steps = int(DENOISER_SHARE * budget / denoiser_seconds)
    round_seconds = canvases * ENCODING_COST * autoencoder_seconds / (batch // processes)
    affordable = int(CACHE_SHARE * budget / round_seconds)
    rounds = max(1, min(affordable, 64, math.ceil(CACHED_LATENTS / canvases)))
    if min(autoencoder_steps, denoiser_steps) < 1:
        raise too_small(request, accelerator, autoencoders=autoencoder_seconds, denoiser=denoiser_seconds)
    return draft.model_copy(
        update={
            "autoencoder_training": draft.autoencoder_training.model_copy(
                update={"steps": autoencoder_steps}
            ),
            "denoiser_training": draft.denoiser_training.model_copy(
                update={"steps": denoiser_steps, "rounds": rounds}
            ),
            "evaluate_every": max(1, min(200, denoiser_steps // 20)),
        }
    )


def plan_downsampling(spacing: list[float]) -> tuple[int, ...]:
    """4 along the finest axes, less along coarse ones, so that a latent voxel is nearly a cube."""
    finest = min(spacing)
    return tuple(4 if s < 1.5 * finest else 2 if s < 3 * finest else 1 for s in spacing)


def plan_autoencoders(
    downsampling: tuple[int, ...], channels: int, labels: int
) -> tuple[AutoencoderConfig, AutoencoderConfig | None]:
    """Latents of image and label together hold at most 1/8 as many numbers as the grid has voxels."""
    total = max(2, min(16, math.prod(downsampling) // 8))
    label_channels = 0 if labels == 0 else max(1, min(3 if labels <= 4 else 6, total * 3 // 8))
    levels = max(int(math.log2(d)) for d in downsampling)
    image = AutoencoderConfig(
        channels=channels,
        latent_channels=total - label_channels,
        downsampling=downsampling,
        widths=(48, 96, 128, 128)[:levels],
    )
    if labels == 0:
        return image, None
    label = AutoencoderConfig(
        channels=labels,
        latent_channels=label_channels,
        downsampling=downsampling,
        widths=(32, 48, 64, 64)[:levels],
        blocks=1,
    )
    return image, label


def time_steps(plan: JointFlowPlan, accelerator: Accelerator) -> tuple[float, float]:
    """Seconds of one training step of the autoencoders and of the denoiser, measured here."""
    device = accelerator.device
    autoencoders = Autoencoders(plan).to(device)
    # What one process has of a batch.
    batch = plan.autoencoder_training.batch // accelerator.num_processes
    image = torch.randn(batch, len(plan.channels), *plan.grid.shape, device=device)
    truth = torch.zeros(batch, max(len(plan.labels), 1), *plan.grid.shape, device=device)
    truth[:, 0] = 1

    def autoencoder_step() -> None:
        with accelerator.autocast():
            output, logits = autoencoders(image, truth, torch.Generator())
            loss = image_loss(output, image, 0.5)
            if logits is not None:
                loss = loss + label_loss(logits, truth)
        loss.backward()

    denoiser = JointDenoiser(plan.denoiser).to(device)
    count, config = plan.denoiser_training.batch // accelerator.num_processes, plan.denoiser
    latent = torch.randn(count, config.image_channels, *config.latent_shape, device=device)
    label = torch.randn(count, config.label_channels, *config.latent_shape, device=device)
    levels = torch.rand(count, device=device)

    def denoiser_step() -> None:
        with accelerator.autocast():
            velocities = denoiser(latent, label, levels, levels)
            loss = torch.stack([v.square().sum() for v in velocities]).sum()
        loss.backward()

    return seconds_of(autoencoder_step, device), seconds_of(denoiser_step, device)


def _check_init(init: Card, channels: tuple[str, ...], labels: dict[int, str]) -> None:
    if len(init.channels) != len(channels) or set(init.labels) != set(labels):
        raise DiffaugError(
            f"cannot start from {init.name}: it has channels {init.channels} and labels {init.labels}, the "
            f"dataset has {list(channels)} and {labels}"
        )
