"""The training of the joint denoiser on cached latents."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffaug.generators.joint_flow.denoiser import JointDenoiser
from diffaug.generators.samplers import add_noise
from diffaug.generators.seeds import case_seed
from diffaug.progress import Progress
from diffaug.training.cases import Canvases
from diffaug.training.joint_flow.autoencoder import Autoencoders, one_hot
from diffaug.training.joint_flow.plan import JointFlowPlan
from diffaug.training.latents import batches, cache_latents
from diffaug.training.loop import AveragedTrainer, History, run_loop

# What the denoiser is asked for, and how often. "joint": both at one level (sample). "paint": label clean.
# "segment": image clean. "label": image at pure noise, so the label alone is modelled. "image": label at pure
# noise, for guidance and for cases without a label. "independent": any two levels.
TASKS = {"joint": 0.40, "paint": 0.25, "segment": 0.10, "label": 0.05, "image": 0.08, "independent": 0.12}

# Share of a batch that labelled cases have at least: of 8 among 144 a fair draw would show one in 18, and
# what joins images and label maps would hardly be learned.
LABELLED_SHARE = 0.5


@torch.no_grad()
def encode_cases(
    networks: Autoencoders,
    plan: JointFlowPlan,
    images: np.ndarray,
    labels: np.ndarray,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Grid volumes `(B, C, I, J, K)` and label indices `(B, I, J, K)` to float16 latents on the CPU."""
    with accelerator.autocast():
        image = networks.image.encode(torch.from_numpy(images).to(accelerator.device))
        if networks.label is None:
            label = image[:, :0]
        else:
            label = networks.label.encode(one_hot(labels, len(plan.labels)).to(accelerator.device))
    return image.half().cpu(), label.half().cpu()


def draw_cases(labelled: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices `(count,)` of random cases; where only some are `labelled` `(N,)`, half of the draws are of
    these, unless they are more."""
    known, others = labelled.nonzero()[:, 0], (~labelled).nonzero()[:, 0]
    if not 0 < len(known) < LABELLED_SHARE * len(labelled):
        return torch.randint(len(labelled), (count,), generator=generator)
    return torch.where(
        torch.rand(count, generator=generator) < LABELLED_SHARE,
        known[torch.randint(len(known), (count,), generator=generator)],
        others[torch.randint(len(others), (count,), generator=generator)],
    )


def draw_levels(count: int, labelled: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels `(B,)` of image and label for a batch: a task for each case, then its levels.

    Image levels are logit-normal (Esser et al. 2024); a fifth is uniform, so that no level is rare. Label
    levels of their own lean to high noise: what a label map says survives until very high noise.
    """
    names = list(TASKS)
    weights = torch.tensor([TASKS[n] for n in names])
    task = torch.multinomial(weights, count, replacement=True, generator=generator)
    normal = torch.randn(3, count, generator=generator)
    uniform = torch.rand(3, count, generator=generator)
    level = torch.where(uniform[0] < 0.2, uniform[1], torch.sigmoid(normal[0] + 0.2))
    label_level = torch.where(uniform[0] < 0.2, uniform[2], torch.sigmoid(normal[1] + 1.0))
    task = torch.where(labelled, task, names.index("image"))

    image, label = level.clone(), label_level.clone()
    is_task = {n: task == k for k, n in enumerate(names)}
    label = torch.where(is_task["joint"], level, label)
    label = torch.where(is_task["paint"], torch.zeros(()), label)
    image = torch.where(is_task["segment"], torch.zeros(()), image)
    image = torch.where(is_task["label"], torch.ones(()), image)
    label = torch.where(is_task["image"], torch.ones(()), label)
    return image, label


def velocity_losses(
    module: nn.Module,
    image: Tensor,
    label: Tensor,
    image_level: Tensor,
    label_level: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Mean squared velocity error of each modality, over the cases in which it is neither clean nor pure
    noise."""
    image_noise = torch.randn(image.shape, generator=generator).to(image.device)
    label_noise = torch.randn(label.shape, generator=generator).to(label.device)
    image_velocity, label_velocity = module(
        add_noise(image, image_noise, image_level),
        add_noise(label, label_noise, label_level),
        image_level,
        label_level,
    )
    losses = {}
    for name, velocity, clean, noise, level in (
        ("image", image_velocity, image, image_noise, image_level),
        ("label", label_velocity, label, label_noise, label_level),
    ):
        if clean.shape[1] == 0:
            continue
        asked = ((level > 0) & (level < 1)).float()
        error = (velocity - (noise - clean)).square().mean(dim=(1, 2, 3, 4))
        losses[name] = (error * asked).sum() / asked.sum().clamp(min=1)
    return losses


def train_denoiser(
    networks: Autoencoders,
    plan: JointFlowPlan,
    training: Canvases,
    validation: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    initial: dict[str, Tensor] | None = None,
) -> tuple[JointDenoiser, History]:
    """Train until the plan's iterations are done; returns the averaged network in evaluation mode."""
    settings = plan.denoiser_training
    networks.to(accelerator.device)

    def encode(volumes: np.ndarray, indices: np.ndarray) -> dict[str, Tensor]:
        image, label = encode_cases(networks, plan, volumes, indices, accelerator)
        return {"image": image, "label": label}

    latents = cache_latents(
        encode, plan, settings.rounds, training, folder / "latents", accelerator, progress
    )
    images, labels = latents["image"], latents["label"]
    labelled = torch.from_numpy(np.asarray(training.labelled))
    torch.manual_seed(plan.seed + 2)
    denoiser = JointDenoiser(plan.denoiser)
    if initial is not None:
        denoiser.load_state_dict(initial)

    def loss(module: nn.Module, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(case_seed(plan.seed + 3, step))
        rounds = torch.randint(images.shape[0], (settings.batch,), generator=generator)
        cases = draw_cases(labelled, settings.batch, generator)
        image_level, label_level = draw_levels(settings.batch, labelled[cases], generator)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        generator.manual_seed(case_seed(plan.seed + 4, step) + accelerator.process_index)
        losses = velocity_losses(
            module,
            images[rounds[mine], cases[mine]].float().to(accelerator.device),
            labels[rounds[mine], cases[mine]].float().to(accelerator.device),
            image_level[mine].to(accelerator.device),
            label_level[mine].to(accelerator.device),
            generator,
        )
        weighted = losses["image"]
        if "label" in losses:
            weighted = weighted + settings.label_weight * losses["label"]
        return losses | {"loss": weighted}

    # Cases without a label map would be scored as if they showed nothing.
    paired = bool(validation.labelled.any())
    shown = np.flatnonzero(validation.labelled) if paired else range(len(validation))
    held_out = [validation.on_grid(int(n), plan.grid.shape) for n in shown]
    pairs = [encode_cases(networks, plan, i[None], l[None], accelerator) for i, l in held_out]
    held_image = torch.cat([p[0] for p in pairs]).float()
    held_label = torch.cat([p[1] for p in pairs]).float()

    def evaluate(module: nn.Module) -> dict[str, float]:
        weight = settings.label_weight
        return validation_losses(module, held_image, held_label, weight, accelerator, paired=paired)

    trainer = AveragedTrainer(
        accelerator=accelerator,
        module=denoiser,
        loss=loss,
        evaluate=evaluate,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        decay_fraction=settings.decay_fraction,
        ema=settings.ema,
        fitted=plan.init is not None,
        snapshots={
            step: folder / "snapshots" / f"step_{step:06d}.safetensors" for step in settings.snapshot_steps
        },
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


@torch.no_grad()
def validation_losses(
    denoiser: nn.Module,
    image: Tensor,
    label: Tensor,
    label_weight: float,
    accelerator: Accelerator,
    *,
    paired: bool,
) -> dict[str, float]:
    """Velocity losses of held-out latents at fixed levels and fixed noise: for sample, paint and segment,
    and overall; where images are not `paired` with label maps, of images beside labels of pure noise."""
    paired = paired and label.shape[1] > 0
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    figures: dict[str, float] = {}
    total = 0.0
    tasks = ("sample", "paint", "segment") if paired else ("sample",)
    for task in tasks:
        sums = {"image": 0.0, "label": 0.0}
        for n, level in enumerate(levels):
            generator = torch.Generator().manual_seed(n)
            for batch in batches(len(image), 8):
                at = level.expand(len(batch)).to(accelerator.device)
                clean = torch.zeros_like(at)
                beside = at if paired else torch.ones_like(at)
                with accelerator.autocast():
                    losses = velocity_losses(
                        denoiser,
                        image[batch].to(accelerator.device),
                        label[batch].to(accelerator.device),
                        clean if task == "segment" else at,
                        clean if task == "paint" else beside,
                        generator,
                    )
                for name, value in losses.items():
                    sums[name] += float(value) * len(batch) / len(image) / len(levels)
        if task != "segment":
            figures[f"{task}_image"] = sums["image"]
            total += sums["image"]
        if task != "paint" and paired:
            figures[f"{task}_label"] = sums["label"]
            total += label_weight * sums["label"]
    return figures | {"loss": total}
