"""What the plan of a fit holds whatever the architecture: everything that decides the result."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from diffaug.generators.grid import Outside
from diffaug.generators.intensity import IntensityConvention
from diffaug.training.augmentation import AugmentationConfig


class GridPlan(BaseModel):
    """Orientation (axis codes), spacing (mm) and shape (voxels) of the generator's grid, and what it shows
    beyond the end of a scan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    orientation: tuple[str, str, str] = ("R", "A", "S")
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    outside: Outside = "mirror"


class PlanBase(BaseModel):
    """A plan without its networks. Nothing later depends on the clock: the iterations are fixed here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str
    grid: GridPlan
    extent: Literal["object", "patch"] = "object"
    channels: list[str]
    labels: dict[int, str]
    intensity: IntensityConvention
    augmentation: AugmentationConfig
    evaluate_every: int = Field(default=200, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)
    seed: int = 0
    budget: float | None = Field(default=None, description="seconds of training that were planned for")
    init: str | None = Field(default=None, description="hash of the weights that the training starts from")
