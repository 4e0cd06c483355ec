"""The contrastive encoders of an audit, each trained once and kept."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffaug.audit.volumes import CaseSet
from diffaug.evaluation.embedding import SIZE, Embedder, fit_embedder
from diffaug.files import atomic_path
from diffaug.progress import Progress

STEPS = 800
# Changes where an encoder that was kept would no longer be trained the same way.
FORMAT = 2


def trained_encoder(
    training: CaseSet,
    folder: Path,
    steps: int,
    device: str,
    progress: Progress,
    held_out: CaseSet | None = None,
) -> Embedder:
    """An encoder trained on real cases, or the one that an earlier audit kept in `folder`.

    Args:
        training: the training cases.
        folder: where it is kept.
        steps: gradient steps.
        device: such as "cpu" or "cuda".
        progress: where to show it.
        held_out: trained on, too. Cases that an encoder has seen lie apart from each other, so one that has
            seen one side alone takes samples for nearer to the other.
    """
    sides = [training] if held_out is None else [training, held_out]
    patients = [(number, patient) for number, side in enumerate(sides) for patient in side.patients]
    identity = f"{FORMAT} {SIZE} {steps} {[side.files for side in sides]} {patients}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    file = folder / f"encoder-{key}.safetensors"

    def cases(rows: Sequence[int]) -> torch.Tensor:
        count = len(training)
        volumes = [
            training.batch([row]) if row < count or held_out is None else held_out.batch([row - count])
            for row in rows
        ]
        return torch.cat(volumes).to(device)

    if not file.exists():
        title = "training the encoder" + ("" if held_out is None else " of both sides")
        done = 0
        with progress.task(title, total=steps) as task:

            def show(step: int, loss: float) -> None:
                nonlocal done
                task.advance(step - done, loss=loss)
                done = step

            model = fit_embedder(
                cases,
                patients,
                steps=steps,
                seed=0,
                checkpoint=file.with_suffix(".training"),
                on_step=show,
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
