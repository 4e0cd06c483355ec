"""The stages of a Medical Diffusion fit: VQ-GAN, latent cache, denoiser."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from diffaug.generators.card import Defaults
from diffaug.generators.medical_diffusion.model import MedicalDiffusion
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.progress import Progress
from diffaug.training.cases import Canvases
from diffaug.training.medical_diffusion.autoencoder import train_autoencoder
from diffaug.training.medical_diffusion.codebook import drop_dead
from diffaug.training.medical_diffusion.denoiser import train_denoiser
from diffaug.training.medical_diffusion.plan import MedicalDiffusionPlan
from diffaug.training.trained import Trained


def train(
    plan: MedicalDiffusionPlan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    initial: MedicalDiffusion | None,
    perceptual: Sequence[Path],
) -> Trained:
    """Train both stages, or finish what an earlier call left in `folder`."""
    vqgan, autoencoder_history = train_autoencoder(
        plan,
        training,
        validation,
        folder,
        accelerator,
        progress,
        initial=initial.autoencoder if initial else None,
        perceptual=perceptual,
    )
    if initial is not None and plan.autoencoder_training.steps == 0:
        latent_range = initial.networks.latent_range
    else:
        drop_dead(vqgan.codebook)
        latent_range = vqgan.codebook.range(live_only=True)
    denoiser, denoiser_history = train_denoiser(
        vqgan,
        latent_range,
        plan,
        training,
        validation,
        folder,
        accelerator,
        progress,
        initial=initial.denoiser if initial else None,
    )
    networks = MedicalDiffusionNetworks(
        autoencoder=plan.autoencoder,
        denoiser=plan.denoiser,
        shape=plan.grid.shape,
        axes=plan.axes,
        steps=plan.diffusion_steps,
        latent_range=latent_range,
        bfloat16=accelerator.mixed_precision == "bf16",
    )
    model = MedicalDiffusion(networks)
    model.autoencoder.load_state_dict(vqgan.state_dict())
    model.denoiser.load_state_dict(denoiser.state_dict())
    figures: dict[str, Any] = {}
    if autoencoder_history:
        last = autoencoder_history[-1]
        figures["reconstruction_psnr_db"] = round(last["psnr"], 2)
        figures |= {
            "live_codes": round(last["live_codes"], 4),
            "code_perplexity": round(last["perplexity"], 1),
            "clipped_latents": round(last["clipped"], 5),
        }
    if denoiser_history:
        figures["noise_loss"] = round(denoiser_history[-1]["loss"], 4)
    return Trained(
        networks,
        model,
        {"autoencoder": autoencoder_history, "denoiser": denoiser_history},
        len(validation.evaluated()),
        figures,
        Defaults(
            sampler="dpm-solver++",
            steps=networks.steps_of("dpm-solver++"),
            shift=1.0,
            guidance=1.0,
            sample_guidance=1.0,
        ),
    )
