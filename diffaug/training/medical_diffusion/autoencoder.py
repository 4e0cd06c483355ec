"""The training of the VQ-GAN: reconstruction, commitment, and after a while its discriminators."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.generators.medical_diffusion.vqgan import VQGAN, VQGANConfig
from diffaug.generators.seeds import case_seed
from diffaug.progress import Progress
from diffaug.training.batches import AugmentedBatches
from diffaug.training.cases import Canvases
from diffaug.training.loop import History, learning_rate_factor, run_loop
from diffaug.training.medical_diffusion import codebook
from diffaug.training.medical_diffusion.discriminators import (
    Discriminators,
    adversarial,
    feature_matching,
    hinge,
)
from diffaug.training.medical_diffusion.perceptual import LPIPS, load_lpips, three_planes
from diffaug.training.medical_diffusion.plan import MedicalDiffusionPlan

BETAS = (0.5, 0.9)


class Reconstruction(nn.Module):
    """The VQ-GAN with the straight-through estimator: gradients pass the quantiser as if it were not there.

    The quantiser and the commitment loss are computed in float32 whatever the precision around them.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.vqgan = VQGAN(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Volumes `(B, C, D, H, W)` to their reconstruction, the commitment loss, latents and indices."""
        z = self.vqgan.encode(x).float()
        indices = self.vqgan.codebook.nearest(z)
        codes = self.vqgan.codebook.look_up(indices)
        commitment = F.mse_loss(z, codes)
        through = z + (codes - z).detach()
        output = self.vqgan.decode_quantised(through, x.shape[2:])
        return output.float(), commitment, z.detach(), indices


class VQGANTrainer:
    """Two optimizers: of the autoencoder, and of the discriminators."""

    def __init__(
        self,
        plan: MedicalDiffusionPlan,
        batches: AugmentedBatches,
        held_out: list[Tensor],
        accelerator: Accelerator,
        initial: VQGAN | None,
        lpips: LPIPS | None,
    ) -> None:
        settings = plan.autoencoder_training
        self.plan, self.settings = plan, settings
        self.batches, self.held_out, self.accelerator = batches, held_out, accelerator
        torch.manual_seed(plan.seed)
        self.module = Reconstruction(plan.autoencoder)
        self.discriminators = Discriminators(plan.autoencoder.channels, settings.discriminator_norm)
        if initial is not None:
            self.module.vqgan.load_state_dict(initial.state_dict())
        self.lpips = None if lpips is None else lpips.to(accelerator.device)
        self.trained, self.judges, self.optimizer, self.judge_optimizer = accelerator.prepare(
            self.module,
            self.discriminators,
            torch.optim.Adam(self.module.parameters(), lr=settings.learning_rate, betas=BETAS),
            torch.optim.Adam(self.discriminators.parameters(), lr=settings.learning_rate, betas=BETAS),
        )
        self.factor = partial(
            learning_rate_factor,
            steps=settings.steps,
            decay_fraction=settings.decay_fraction,
            fitted=plan.init is not None,
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """One step of the autoencoder, of the codebook, and of the discriminators once they take part."""
        settings, accelerator = self.settings, self.accelerator
        self.module.train()
        self.discriminators.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * self.factor(step)
        seed = case_seed(self.plan.seed, 2 * step + 1)
        shared = torch.Generator().manual_seed(seed)
        own = torch.Generator().manual_seed(seed + accelerator.process_index)
        x = self.to_network(torch.from_numpy(self.batches(step)[0]))
        book = self.module.vqgan.codebook
        with torch.no_grad(), accelerator.autocast():
            if not bool(book.initialised):
                codebook.initialise(book, self.module.vqgan.encode(x), shared)
        judged = step >= settings.discriminator_start
        slices = torch.randint(x.shape[2], (len(x),), generator=own).to(x.device)

        with accelerator.autocast():
            output, commitment, z, indices = self.trained(x)
            losses = {
                "reconstruction": F.l1_loss(output, x),
                "commitment": commitment,
            }
            total = (
                settings.reconstruction_weight * losses["reconstruction"]
                + settings.commitment_weight * commitment
            )
            if self.lpips is not None:
                losses["perceptual"] = three_planes(output, x, self.lpips, own)
                total = total + settings.perceptual_weight * losses["perceptual"]
            if judged:
                self.discriminators.requires_grad_(False)
                fake = self.discriminators(output, slices)
                with torch.no_grad():
                    real = self.discriminators(x, slices)
                losses["adversarial"] = adversarial(fake)
                losses["features"] = feature_matching(real, fake)
                total = total + losses["adversarial"] + settings.feature_weight * losses["features"]
                self.discriminators.requires_grad_(True)
        self.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(total)
        accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        codebook.update(book, z, indices, shared)
        if judged:
            losses["discriminators"] = self._judge(x, output.detach(), slices)
        return {**losses, "loss": total}

    def _judge(self, x: Tensor, output: Tensor, slices: Tensor) -> Tensor:
        with self.accelerator.autocast():
            loss = hinge(self.judges(x, slices), self.judges(output, slices))
        self.judge_optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.discriminators.parameters(), 1.0)
        self.judge_optimizer.step()
        return loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of held-out cases: the reconstruction loss, PSNR (dB, over the range -1 to 1), the perplexity of
        the codes, the share of live ones, and the share of latents that the denoiser's range clips."""
        vqgan = self.module.eval().vqgan
        low, high = vqgan.codebook.range(live_only=True)
        losses, psnr, clipped, used = [], [], [], []
        for volume in self.held_out:
            x = self.to_network(volume)
            with self.accelerator.autocast():
                output, _, z, indices = self.module(x)
            losses.append(float(F.l1_loss(output, x)))
            psnr.append(float(10 * torch.log10(4 / (output.clamp(-1, 1) - x.clamp(-1, 1)).square().mean())))
            clipped.append(float(((z < low) | (z > high)).float().mean()))
            used.append(indices.flatten())
        live = float(vqgan.codebook.live.float().mean())
        return {
            "loss": float(np.mean(losses)),
            "psnr": float(np.mean(psnr)),
            "perplexity": codebook.perplexity(torch.cat(used), vqgan.config.codes),
            "live_codes": live,
            "clipped": float(np.mean(clipped)),
        }

    def to_network(self, volume: Tensor) -> Tensor:
        """The grid's axes to depth, height, width, on the device."""
        return volume.permute(0, 1, *(2 + axis for axis in self.plan.axes)).to(self.accelerator.device)

    def state_dict(self) -> dict[str, Any]:
        """Networks, codebook and both optimizers."""
        return {
            "module": self.module.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "discriminator_optimizer": self.judge_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.discriminators.load_state_dict(state["discriminators"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.judge_optimizer.load_state_dict(state["discriminator_optimizer"])


def train_autoencoder(
    plan: MedicalDiffusionPlan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    initial: VQGAN | None = None,
    perceptual: Sequence[Path] = (),
) -> tuple[VQGAN, History]:
    """Train until the plan's iterations are done; returns the network in evaluation mode.

    Args:
        initial: a network of the same sizes to start from.
        perceptual: files with the weights of LPIPS, for a plan with that loss.
    """
    settings = plan.autoencoder_training
    batches = AugmentedBatches(
        plan, training, settings.batch, accelerator.process_index, accelerator.num_processes
    )
    held_out = [
        torch.from_numpy(validation.on_grid(n, plan.grid.shape)[0][None]) for n in validation.evaluated()
    ]
    lpips = load_lpips(perceptual) if perceptual else None
    trainer = VQGANTrainer(plan, batches, held_out, accelerator, initial, lpips)
    history = run_loop(
        trainer,
        accelerator=accelerator,
        steps=settings.steps,
        evaluate_every=plan.evaluate_every,
        checkpoint_every=plan.checkpoint_every,
        checkpoint=folder / "autoencoder.pt",
        progress=progress,
        title="autoencoder",
    )
    return trainer.module.vqgan.eval().requires_grad_(False), history
