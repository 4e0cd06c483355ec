"""What a pretraining does, as JSON that a resumed run is compared with."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffaug.errors import DiffaugError
from diffaug.pretraining.stages import Method
from diffaug.segmentation.cases import Space
from diffaug.segmentation.networks import NetworkPlan
from diffaug.segmentation.training import Schedule

PLAN = "plan.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DatasetSource(_Part):
    """A folder of cases, real or synthetic.

    Attributes:
        folder: absolute.
        name, licence: as it states them.
        cases: number of those that train.
        synthetic: name of the generator that made it, by its manifest, or None.
        share: of all cases that are drawn.
    """

    kind: Literal["dataset"] = "dataset"
    folder: str
    name: str
    licence: str | None
    cases: int
    synthetic: str | None
    share: float = Field(gt=0, le=1)


class GeneratorSource(_Part):
    """Cases that a generator samples while the network trains.

    Attributes:
        generator: name or folder.
        weights: their hash; licence: of what it makes.
        reuse: how often each is drawn.
        share: of all cases that are drawn.
    """

    kind: Literal["generator"] = "generator"
    generator: str
    weights: str
    licence: str
    reuse: int = Field(ge=1)
    share: float = Field(gt=0, le=1)


class Stage(_Part):
    """One method, and how long."""

    method: Method
    schedule: Schedule


class PretrainingPlan(_Part):
    """Everything that decides a pretraining.

    Attributes:
        network: that is pretrained.
        space: in which.
        channels: of the images.
        labels: class of the network -> name, 0 being background; empty where no stage needs labels.
        sources: of cases.
        stages: one after the other.
        seed: of everything random.
    """

    format: Literal[1] = 1
    network: NetworkPlan
    space: Space
    channels: int
    labels: dict[int, str]
    sources: list[DatasetSource | GeneratorSource] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(sum(source.share for source in self.sources) - 1) > 1e-6:
            raise ValueError("the shares of the sources must sum to 1")
        return self


def read_plan(file: Path) -> PretrainingPlan:
    """The plan of a pretraining.

    Raises:
        DiffaugError: it cannot be read, or is none.
    """
    try:
        return PretrainingPlan.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise DiffaugError(f"{file} is no plan of a pretraining: {error}") from error
