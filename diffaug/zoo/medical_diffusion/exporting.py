"""A generator to checkpoint files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaug.errors import CardError
from diffaug.generators.card import Card
from diffaug.generators.generator import Generator
from diffaug.generators.medical_diffusion.model import MedicalDiffusion
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.medical_diffusion.vqgan import Codebook
from diffaug.zoo.folders import new_folder
from diffaug.zoo.medical_diffusion.choices import Choices
from diffaug.zoo.medical_diffusion.reading import OWN_ENTRY, State

AUTOENCODER = "vqgan.ckpt"
DENOISER = "model-0.pt"


def export_medical_diffusion(generator: Generator, output: Path | str) -> list[str]:
    """Write `vqgan.ckpt` and `model-0.pt`, as the authors' code names and lays them out, to a new folder.

    They hold tensors and plain values only. The authors' classes expect the discriminators and LPIPS too, and
    a configuration of omegaconf, so there they load by

        cfg = OmegaConf.create(torch.load("vqgan.ckpt")["hyper_parameters"]["cfg"])
        VQGAN.load_from_checkpoint("vqgan.ckpt", cfg=cfg, strict=False)
        diffusion.load_state_dict(torch.load("model-0.pt")["ema"], strict=False)

    Returns:
        What the user should know of these files, a sentence each.

    Raises:
        DiffaugError: a generator of another architecture, one whose latent scale the layout cannot say, or an
            output that exists. Nothing is written then.
    """
    networks, model, card = generator.card.networks, generator.model, generator.card
    if not isinstance(networks, MedicalDiffusionNetworks) or not isinstance(model, MedicalDiffusion):
        raise CardError(
            f"{card.name} is a {card.architecture} generator; only those of medical-diffusion have a "
            "checkpoint in that format"
        )
    notes = [
        "They hold what inference needs: the authors' code must load them with strict=False.",
        f"Their layout has no place for grid, intensities and licence: {AUTOENCODER} carries them in the "
        f"entry {OWN_ENTRY!r}, which only diffaug reads.",
    ]
    vqgan = _cpu(model.autoencoder.state_dict())
    del vqgan["codebook.initialised"]
    replaced = _set_range(
        vqgan["codebook.embeddings"], model.autoencoder.codebook, networks.latent_range, card.name
    )
    if replaced:
        notes.append(
            f"{replaced} of the {networks.autoencoder.codes} codes, unused in training, lay outside the "
            "latent scale, which the authors' code takes from all codes: there they are copies of a used "
            "code, so latents next to them decode otherwise."
        )
    state = (
        model.process.schedule.buffers()
        | {f"denoise_fn.{key}": tensor for key, tensor in _cpu(model.denoiser.state_dict()).items()}
        | {f"vqgan.{key}": tensor for key, tensor in vqgan.items()}
    )
    with new_folder(Path(output)) as folder:
        torch.save(
            {
                "epoch": 0,
                # One for each of the two optimisers.
                "global_step": 2 * (card.training.autoencoder_steps or 0),
                "pytorch-lightning_version": "1.6.4",
                "state_dict": vqgan,
                "hparams_name": "kwargs",
                "hyper_parameters": {"cfg": _configuration(networks, card)},
                OWN_ENTRY: _own_entry(networks, card),
            },
            folder / AUTOENCODER,
        )
        torch.save(
            {"step": card.training.denoiser_steps, "model": state, "ema": state, "scaler": {}},
            folder / DENOISER,
        )
    return notes


def _cpu(state: State) -> State:
    # Copies: what is changed here must not change the generator.
    return {key: tensor.cpu().clone() for key, tensor in state.items()}


def _set_range(codes: Tensor, book: Codebook, latent_range: tuple[float, float], name: str) -> int:
    """Overwrite codes `(K, Z)` of the codebook that are dead and lie outside the range by a live one, in
    place; returns how many."""
    low, high = latent_range
    outside = ((codes < low) | (codes > high)).any(dim=1)
    unused = outside & ~book.live.cpu()
    if bool(unused.any()):
        codes[unused] = codes[int(book.N.argmax())].clone()
    found = float(codes.min()), float(codes.max())
    if found != (low, high):
        raise CardError(
            f"{name} scales its latents from {low} .. {high}, its codebook spans {found[0]} .. {found[1]}. "
            "The authors' code takes the scale from the codebook: such a generator has no checkpoint in "
            "their layout"
        )
    return int(unused.sum())


def _configuration(networks: MedicalDiffusionNetworks, card: Card) -> dict[str, Any]:
    """What the constructor of the authors' VQ-GAN reads; the settings of training are the published ones."""
    autoencoder = networks.autoencoder
    return {
        "model": {
            "embedding_dim": autoencoder.latent_channels,
            "n_codes": autoencoder.codes,
            "n_hiddens": autoencoder.hidden,
            "downsample": list(autoencoder.downsampling),
            "norm_type": "group",
            "num_groups": autoencoder.groups,
            "padding_type": autoencoder.padding,
            "no_random_restart": False,
            "restart_thres": 1.0,
            "disc_channels": 64,
            "disc_layers": 3,
            "disc_loss_type": "hinge",
            "discriminator_iter_start": 10000,
            "image_gan_weight": 1.0,
            "video_gan_weight": 1.0,
            "gan_feat_weight": 4.0,
            "perceptual_weight": 4.0,
            "l1_weight": 4.0,
            # As the authors' script leaves it there: scaled for one GPU and 2 cases a batch.
            "lr": 1.875e-5,
        },
        "dataset": {"name": card.training.dataset, "image_channels": autoencoder.channels},
    }


def _own_entry(networks: MedicalDiffusionNetworks, card: Card) -> dict[str, Any]:
    choices = Choices(
        denoiser_groups=networks.denoiser.groups,
        clip=networks.clip,
        bfloat16=networks.bfloat16,
        sampler=card.defaults.sampler,
        steps=card.defaults.steps,
        shape=networks.shape,
        spacing=card.grid.spacing,
        orientation=card.grid.orientation,
        outside=card.grid.outside,
        axes=networks.axes,
        intensity=card.intensity,
        channels=card.channels,
        extent=card.extent,
        licence=card.licence,
        citation=card.citation,
    )
    return choices.model_dump(mode="json", exclude_none=True)
