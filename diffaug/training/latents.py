"""The latent cache: augmented encodings of all training cases, on which a denoiser is trained."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffaug.files import atomic_path
from diffaug.generators.seeds import case_seed
from diffaug.progress import Progress
from diffaug.training.augmentation import Augmenter
from diffaug.training.cases import Canvases
from diffaug.training.plan import PlanBase

Encode = Callable[[np.ndarray, np.ndarray], dict[str, Tensor]]


def cache_latents(
    encode: Encode,
    plan: PlanBase,
    rounds: int,
    training: Canvases,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, Tensor]:
    """Latents `(rounds, N, Z, i, j, k)` float16 of every training case under `rounds` augmentations.

    One file a round is kept in `folder`.

    Args:
        encode: grid volumes `(B, C, I, J, K)` and label indices `(B, I, J, K)` to named float16 latents.
    """
    files = [folder / f"round_{r:03d}.safetensors" for r in range(rounds)]
    missing = [r for r in range(rounds) if not files[r].exists()]
    if missing and accelerator.is_main_process:
        augmenter = Augmenter(plan.augmentation, plan.grid.shape, plan.grid.spacing, plan.grid.outside)
        with progress.task("latent cache", total=rounds, completed=rounds - len(missing)) as task:
            for r in missing:
                parts = []
                for batch in batches(len(training), 8):
                    seeds = [case_seed(plan.seed + 1, r * len(training) + n) for n in batch]
                    images, labels = augmenter.draw_batch([training.case(n) for n in batch], seeds)
                    parts.append(encode(images, labels))
                latents = {name: torch.cat([p[name] for p in parts]).contiguous() for name in parts[0]}
                with atomic_path(files[r]) as temporary:
                    save_file(latents, temporary)
                task.advance()
    accelerator.wait_for_everyone()
    loaded = [load_file(file) for file in files]
    return {name: torch.stack([latents[name] for latents in loaded]) for name in loaded[0]}


def batches(count: int, size: int) -> Iterator[list[int]]:
    """Indices 0 .. count - 1 in runs of at most `size`."""
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))
