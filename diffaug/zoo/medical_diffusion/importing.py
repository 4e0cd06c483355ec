"""Checkpoint files to a generator."""

from itertools import product
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from diffaug.errors import CardError, DiffaugError
from diffaug.generators.architectures import make_model
from diffaug.generators.card import Card, CardGrid, Defaults, Training
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.medical_diffusion.model import CITATION
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.model import Model
from diffaug.generators.verbs import VERBS
from diffaug.version import __version__
from diffaug.zoo.folders import check_new, new_folder
from diffaug.zoo.medical_diffusion.architecture import (
    describe,
    infer_autoencoder,
    infer_denoiser,
    infer_steps,
    shape_of,
    stages,
)
from diffaug.zoo.medical_diffusion.choices import Choices, difftumor, problems
from diffaug.zoo.medical_diffusion.reading import (
    AutoencoderFile,
    DenoiserFile,
    State,
    read_autoencoder,
    read_denoiser,
)


def import_medical_diffusion(
    denoiser: Path | str,
    output: Path | str,
    *,
    autoencoder: Path | str | None = None,
    weights: Literal["ema", "model"] = "ema",
    preset: Literal["difftumor"] | None = None,
    name: str | None = None,
    choices: Choices | None = None,
) -> Generator:
    """Write a generator folder with the networks of checkpoints in Medical Diffusion's format.

    What inference needs is kept: the VQ-GAN without its discriminators and LPIPS, and one of the denoiser's
    two sets of weights. Nothing in the files is executed.

    Args:
        denoiser: the `.pt` file.
        output: folder of the generator; it must not exist, or be empty.
        autoencoder: the `.ckpt` file; without it the VQ-GAN is the one in the `.pt`, which says neither its
            downsampling nor its groups and padding.
        weights: which of the denoiser's weights, the averaged ones (`ema`) or the others (`model`).
        preset: whose networks they are, where that settles grid and intensities.
        name: on the card (default: the folder's name).
        choices: what the files do not say; over what they and the preset say.

    Raises:
        DiffaugError: for files that cannot be read or do not belong together, networks of another kind, and
            everything that is left to say, with the choices. Nothing is written then.
    """
    output = Path(output)
    check_new(output)
    choices = choices or Choices()
    unet = read_denoiser(Path(denoiser), weights)
    steps = infer_steps(unet)
    vqgan = _autoencoder(unet, None if autoencoder is None else Path(autoencoder), choices)
    settled = choices.over(vqgan.said)
    unet_config = infer_denoiser(unet, settled)
    masked = unet_config.channels == 2 * unet_config.out_channels + 1
    if preset is not None:
        settled = settled.over(_preset(preset, steps, masked, unet))
    _ask(settled, vqgan, hint=masked and preset is None)
    vqgan_config = infer_autoencoder(vqgan, settled)
    codes = vqgan.state["codebook.embeddings"]
    try:
        networks = MedicalDiffusionNetworks.model_validate(
            {
                "autoencoder": vqgan_config,
                "denoiser": unet_config,
                "shape": settled.shape,
                "axes": settled.axes or (2, 0, 1),
                "steps": steps,
                # As the authors' code has it: with the codes that training no longer used.
                "latent_range": (float(codes.min()), float(codes.max())),
                "clip": settled.clip is not False,
                "bfloat16": settled.bfloat16 is True,
            }
        )
        card = _card(networks, settled, vqgan, unet, weights, name or output.resolve().name)
    except ValidationError as error:
        raise CardError(
            f"what is said makes no generator of {vqgan.path} and {unet.path}: {problems(error)}"
        ) from error
    generator = Generator(card, _model(networks, vqgan.state, unet.state))
    with new_folder(output) as folder:
        generator.save(folder)
    return generator


def _preset(preset: str, steps: int, masked: bool, unet: DenoiserFile) -> Choices:
    if preset != "difftumor":
        raise DiffaugError(f"there is no preset {preset!r}; the only one is 'difftumor'")
    if not masked:
        raise CardError(
            f"{unet.path} holds none of DiffTumor's denoisers, which see a masked image and its mask beside "
            "the latent: leave the preset out"
        )
    return difftumor(steps)


def _autoencoder(unet: DenoiserFile, path: Path | None, choices: Choices) -> AutoencoderFile:
    """The VQ-GAN of the `.ckpt`, which must be the denoiser's own; without one, that in the `.pt`."""
    own = unet.autoencoder
    if path is None:
        if own is None:
            raise CardError(f"{unet.path} holds no VQ-GAN: give its .ckpt file as --autoencoder")
        return own
    file = read_autoencoder(path, choices)
    # A file of another kind is told so before its tensors are compared.
    stages(file)
    for key, tensor in own.state.items() if own else ():
        other = file.state.get(key)
        # Averaging rounds weights that never change, by up to 1e-5 of their size.
        if other is None or other.shape != tensor.shape or not torch.allclose(other, tensor, 1e-4, 1e-7):
            raise CardError(
                f"{path} is not the autoencoder that {unet.path} was trained with, so their latents do not "
                f"fit: {key} is not vqgan.{key} of the latter. Give the right one, or leave --autoencoder out"
            )
    return file


def _ask(settled: Choices, vqgan: AutoencoderFile, hint: bool) -> None:
    """Raise a CardError that lists everything that must be said and is not, with the choices."""
    most = 2 ** stages(vqgan)
    narrowest = shape_of(vqgan.state, "encoder.conv_blocks.0.down.conv.weight", 5, vqgan.path)[0]
    asked = {
        "downsampling": f"--downsampling of depth, height and width: {_factors(most)}",
        "groups": f"--groups of the normalisation: {_divisors(narrowest)}; published runs have 32",
        "padding": "--padding: replicate | constant | reflect | circular; published runs have replicate",
        "shape": "--shape I,J,K of the volumes, in voxels",
        "spacing": "--spacing I,J,K of their voxels, in mm",
        "intensity": "--window LOW,HIGH (the values, such as HU, that were -1 and 1 in training) or "
        "--percentiles LOW,HIGH (each volume's own; 0,100 is its minimum and maximum)",
    }
    lines = [text for field, text in asked.items() if getattr(settled, field) is None]
    if lines:
        also = "\nDiffTumor's networks need none of them with --preset difftumor." if hint else ""
        raise CardError(f"{vqgan.path} does not say everything; add\n  " + "\n  ".join(lines) + also)


def _factors(most: int) -> str:
    powers = [most >> n for n in range(most.bit_length())]
    triples = [",".join(map(str, t)) for t in product(powers, repeat=3) if max(t) == most]
    return " | ".join(triples)


def _divisors(width: int) -> str:
    return " | ".join(str(n) for n in range(width, 0, -1) if width % n == 0)


def _card(
    networks: MedicalDiffusionNetworks,
    settled: Choices,
    vqgan: AutoencoderFile,
    unet: DenoiserFile,
    weights: str,
    name: str,
) -> Card:
    intensity = settled.intensity
    assert intensity is not None
    assert settled.spacing is not None
    intensity = _for_each_channel(intensity, networks.channels)
    kind = "CT" if intensity.kind == "window" else "MR"
    kinds = [kind] if networks.channels == 1 else [f"{kind} {n}" for n in range(networks.channels)]
    sampler = settled.sampler or networks.samplers[0]
    task = "Inpainting" if networks.masked else "Unconditional"
    files = " and ".join(dict.fromkeys([vqgan.path.name, unet.path.name]))
    return Card(
        name=name,
        description=f"{task} latent diffusion in the format of Medical Diffusion, imported from {files} "
        f"({weights} weights): {describe(networks)}.",
        architecture="medical-diffusion",
        networks=networks,
        grid=CardGrid(
            orientation=settled.orientation or ("R", "A", "S"),
            spacing=settled.spacing,
            shape=networks.shape,
            outside=settled.outside or "mirror",
        ),
        extent=settled.extent or "object",
        channels=settled.channels or kinds,
        intensity=intensity,
        labels={},
        verbs=[verb for verb in VERBS if verb in networks.verbs],
        defaults=Defaults(
            sampler=sampler,
            # A sampler that there is not gets the card's error, not one here.
            steps=settled.steps or (networks.steps_of(sampler) if sampler in networks.samplers else 1),
            shift=1.0,
            sample_guidance=1.0,
        ),
        training=Training(
            dataset=settled.dataset or "unknown",
            cases={},
            patients=None,
            autoencoder_steps=vqgan.steps,
            denoiser_steps=unet.steps,
        ),
        licence=settled.licence or "unknown (ask who trained the networks)",
        commercial_use=settled.commercial_use,
        redistribution=settled.redistribution,
        citation=settled.citation or [CITATION],
        files={},
        versions={"diffaug": __version__, "torch": torch.__version__},
    )


def _for_each_channel(intensity: IntensityConvention, channels: int) -> IntensityConvention:
    """One pair of values stands for all channels."""
    return intensity.model_copy(
        update={
            field: pairs * channels if len(pairs := getattr(intensity, field)) == 1 else pairs
            for field in ("windows", "typical")
        }
    )


def _model(networks: MedicalDiffusionNetworks, vqgan: State, unet: State) -> Model:
    # Networks draw initial weights before they get theirs: the caller's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        model = make_model(networks)
    # The codebook counts as initialised where the state does not say so.
    model.load_state_dict(
        {f"autoencoder.{key}": tensor for key, tensor in vqgan.items()}
        | {f"denoiser.{key}": tensor for key, tensor in unet.items()}
    )
    return model
