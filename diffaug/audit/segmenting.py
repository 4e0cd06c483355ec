"""An independent segmenter, trained on real cases, as a file; it says whether a label fits its image."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffaug.audit.volumes import on_grid
from diffaug.datasets.writing import Made
from diffaug.errors import DiffaugError
from diffaug.evaluation.overlap import dice
from diffaug.evaluation.segmenter import Segmenter, predict
from diffaug.files import atomic_path, sha256_file
from diffaug.generators.card import CardGrid
from diffaug.generators.grid import Grid, place

# Of the Dice of held-out real cases: below it a label does not fit.
LEAST_PERCENTILE = 5.0


class SegmenterRecord(BaseModel):
    """Everything in a segmenter's file but its weights: names of its labels, from 1, on which grid it works,
    and the Dice that held-out real cases reach (5th percentile)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    labels: list[str]
    channels: int
    grid: CardGrid
    least: float


def write_segmenter(
    model: Segmenter, labels: list[str], channels: int, grid: Grid, scores: NDArray[np.float64], path: Path
) -> None:
    """Keep a segmenter, with the Dice `scores` of held-out real cases."""
    record = SegmenterRecord(
        labels=labels,
        channels=channels,
        grid=CardGrid.of(grid),
        least=float(np.percentile(scores, LEAST_PERCENTILE)),
    )
    with atomic_path(path) as temporary:
        save_file(
            {name: value.contiguous().cpu() for name, value in model.state_dict().items()},
            temporary,
            {"segmenter": record.model_dump_json()},
        )


@dataclass(frozen=True)
class LabelJudge:
    """A segmenter that judges label maps.

    Attributes:
        model: the segmenter.
        grid: it works on.
        numbers: ids of the candidates' label maps, in the order of the segmenter's labels.
        least: Dice that a label needs.
        sha256: of the segmenter's file.
    """

    model: Segmenter
    grid: Grid
    numbers: tuple[int, ...]
    least: float
    sha256: str

    # Share of held-out real cases below `least`.
    real: float = LEAST_PERCENTILE / 100

    def to(self, device: torch.device) -> "LabelJudge":
        """The same, with its segmenter on a device."""
        return replace(self, model=self.model.to(device))

    def agrees(self, made: Made) -> bool:
        """Whether the mean Dice of the label map and the segmenter's own is high enough."""
        if made.label is None:
            return True
        volume = torch.from_numpy(on_grid(made.image, made.label, made.affine, self.grid))
        found = predict(self.model, volume[None].to(next(self.model.parameters()).device)).cpu()
        label = label_on_grid(made.label, made.affine, self.grid, self.numbers)[None]
        return float(torch.nanmean(dice(found, label, tuple(range(1, len(self.numbers) + 1))))) >= self.least


def label_on_grid(
    label: NDArray[np.integer], affine: NDArray[np.float64], grid: Grid, numbers: tuple[int, ...]
) -> Tensor:
    """A label map `(I, J, K)` on the grid as `(1, *grid.shape)` int16, its ids `numbers` counted from 1."""
    counted = np.zeros(label.shape, np.int16)
    for place_of, number in enumerate(numbers, start=1):
        counted[label == number] = place_of
    placement = place(grid, label.shape, affine, foreground=torch.from_numpy(label > 0))
    return placement.label_to_grid(torch.from_numpy(counted)[None, None])[0]


def read_judge(path: Path, labels: Mapping[int, str]) -> LabelJudge:
    """Read what `write_segmenter` wrote, for label maps with these ids and names.

    Raises:
        DiffaugError: no such file, it holds something else, or it knows other labels.
    """
    if not path.is_file():
        raise DiffaugError(f"{path} does not exist: diffaug audit --utility writes a segmenter")
    try:
        with safe_open(path, framework="pt") as file:
            record = SegmenterRecord.model_validate_json((file.metadata() or {})["segmenter"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = Segmenter(record.channels, len(record.labels) + 1)
        model.load_state_dict(state)
    except (SafetensorError, ValidationError, KeyError, RuntimeError) as error:
        raise DiffaugError(
            f"{path} is no segmenter, or damaged: take the one that diffaug audit --utility wrote"
        ) from error
    by_name = {name: number for number, name in labels.items()}
    lacking = [name for name in record.labels if name not in by_name]
    if lacking:
        raise DiffaugError(
            f"{path} knows the labels {', '.join(record.labels)}, the generator "
            f"{', '.join(by_name) or 'none'}: "
            "give a segmenter of these labels"
        )
    return LabelJudge(
        model.eval().requires_grad_(False),
        record.grid.to_grid(),
        tuple(by_name[name] for name in record.labels),
        record.least,
        sha256_file(path),
    )
