"""What a fit shows at its end: figures on the validation cases, a montage and the training curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.datasets.volumes import CaseFiles, load_case
from diffaug.figures import montage
from diffaug.files import atomic_path
from diffaug.generators.generator import Generator
from diffaug.generators.grid import place
from diffaug.progress import Progress
from diffaug.training.loop import History
from diffaug.training.trained import Trained

# Validation cases that the figures of the verbs are measured on, at most.
MEASURED_CASES = 20
# Held-out cases without which nothing is said of what is unlike them.
FEWEST_ERRORS = 8
# Cases of the montage.
SAMPLED_CASES = 4


def validation_report(
    generator: Generator,
    validation: tuple[CaseFiles, ...],
    trained: Trained,
    folder: Path,
    private: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the generator on validation cases; returns figures for the card.

    Writes `montage.png` (sampled cases) and `curves.png` to `folder`, and to `private` a `montage.png` with
    real cases, their reconstructions and images painted from their labels beside the sampled ones.
    """
    draw_curves(trained.histories, folder / "curves.png")
    figures: dict[str, Any] = {
        "measured_on": f"{trained.evaluated} validation case{'' if trained.evaluated == 1 else 's'}",
        **trained.figures,
    }
    cases = [case for case in validation if case.label is not None or not generator.knows_labels][
        :MEASURED_CASES
    ]
    agreement, errors = [], []
    shown: list[tuple[str, Tensor, Tensor | None]] = []
    with progress.task("measuring", total=len(cases)) as task:
        for case in cases:
            loaded = load_case(case)
            image = torch.from_numpy(loaded.image)[None]
            label = None if loaded.label is None else torch.from_numpy(loaded.label)[None]
            if generator.card.extent == "patch":
                image, label = _middle(generator, image, label, loaded.affine)
            box = _label_box(label)
            if label is not None and generator.knows_labels and not bool(label.any()):
                task.advance()
                continue  # nothing to paint, to segment or to lay a box around
            if box is not None or _covered(generator, image, loaded.affine):
                errors += generator.reconstruction_error(image, loaded.affine, box=box)
            if label is not None and "segment" in generator.verbs:
                found = generator.segment(image, loaded.affine, box=box)
                agreement.append(_dice(found, label))
            if (n := sum(title == "real" for title, *_ in shown)) < 2:
                plain = {"strength": 0.0, "residual": False, "box": box}
                if _covered(generator, image, loaded.affine):
                    rebuilt = generator.vary(image, label, loaded.affine, allow_label_drift=True, **plain)
                    shown += [
                        ("real", image[0], _first(label)),
                        ("reconstruction", rebuilt[0], _first(label)),
                    ]
                else:
                    shown.append(("real", image[0], _first(label)))
                if label is not None and "paint" in generator.verbs:
                    painted = generator.paint(label, loaded.affine, box=box, seed=n)
                    shown.append(("painted from the label", painted[0], label[0]))
            task.advance()
    if agreement:
        figures["segment_dice"] = round(float(np.mean(agreement)), 4)
    if len(errors) >= FEWEST_ERRORS:
        figures["reconstruction_error"] = {
            "median": round(float(np.median(errors)), 4),
            "largest": round(max(errors), 4),
            "unlike_above": unlike_above(errors),
        }
    sampled: list[tuple[str, Tensor, Tensor | None]] = []
    with progress.task("sampling", total=SAMPLED_CASES) as task:
        for seed in range(SAMPLED_CASES):
            made = generator.sample(1, seed=seed)
            sampled.append(("sampled", made.image[0], made.label[0] if generator.knows_labels else None))
            task.advance()
    for rows, path in ((sampled, folder / "montage.png"), (shown + sampled[:3], private / "montage.png")):
        montage(
            [image.numpy() for _, image, _ in rows],
            [None if label is None else label.numpy() for _, _, label in rows],
            [title for title, _, _ in rows],
            path,
            names=generator.card.labels,
        )
    return figures


def unlike_above(errors: Sequence[float]) -> float:
    """The reconstruction error beyond which an image is unlike the training data: four standard deviations
    above the mean of held-out cases, on a logarithmic scale.

    For 20 held-out hippocampi of 0.066 to 0.108 that is 0.161; white noise has 0.36.
    """
    logs = np.log(np.maximum(errors, 1e-6))
    return round(float(np.exp(logs.mean() + 4 * logs.std(ddof=1))), 4)


def draw_curves(histories: dict[str, History], path: Path) -> None:
    """Training and validation loss of both stages over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(histories), 3.5), layout="constrained")
    axes = figure.subplots(1, len(histories), squeeze=False)[0]
    for ax, (stage, history) in zip(axes, histories.items(), strict=True):
        steps = [entry["step"] for entry in history]
        ax.plot(steps, [entry["training_loss"] for entry in history], color="0.7", label="training")
        ax.plot(steps, [entry["loss"] for entry in history], label="validation")
        ax.set(title=stage, xlabel="step", ylabel="loss")
        ax.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _middle(
    generator: Generator, image: Tensor, label: Tensor | None, affine: np.ndarray
) -> tuple[Tensor, Tensor | None]:
    """The middle of a volume, as large as one patch."""
    i, j, k = ((n // 2, n // 2 + 1) for n in image.shape[2:])
    placement = place(generator.grid, image.shape[2:], affine, box=(i, j, k))
    window = placement.window()
    image = placement.restore(placement.take(image, window))
    return image, None if label is None else placement.restore(placement.take(label, window))


def _dice(found: Tensor, truth: Tensor) -> float:
    """Mean Dice over the labels present in `truth`."""
    values = [int(v) for v in torch.unique(truth) if v != 0]
    scores = [
        float(2 * ((found == v) & (truth == v)).sum() / ((found == v).sum() + (truth == v).sum()))
        for v in values
    ]
    return float(np.mean(scores)) if scores else float("nan")


def _label_box(label: Tensor | None) -> Any:
    if label is None or not bool(label.any()):
        return None
    found = label[0, 0].nonzero()
    low, high = found.amin(dim=0).tolist(), (found.amax(dim=0) + 1).tolist()
    return tuple(zip(low, high, strict=True))


def _covered(generator: Generator, image: Tensor, affine: np.ndarray) -> bool:
    """Whether the grid covers the whole volume, so that a plain decode of all of it exists."""
    try:
        placement = place(generator.grid, image.shape[2:], affine)
    except ValueError:
        return False
    return all(
        stop - start == n for (start, stop), n in zip(placement.window(), placement.source_shape, strict=True)
    )


def _first(label: Tensor | None) -> Tensor | None:
    return None if label is None else label[0]
