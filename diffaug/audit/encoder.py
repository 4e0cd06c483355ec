"""The contrastive encoder of an audit, trained once for a training set and kept."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffaug.audit.volumes import CaseSet
from diffaug.evaluation.embedding import SIZE, Embedder, fit_embedder
from diffaug.files import atomic_path
from diffaug.progress import Progress

STEPS = 1000
# Changes where an encoder that was kept would no longer be trained the same way.
FORMAT = 2


def trained_encoder(training: CaseSet, folder: Path, steps: int, device: str, progress: Progress) -> Embedder:
    """An encoder trained on the training cases, or the one that an earlier audit kept in `folder`."""
    key = hashlib.sha256(
        f"{FORMAT} {SIZE} {steps} {training.files} {training.patients}".encode()
    ).hexdigest()[:16]
    file = folder / f"encoder-{key}.safetensors"
    if not file.exists():
        with progress.task("training the encoder", total=steps) as task:
            model = fit_embedder(
                lambda rows: training.batch(rows).to(device),
                training.patients,
                steps=steps,
                seed=0,
                on_step=lambda _, loss: task.advance(loss=loss),
            )
        with atomic_path(file) as temporary:
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
    # As the next audit will read it.
    return load_encoder(load_file(file), training.images.shape[1]).to(device)


def load_encoder(state: dict[str, torch.Tensor], channels: int) -> Embedder:
    """An encoder from its weights, in evaluation mode."""
    model = Embedder(channels)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
