"""What a benchmark compares: arms that differ in how the same networks are trained on the same few labels.

A YAML file:

    name: hippocampus
    generator: hippocampus-mr
    labelled: [2]
    seeds: 5
    schedule: {steps: 600}
    comparator: matched
    ceiling: all-labels
    arms:
      matched: {steps: 1200}
      variation: {steps: 1200, transforms: [{operation: variation, probability: 0.5}]}
      pairs: {pretraining: [{method: supervised, data: synthetic, steps: 600}]}
      all-labels: {labels: all, steps: 1200, seeds: 3}
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from diffaug.errors import DiffaugError
from diffaug.pretraining.stages import Method
from diffaug.segmentation.cases import Space
from diffaug.segmentation.networks import NetworkPlan
from diffaug.segmentation.training import Schedule

# Names become file names.
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TransformUse(_Part):
    """An operation in the training loop, drawn from variants that are made before.

    Attributes:
        operation: which one.
        probability: with which a variant comes in the place of a case.
        ranges: its own arguments, such as `strength: [0.3, 0.9]`.
        variants: of each labelled case.
    """

    operation: Literal["variation", "inpainting", "repaint"]
    probability: float = Field(0.5, gt=0, le=1)
    ranges: dict[str, Any] = Field(default_factory=dict)
    variants: int = Field(64, ge=1)


class Pretraining(_Part):
    """One stage of pretraining.

    Attributes:
        method: "supervised" on pairs, "masked" autoencoding of images, or "swin", that of Swin UNETR.
        data: "synthetic": sampled by the generator; "real": all training cases; or a dataset's folder.
        cases: number of synthetic ones.
        steps, learning_rate: of this stage.
    """

    method: Method
    data: str = "synthetic"
    cases: int = Field(500, ge=1)
    steps: int = Field(ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class Arm(_Part):
    """One way to train.

    Attributes:
        title: in tables; default: its name.
        labels: "few": those that its seed draws; "all": all training cases.
        steps: of training on real labels; default: the benchmark's.
        learning_rate: of these; default: the benchmark's.
        augmentation: whether there is the classical one, in pretraining, too; default: the benchmark's.
        transforms: of diffaug, on top.
        pretraining: stages that come before.
        seeds: how many; default: the benchmark's.
    """

    title: str = ""
    labels: Literal["few", "all"] = "few"
    steps: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    augmentation: bool | None = None
    transforms: list[TransformUse] = Field(default_factory=list)
    pretraining: list[Pretraining] = Field(default_factory=list)
    seeds: int | None = Field(None, ge=1)

    @field_validator("transforms")
    @classmethod
    def _probabilities(cls, uses: list[TransformUse]) -> list[TransformUse]:
        if sum(use.probability for use in uses) > 1:
            raise ValueError("the probabilities of its transforms sum to more than 1")
        return uses


class Comparison(_Part):
    """A question beside "better than the comparator?".

    Attributes:
        arm, reference: names.
        margin: of Dice, by which the arm may at most be worse ("non-inferior").
    """

    arm: str
    reference: str
    margin: float = Field(gt=0)


class Benchmark(_Part):
    """A benchmark.

    Attributes:
        name: of the benchmark.
        generator: bundled name, or folder.
        backend: "monai", or "nnunet": real nnU-Net, with its own network, space, loss and augmentation.
        network: that is trained; space: in which, by default chosen from the training cases.
        subset: of the dataset's split that is scored.
        labelled: numbers of labelled cases.
        seeds: how many; each draws its own labelled patients, initial weights and random numbers.
        schedule: of training on real labels.
        tolerance: of the surface distance, mm.
        comparator: arm that the others are compared with; ceiling: arm that none is expected to pass.
        arms: by name.
        comparisons: more questions.
    """

    name: str
    generator: str = "hippocampus-mr"
    backend: Literal["monai", "nnunet"] = "monai"
    network: NetworkPlan = NetworkPlan()
    space: Space | None = None
    subset: Literal["validation", "test"] = "test"
    labelled: list[int] = Field(min_length=1)
    seeds: int = Field(5, ge=1)
    schedule: Schedule
    tolerance: float = Field(1.0, gt=0)
    comparator: str
    ceiling: str | None = None
    arms: dict[str, Arm] = Field(min_length=1)
    comparisons: list[Comparison] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in [self.name, *self.arms]:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name: lower-case letters, digits and hyphens")
        if min(self.labelled) < 1:
            raise ValueError(f"labelled must be at least 1, got {min(self.labelled)}")
        asked = [self.comparator, *([self.ceiling] if self.ceiling else [])]
        asked += [name for comparison in self.comparisons for name in (comparison.arm, comparison.reference)]
        if unknown := sorted(set(asked) - set(self.arms)):
            raise ValueError(f"{', '.join(unknown)} is no arm; the arms are {', '.join(self.arms)}")
        if self.arms[self.comparator].labels == "all":
            raise ValueError(f"the comparator {self.comparator} must have few labels, as those beside it")
        if self.ceiling is not None and self.arms[self.ceiling].labels == "few":
            raise ValueError(f"the ceiling {self.ceiling} must have all labels")
        for comparison in self.comparisons:
            for name in (comparison.arm, comparison.reference):
                if self.arms[name].labels == "all":
                    raise ValueError(f"comparisons are between arms of few labels, not of all: {name}")
        if len(set(self.labelled)) < len(self.labelled):
            raise ValueError(f"labelled names a number twice: {self.labelled}")
        self._check_nnunet()
        return self

    def _check_nnunet(self) -> None:
        if self.backend == "nnunet" and (self.network != NetworkPlan() or self.space is not None):
            raise ValueError("nnU-Net plans network and space by itself: leave them out")
        for name, arm in self.arms.items():
            if self.backend == "nnunet" and (
                len(arm.transforms) > 1 or arm.augmentation is False or arm.learning_rate is not None
            ):
                raise ValueError(
                    f"{name}: nnU-Net draws from one bank, and has its own augmentation and learning rate: "
                    "give one transform an arm, and leave `augmentation` and `learning_rate` out"
                )

    def fine_tuning(self, arm: Arm) -> Schedule:
        """How an arm is trained on real labels."""
        own = {"steps": arm.steps, "learning_rate": arm.learning_rate, "augmentation": arm.augmentation}
        return self.schedule.model_copy(update={k: v for k, v in own.items() if v is not None})

    def stage_schedule(self, arm: Arm, stage: Pretraining) -> Schedule:
        """How a stage of an arm's pretraining is trained."""
        own = {"steps": stage.steps, "learning_rate": stage.learning_rate}
        return self.fine_tuning(arm).model_copy(update=own)

    def uses_generator(self, arm: Arm) -> bool:
        """Whether an arm needs the generator."""
        return bool(arm.transforms) or any(stage.data == "synthetic" for stage in arm.pretraining)

    def total_steps(self, arm: Arm) -> int:
        """Steps of the optimiser in all."""
        return self.fine_tuning(arm).steps + sum(stage.steps for stage in arm.pretraining)


def read_benchmark(file: Path) -> Benchmark:
    """Read a benchmark's YAML file.

    Raises:
        DiffaugError: it cannot be read, or says something that is not understood.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise DiffaugError(
                f"{file} is no benchmark: it holds {content!r:.60}, not keys such as name and arms"
            )
        return Benchmark.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DiffaugError(f"{file} cannot be read as YAML: {error}") from error
    except ValidationError as error:
        problems = "; ".join(_problem(found) for found in error.errors())
        raise DiffaugError(f"{file} is no benchmark: {problems}") from error


_PARTS: dict[str, type[BaseModel]] = {
    "arms": Arm,
    "transforms": TransformUse,
    "pretraining": Pretraining,
    "comparisons": Comparison,
    "network": NetworkPlan,
    "space": Space,
    "schedule": Schedule,
}


def _problem(found: ErrorDetails) -> str:
    """What is wrong with which key, what it holds, and which keys there are."""
    place, text = [*map(str, found["loc"])], found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        # The name of an arm is no key of the format's.
        above = place[:1] + place[2:-1] if place[0] == "arms" else place[:-1]
        part = next((_PARTS[name] for name in reversed(above) if name in _PARTS), Benchmark)
        text = f"there is no such key; there are {', '.join(part.model_fields)}"
    elif found["type"] not in ("value_error", "missing") and not isinstance(found["input"], dict):
        text += f", not {found['input']!r}"
    return f"{'.'.join(place) or 'benchmark'}: {text}"
