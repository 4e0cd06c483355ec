"""Training of the two autoencoders, together, on augmented volumes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffaug.generators.joint_flow.autoencoder import Autoencoder
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.seeds import case_seed
from diffaug.progress import Progress
from diffaug.training.batches import AugmentedBatches, Batch
from diffaug.training.cases import Canvases
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.latents import batches
from diffaug.training.loop import AveragedTrainer, History, run_loop


class Autoencoders(nn.Module):
    """The image autoencoder and, where labels are known, the label autoencoder."""

    def __init__(self, plan: JointFlowPlan) -> None:
        super().__init__()
        noise = plan.autoencoder_training.latent_noise
        self.image = Autoencoder(plan.image_autoencoder, noise)
        self.label = Autoencoder(plan.label_autoencoder, noise) if plan.label_autoencoder else None

    def forward(
        self, image: Tensor, one_hot: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Reconstruction of the image and logits of the label map."""
        return self.image(image, generator), None if self.label is None else self.label(one_hot, generator)


def image_loss(output: Tensor, target: Tensor, gradient_weight: float) -> Tensor:
    """Mean absolute error, plus that of the finite differences along the three axes (edges)."""
    error = output.float() - target
    loss = error.abs().mean()
    for axis in (2, 3, 4):
        loss = loss + gradient_weight / 3 * error.diff(dim=axis).abs().mean()
    return loss


def label_loss(logits: Tensor, one_hot: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice of the foreground labels."""
    logits = logits.float()
    cross_entropy = -(F.log_softmax(logits, dim=1) * one_hot).sum(dim=1).mean()
    shares = logits.softmax(dim=1)[:, 1:]
    truth = one_hot[:, 1:]
    overlap = (shares * truth).sum(dim=(0, 2, 3, 4))
    dice = (2 * overlap + 1) / (shares.sum(dim=(0, 2, 3, 4)) + truth.sum(dim=(0, 2, 3, 4)) + 1)
    return cross_entropy + 1 - dice.mean()


def one_hot(labels: NDArray[np.uint8] | Tensor, classes: int) -> Tensor:
    """Label indices `(B, I, J, K)` to one-hot float32 `(B, L, I, J, K)`."""
    return F.one_hot(torch.as_tensor(np.array(labels)).long(), classes).movedim(-1, 1).float()


def train_autoencoders(
    plan: JointFlowPlan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    initial: JointFlow | None = None,
) -> tuple[Autoencoders, History]:
    """Train until the plan's iterations are done; returns the averaged networks in evaluation mode.

    Args:
        initial: a model of the same sizes to start from.
    """
    settings = plan.autoencoder_training
    torch.manual_seed(plan.seed)
    networks = Autoencoders(plan)
    if initial is not None:
        networks.image.load_state_dict(initial.image.state_dict())
        if networks.label is not None and initial.label is not None:
            networks.label.load_state_dict(initial.label.state_dict())
    classes = max(len(plan.labels), 1)
    drawn = AugmentedBatches(
        plan, training, settings.batch, accelerator.process_index, accelerator.num_processes
    )
    held_out = [validation.on_grid(n, plan.grid.shape) for n in range(len(validation))]

    def loss(module: nn.Module, step: int) -> dict[str, Tensor]:
        images, labels = drawn(step)
        generator = torch.Generator().manual_seed(
            case_seed(plan.seed, 2 * step + 1) + accelerator.process_index
        )
        image = torch.from_numpy(images).to(accelerator.device)
        truth = one_hot(labels, classes).to(accelerator.device)
        output, logits = module(image, truth, generator)
        losses = {"image": image_loss(output, image, settings.gradient_weight)}
        if logits is not None:
            losses["label"] = label_loss(logits, truth)
        losses["loss"] = torch.stack(list(losses.values())).sum()
        return losses

    def evaluate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Autoencoders)
        return validation_figures(
            module, held_out, validation.labelled.tolist(), classes, accelerator, settings.gradient_weight
        )

    trainer = AveragedTrainer(
        accelerator=accelerator,
        module=networks,
        loss=loss,
        evaluate=evaluate,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        decay_fraction=0.5,
        ema=0.995,
        fitted=plan.init is not None,
    )
    history = run_loop(
        trainer,
        accelerator=accelerator,
        steps=settings.steps,
        evaluate_every=plan.evaluate_every,
        checkpoint_every=plan.checkpoint_every,
        checkpoint=folder / "autoencoders.pt",
        progress=progress,
        title="autoencoders",
    )
    trainer.average.copy_to(networks)
    _standardise(networks, training, plan, accelerator)
    return networks.eval(), history


@torch.no_grad()
def validation_figures(
    networks: Autoencoders,
    held_out: list[Batch],
    labelled: Sequence[bool],
    classes: int,
    accelerator: Accelerator,
    gradient_weight: float,
) -> dict[str, float]:
    """Loss, PSNR (dB, over the range -1 to 1) of images and Dice of label round trips on held-out cases, of
    those that are `labelled`."""
    losses, psnr, dice = [], [], []
    for (image, label), has_label in zip(held_out, labelled, strict=True):
        x = torch.from_numpy(image[None]).to(accelerator.device)
        truth = one_hot(label[None], classes).to(accelerator.device)
        with accelerator.autocast():
            output = networks.image.decode(networks.image.encode(x)).float()
        loss = image_loss(output, x, gradient_weight)
        psnr.append(float(10 * torch.log10(4 / (output.clamp(-1, 1) - x.clamp(-1, 1)).square().mean())))
        if networks.label is not None and has_label:
            with accelerator.autocast():
                logits = networks.label.decode(networks.label.encode(truth)).float()
            loss = loss + label_loss(logits, truth)
            found = F.one_hot(logits.argmax(dim=1), classes).movedim(-1, 1)[:, 1:].float()
            overlap = (found * truth[:, 1:]).sum(dim=(0, 2, 3, 4))
            total = (found + truth[:, 1:]).sum(dim=(0, 2, 3, 4))
            if bool(truth[:, 1:].any()):
                # A patch of nothing but background has no Dice.
                dice.append(float((2 * overlap / total.clamp(min=1))[total > 0].mean()))
        losses.append(float(loss))
    figures = {"loss": float(np.mean(losses)), "psnr": float(np.mean(psnr))}
    if dice:
        figures["label_dice"] = float(np.mean(dice))
    return figures


@torch.no_grad()
def _standardise(
    networks: Autoencoders, training: Canvases, plan: JointFlowPlan, accelerator: Accelerator
) -> None:
    """Set the latents' running mean and variance to those of the training cases, and of the label maps that
    there are, under the averaged weights."""
    norms = [m for m in networks.modules() if isinstance(m, nn.BatchNorm3d)]
    networks.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches(len(training), 8):
        images = np.stack([training.on_grid(n, plan.grid.shape)[0] for n in batch])
        networks.image.encode(torch.from_numpy(images).to(accelerator.device))
    labelled = np.flatnonzero(training.labelled)
    if networks.label is not None:
        for batch in batches(len(labelled), 8):
            labels = np.stack([training.on_grid(int(labelled[n]), plan.grid.shape)[1] for n in batch])
            networks.label.encode(one_hot(labels, len(plan.labels)).to(accelerator.device))
    networks.eval()
