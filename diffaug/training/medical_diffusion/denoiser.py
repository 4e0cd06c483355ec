"""The training of the denoiser on cached latents: noise prediction, mean absolute error."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffaug.generators.diffusion import CosineSchedule
from diffaug.generators.medical_diffusion.factorised_unet import FactorisedUNet
from diffaug.generators.medical_diffusion.model import scale
from diffaug.generators.medical_diffusion.vqgan import VQGAN
from diffaug.generators.seeds import case_seed
from diffaug.progress import Progress
from diffaug.training.cases import Canvases
from diffaug.training.latents import batches, cache_latents
from diffaug.training.loop import AveragedTrainer, History, run_loop
from diffaug.training.medical_diffusion.plan import MedicalDiffusionPlan

# Share of the schedule at which held-out latents are judged.
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def encode_volumes(
    vqgan: VQGAN,
    plan: MedicalDiffusionPlan,
    latent_range: tuple[float, float],
    images: np.ndarray,
    accelerator: Accelerator,
) -> Tensor:
    """Grid volumes `(B, C, I, J, K)` to the denoiser's latents `(B, Z, d, h, w)`, float16 on the CPU."""
    volume = torch.from_numpy(images).permute(0, 1, *(2 + axis for axis in plan.axes))
    with accelerator.autocast():
        z = vqgan.encode(volume.to(accelerator.device))
    return scale(z.float(), latent_range).half().cpu()


def noise_loss(
    module: nn.Module, schedule: CosineSchedule, clean: Tensor, steps: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean absolute error of the noise that `module` finds in `clean` at diffusion steps `(B,)`."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    noisy = schedule.add_noise(clean, noise, steps)
    return (module(noisy, steps.to(clean.device)).float() - noise).abs().mean()


def train_denoiser(
    vqgan: VQGAN,
    latent_range: tuple[float, float],
    plan: MedicalDiffusionPlan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    initial: FactorisedUNet | None = None,
) -> tuple[FactorisedUNet, History]:
    """Train until the plan's iterations are done; returns the averaged network in evaluation mode."""
    settings = plan.denoiser_training
    vqgan.to(accelerator.device)
    schedule = CosineSchedule(plan.diffusion_steps)

    def encode(volumes: np.ndarray, _: np.ndarray) -> dict[str, Tensor]:
        return {"image": encode_volumes(vqgan, plan, latent_range, volumes, accelerator)}

    cached = cache_latents(
        encode, plan, settings.rounds, training, folder / "latents", accelerator, progress
    )["image"]
    grids = [validation.on_grid(n, plan.grid.shape)[0][None] for n in validation.evaluated()]
    held_out = torch.cat([encode(grid, grid)["image"] for grid in grids]).float()
    torch.manual_seed(plan.seed + 2)
    denoiser = FactorisedUNet(plan.denoiser)
    if initial is not None:
        denoiser.load_state_dict(initial.state_dict())

    def loss(module: nn.Module, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(case_seed(plan.seed + 3, step))
        rounds = torch.randint(cached.shape[0], (settings.batch,), generator=generator)
        cases = torch.randint(cached.shape[1], (settings.batch,), generator=generator)
        steps = torch.randint(schedule.steps, (settings.batch,), generator=generator)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        generator.manual_seed(case_seed(plan.seed + 4, step) + accelerator.process_index)
        clean = cached[rounds[mine], cases[mine]].float().to(accelerator.device)
        return {"loss": noise_loss(module, schedule, clean, steps[mine], generator)}

    def evaluate(module: nn.Module) -> dict[str, float]:
        figures = {}
        for n, level in enumerate(LEVELS):
            generator, total = torch.Generator().manual_seed(n), 0.0
            for batch in batches(len(held_out), 4):
                steps = torch.full((len(batch),), int(level * schedule.steps))
                clean = held_out[batch].to(accelerator.device)
                with accelerator.autocast():
                    value = noise_loss(module, schedule, clean, steps, generator)
                total += float(value) * len(batch) / len(held_out)
            figures[f"noise_{level}"] = total
        return figures | {"loss": float(np.mean(list(figures.values())))}

    trainer = AveragedTrainer(
        accelerator=accelerator,
        module=denoiser,
        loss=loss,
        evaluate=evaluate,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        decay_fraction=settings.decay_fraction,
        ema=settings.ema,
        fitted=plan.init is not None,
    )
    history = run_loop(
        trainer,
        accelerator=accelerator,
        steps=settings.steps,
        evaluate_every=plan.evaluate_every,
        checkpoint_every=plan.checkpoint_every,
        checkpoint=folder / "denoiser.pt",
        progress=progress,
        title="denoiser",
    )
    trainer.average.copy_to(denoiser)
    return denoiser.eval(), history
