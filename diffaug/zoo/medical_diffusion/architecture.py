"""From the shapes of tensors to the networks that have them."""

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from diffaug.errors import CardError
from diffaug.generators.diffusion import CosineSchedule
from diffaug.generators.medical_diffusion.factorised_unet import FactorisedUNet, UNetConfig
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.medical_diffusion.vqgan import VQGAN, VQGANConfig
from diffaug.generators.model import misfit
from diffaug.zoo.medical_diffusion.choices import Choices, problems
from diffaug.zoo.medical_diffusion.reading import AutoencoderFile, DenoiserFile, State

# Of the U-Net's normalisation: fixed in the authors' code.
DENOISER_GROUPS = 8


def stages(file: AutoencoderFile) -> int:
    """Number of halvings along the VQ-GAN's most reduced axis."""
    count = 0
    while f"encoder.conv_blocks.{count}.down.conv.weight" in file.state:
        count += 1
    if not count:
        raise CardError(f"{file.path} holds no VQ-GAN: there is no encoder.conv_blocks.0.down.conv.weight")
    return count


def infer_autoencoder(file: AutoencoderFile, choices: Choices) -> VQGANConfig:
    """Sizes of the VQ-GAN, with the downsampling, groups and padding of `choices`, which must all be said.

    Raises:
        CardError: no such VQ-GAN has the file's tensors.
    """
    hidden, channels, *_ = shape_of(file.state, "encoder.conv_first.conv.weight", 5, file.path)
    codes, latent_channels = shape_of(file.state, "codebook.embeddings", 2, file.path)
    factors = choices.downsampling
    assert factors is not None
    if max(factors) != 2 ** stages(file):
        raise CardError(
            f"downsampling {factors} does not fit {file.path}: it halves {stages(file)} time(s), so the "
            f"largest factor is {2 ** stages(file)} (--downsampling)"
        )
    try:
        config = VQGANConfig(
            channels=channels,
            hidden=hidden,
            downsampling=factors,
            latent_channels=latent_channels,
            codes=codes,
            groups=choices.groups,
            padding=choices.padding,
        )
    except ValidationError as error:
        raise CardError(
            f"no VQ-GAN with these settings has the tensors of {file.path}: {problems(error)} "
            "(--downsampling, --groups, --padding)"
        ) from error
    expected = _expected(VQGAN, config)
    del expected["codebook.initialised"]
    _require_fit(file.state, expected, file.path, describe_autoencoder(config))
    return config


def infer_denoiser(file: DenoiserFile, choices: Choices) -> UNetConfig:
    """Sizes of the U-Net.

    Raises:
        CardError: no such U-Net has the file's tensors.
    """
    state, path = file.state, file.path
    dim, channels, _, kernel, _ = shape_of(state, "init_conv.weight", 5, path)
    _, heads = shape_of(state, "time_rel_pos_bias.relative_attention_bias.weight", 2, path)
    rows, _ = shape_of(state, "init_temporal_attn.fn.fn.fn.to_qkv.weight", 2, path)
    levels = 0
    mults = []
    while (key := f"downs.{levels}.0.block1.proj.weight") in state:
        mults.append(shape_of(state, key, 5, path)[0] // max(1, dim))
        levels += 1
    time = shape_of(state, "downs.0.0.mlp.1.weight", 2, path)[1]
    if time > 4 * dim:
        raise CardError(
            f"{path} holds a denoiser conditioned on a vector of {time - 4 * dim} numbers (its blocks see "
            f"{time} numbers, {4 * dim} of them the step's); only denoisers without one are supported"
        )
    try:
        config = UNetConfig(
            channels=channels,
            out_channels=shape_of(state, "final_conv.1.weight", 5, path)[0],
            dim=dim,
            dim_mults=tuple(mults),
            heads=heads,
            head_dim=rows // max(1, 3 * heads),
            kernel=kernel,
            groups=choices.denoiser_groups or DENOISER_GROUPS,
        )
    except ValidationError as error:
        raise CardError(
            f"no U-Net has the tensors of {path}: {problems(error)} (--denoiser-groups)"
        ) from error
    _require_fit(state, _expected(FactorisedUNet, config), path, describe_denoiser(config))
    return config


def infer_steps(file: DenoiserFile) -> int:
    """Steps of the diffusion process, T.

    Raises:
        CardError: the tables are not those of the cosine schedule.
    """
    (steps,) = shape_of(file.schedule, "betas", 1, file.path)
    expected = CosineSchedule(steps).buffers()
    _require_fit(file.schedule, expected, file.path, f"schedule of {steps} steps")
    for name, table in expected.items():
        found = file.schedule[name]
        # Powers of two of rounding, wherever it was computed; another schedule differs in the first digit.
        if not torch.allclose(found, table, rtol=1e-3, atol=1e-6):
            n = int((found - table).abs().argmax())
            raise CardError(
                f"{file.path}: {name}[{n}] is {float(found[n]):.6g}, {float(table[n]):.6g} in the cosine "
                f"schedule of {steps} steps; only that schedule is supported"
            )
    return steps


def describe_autoencoder(config: VQGANConfig) -> str:
    """The VQ-GAN in words."""
    return (
        f"VQ-GAN with {config.channels} image channel(s), {config.hidden} channels at full resolution, "
        f"downsampling {'x'.join(map(str, config.downsampling))}, {config.codes} codes of "
        f"{config.latent_channels} channels, {config.groups} groups, {config.padding} padding"
    )


def describe_denoiser(config: UNetConfig) -> str:
    """The U-Net in words."""
    return (
        f"U-Net from {config.channels} to {config.out_channels} channels, dim {config.dim} times "
        f"{', '.join(map(str, config.dim_mults))}, {config.heads} heads of {config.head_dim}, first kernel "
        f"{config.kernel}, {config.groups} groups"
    )


def describe(networks: MedicalDiffusionNetworks) -> str:
    """All networks in one line."""
    low, high = networks.latent_range
    return (
        f"{describe_autoencoder(networks.autoencoder)}; {describe_denoiser(networks.denoiser)}; cosine "
        f"schedule of {networks.steps} steps; latents scaled from {low:.4g} .. {high:.4g}"
    )


def shape_of(state: State, key: str, axes: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor with that many axes; raises a CardError where there is none."""
    if key not in state:
        raise CardError(
            f"{path} does not hold {key}, from which sizes are read, only {', '.join(sorted(state)[:5])} ..."
        )
    if state[key].ndim != axes:
        raise CardError(f"{path}: {key} has shape {tuple(state[key].shape)}; expected {axes} axes")
    return tuple(state[key].shape)


def _expected(module: type[nn.Module], config: VQGANConfig | UNetConfig) -> State:
    with torch.device("meta"):
        return dict(module(config).state_dict())


def _require_fit(state: State, expected: State, path: Path, words: str) -> None:
    if problem := misfit(state, expected):
        raise CardError(f"{path} does not fit: {problem}. By the shapes it should be a {words}")
    for key in expected:
        if not state[key].is_floating_point():
            raise CardError(f"{path}: {key} holds {state[key].dtype}, not floating-point numbers")
        if not bool(state[key].isfinite().all()):
            raise CardError(
                f"{path}: {key} holds values that are not finite: its training broke down; take an earlier "
                "checkpoint"
            )
