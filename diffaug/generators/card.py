"""The card: JSON that describes a generator and is validated whenever one is loaded."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from diffaug.errors import CardError, DiffaugError
from diffaug.generators.grid import Grid, Outside
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.latent_diffusion.networks import LatentDiffusionNetworks
from diffaug.generators.medical_diffusion.networks import MedicalDiffusionNetworks
from diffaug.generators.model import Sampling
from diffaug.generators.verbs import Verb

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Label maps come back as int16.
LabelId = Annotated[int, Field(ge=0, le=32767)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CardGrid(_Part):
    """Orientation (axis codes), spacing (mm) and shape (voxels) of the volumes that the generator makes, and
    what it sees beyond the end of a scan."""

    orientation: tuple[str, str, str]
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    outside: Outside = "mirror"

    @field_validator("orientation")
    @classmethod
    def _one_code_per_direction(cls, codes: tuple[str, str, str]) -> tuple[str, str, str]:
        if any(sum(code in pair for code in codes) != 1 for pair in (("L", "R"), ("P", "A"), ("I", "S"))):
            raise ValueError(
                f"give one of L and R, one of P and A, one of I and S, in the axes' order; got {codes}"
            )
        return codes

    @classmethod
    def of(cls, grid: Grid) -> Self:
        """From geometry."""
        return cls(orientation=grid.orientation, spacing=grid.spacing, shape=grid.shape, outside=grid.outside)

    def to_grid(self) -> Grid:
        """The grid as geometry."""
        return Grid(self.orientation, self.spacing, self.shape, self.outside)


class Defaults(_Part):
    """What the verbs use where the caller says nothing.

    The numbers here were chosen on the validation cases of `hippocampus-mr`, by
    `benchmarks/generator_quality/choose.py`; a card of another generator may say otherwise. `sample` is not
    guided: a segmenter learned no less from such samples, they take half the time, and leaned less towards
    training scans (`benchmarks/memorisation`).
    """

    sampler: str = Field(default="adams-bashforth", description="one of those that the networks have")
    steps: int = Field(default=10, ge=1)
    shift: float = Field(default=3.0, gt=0)
    guidance: float = Field(default=1.0, ge=0)
    sample_guidance: float = Field(
        default=1.0, ge=0, description="of sample, whose label map is made along with the image"
    )
    strength: float = Field(default=0.5, ge=0, le=1)
    strength_range: tuple[float, float] = (0.2, 0.5)

    @field_validator("strength_range")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= bounds[0] <= bounds[1] <= 1:
            raise ValueError(f"needs 0 <= low <= high <= 1, got {bounds}")
        return bounds

    def guidance_of(self, verb: str) -> float:
        """The weight of the label on the image that a verb uses unasked."""
        return self.sample_guidance if verb == "sample" else self.guidance


class Training(_Part):
    """What the generator was trained on, and how. The scans are named only in the user's own sidecar."""

    dataset: str
    cases: dict[str, int] = Field(description="number of cases per subset of the split")
    patients: dict[str, int] | None = Field(
        description="number of patients per subset, where a table was given"
    )
    labelled: int | None = Field(
        default=None, ge=0, description="number of the train cases with a label map; None: all of them"
    )
    autoencoder_steps: int | None = Field(description="None where they are not known")
    denoiser_steps: int | None
    seconds: float | None = Field(default=None, description="wall-clock seconds of training, all sessions")
    hardware: str = ""
    init: str | None = Field(default=None, description="weight hash of the generator that it started from")


class AuditAnswer(_Part):
    """One question of an audit."""

    question: str
    about: Literal["privacy", "use"]
    answer: Literal["pass", "unclear", "fail"]
    found: str


class Audit(_Part):
    """What `diffaug audit` found in samples of the generator.

    Attributes:
        answer: the worst of the verdicts.
        weights: hash of the weights that made the samples; with others on the card it does not count.
        verdicts: question by question.
        samples: number of synthetic cases, and `rejection` whether copies had been refused among them.
        training: real cases that they were compared with.
        held_out: real cases of other patients.
        version: of diffaug.
    """

    answer: Literal["pass", "unclear", "fail"]
    weights: str
    verdicts: list[AuditAnswer]
    samples: int
    rejection: bool
    training: int
    held_out: int
    version: str


class Parameter(_Part):
    """Something that a generator is told, such as an age.

    Attributes:
        description: with its unit.
        default: where the caller says nothing; one of the choices, where there are any.
        low, high: range, both included.
        choices: name -> the network's number.
    """

    description: str
    default: float | str
    low: float = 0.0
    high: float = 1.0
    choices: dict[str, int] | None = None

    @model_validator(mode="after")
    def _has_default(self) -> Self:
        self.number("default", self.default)
        return self

    def number(self, name: str, value: float | str) -> float:
        """What the network is given for a value.

        Raises:
            ValueError: the value is none of the choices, or out of range.
        """
        if self.choices is not None:
            if not isinstance(value, str) or value not in self.choices:
                raise ValueError(f"{name} is one of {', '.join(self.choices)}, not {value!r}")
            return self.choices[str(value)]
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is a number, not {value!r}") from None
        if not self.low <= number <= self.high:
            raise ValueError(f"{name} lies between {self.low:g} and {self.high:g}, got {number:g}")
        return number


def _architecture_of(networks: Any) -> str:
    """Which networks a card holds: only joint-flow's have two autoencoders, only latent diffusion's a
    process."""
    found = networks if isinstance(networks, dict) else vars(networks)
    if "image_autoencoder" in found:
        return "joint-flow"
    return "latent-diffusion" if "process" in found else "medical-diffusion"


class Card(_Part):
    """Everything a user or a program needs to know about a generator."""

    format: Literal[1] = 1
    name: Name
    description: str
    architecture: Literal["joint-flow", "medical-diffusion", "latent-diffusion"] = "joint-flow"
    networks: Annotated[
        Annotated[JointFlowNetworks, Tag("joint-flow")]
        | Annotated[MedicalDiffusionNetworks, Tag("medical-diffusion")]
        | Annotated[LatentDiffusionNetworks, Tag("latent-diffusion")],
        Discriminator(_architecture_of),
    ]
    parameters: dict[str, Parameter] = Field(
        default={}, description="what the denoiser is told beside label and noise, and a user may choose"
    )
    grid: CardGrid
    extent: Literal["object", "patch"]
    channels: list[str] = Field(min_length=1)
    intensity: IntensityConvention
    labels: dict[LabelId, str]
    label_volumes: dict[LabelId, tuple[float, float]] = Field(
        default={}, description="5th and 95th percentile of each label's volume in the training cases, mm^3"
    )
    unlike_above: float | None = Field(
        default=None,
        gt=0,
        description="reconstruction error (mean absolute difference of an image and its reconstruction, "
        "network units) that no held-out case comes near: beyond it an image is unlike the training data",
    )
    verbs: list[Verb] = Field(min_length=1)
    defaults: Defaults = Defaults()
    training: Training
    licence: str = Field(description="licence of the weights and of what they make")
    commercial_use: bool | None = Field(default=None, description="whether it allows that; None: not stated")
    redistribution: bool | None = Field(default=None, description="whether it allows that; None: not stated")
    citation: list[str] = []
    files: dict[Name, Sha256] = Field(description="SHA-256 of each weight file, which lies beside the card")
    figures: dict[str, Any] = Field(
        default={}, description="measured figures, with what they were measured on"
    )
    versions: dict[str, str] = {}
    audit: Audit | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        networks, defaults = self.networks, self.defaults
        if networks.architecture != self.architecture:
            raise ValueError(
                f"the architecture is {self.architecture}, the networks are those of {networks.architecture}"
            )
        if set(self.parameters) != set(networks.parameters):
            raise ValueError(
                f"the networks are told {', '.join(networks.parameters) or 'nothing'}, the card names "
                f"{', '.join(self.parameters) or 'nothing'}"
            )
        if isinstance(networks, LatentDiffusionNetworks):
            if self.grid.spacing != networks.spacing:
                raise ValueError(f"the grid's spacing {self.grid.spacing} is not {networks.spacing}")
            if self.labels and networks.label_ids != tuple(sorted(self.labels)):
                raise ValueError("the ids of labels are not those of the networks")
        if len(self.channels) != networks.channels:
            raise ValueError(f"{len(self.channels)} channel names for {networks.channels} channels")
        if len(self.intensity.typical) != networks.channels:
            raise ValueError(
                f"intensity.typical has {len(self.intensity.typical)} entries, not {networks.channels}"
            )
        if self.grid.shape != networks.shape:
            raise ValueError(f"the grid's shape {self.grid.shape} is not the networks' {networks.shape}")
        if self.labels and 0 not in self.labels:
            raise ValueError("labels must name the background, id 0")
        if networks.classes != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels are named, the networks know {networks.classes}")
        if beyond := sorted(set(self.verbs) - networks.verbs):
            raise ValueError(f"these networks cannot {', '.join(beyond)}; they can {sorted(networks.verbs)}")
        if unknown := sorted(set(self.label_volumes) - (set(self.labels) - {0})):
            raise ValueError(f"label_volumes names {unknown}, which are no structures of labels")
        if defaults.sampler not in networks.samplers:
            raise ValueError(
                f"defaults.sampler is {defaults.sampler!r}; these networks have "
                f"{', '.join(networks.samplers)}"
            )
        if networks.most_steps is not None and defaults.steps > networks.most_steps:
            raise ValueError(f"defaults.steps is {defaults.steps}, the schedule has {networks.most_steps}")
        return self

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the hashes of the weight files: the generator's identity in provenance records."""
        if len(self.files) == 1:
            return next(iter(self.files.values()))
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()

    @property
    def windowed(self) -> bool:
        """Whether volumes of any size are worked on, by windows of the grid's shape."""
        return self.extent == "patch" and isinstance(self.networks, JointFlowNetworks)

    def sampling(
        self,
        verb: str,
        steps: int | None,
        guidance: float | None,
        sampler: str | None,
        parameters: Mapping[str, float | str] | None = None,
    ) -> Sampling:
        """How a verb samples, with the defaults for what is None.

        Raises:
            DiffaugError: for a sampler that the networks lack, numbers that they cannot work with, or
                parameters that there are not.
        """
        defaults, networks = self.defaults, self.networks
        if sampler is not None and sampler not in networks.samplers:
            raise DiffaugError(
                f"{self.name} has no sampler {sampler!r}; it has {', '.join(networks.samplers)}"
            )
        if steps is None:
            own = sampler is None or sampler == defaults.sampler
            steps = defaults.steps if own else networks.steps_of(str(sampler)) or defaults.steps
        if steps < 1 or (networks.most_steps is not None and steps > networks.most_steps):
            upper = "" if networks.most_steps is None else f" and at most {networks.most_steps}"
            raise DiffaugError(f"steps must be at least 1{upper}, got {steps}")
        if guidance is not None and not guidance >= 0:
            raise DiffaugError(f"guidance must be at least 0 (1 is none), got {guidance}")
        if guidance not in (None, 1.0) and not networks.guided:
            raise DiffaugError(
                f"{self.name} knows no labels that could guide it: leave guidance={guidance} out"
            )
        if guidance is None:
            guidance = defaults.guidance_of(verb) if networks.guided else 1.0
        return Sampling(
            sampler or defaults.sampler, steps, guidance, defaults.shift, self._numbers(parameters or {})
        )

    def _numbers(self, given: Mapping[str, float | str]) -> dict[str, float]:
        """What the networks are told."""
        if unknown := sorted(given.keys() - self.parameters.keys()):
            raise DiffaugError(
                f"{self.name} has no parameter {unknown[0]!r}; it has {', '.join(self.parameters) or 'none'}"
            )
        try:
            return {
                name: parameter.number(name, given.get(name, parameter.default))
                for name, parameter in self.parameters.items()
            }
        except ValueError as error:
            raise DiffaugError(f"{self.name}: {error}") from error

    def audit_note(self, *, rejecting: bool = False) -> str | None:
        """What to know before using what the generator makes; None where its audit passed, or is unclear in
        nothing but the use of what it makes.

        Args:
            rejecting: whether copies are refused, as they may have been among the samples of the audit.
        """
        if self.audit is None:
            return f"{self.name} has no audit on its card: whether it copies its training scans is unknown"
        failed = [verdict.question for verdict in self.audit.verdicts if verdict.answer == "fail"]
        if failed:
            return f"{self.name} failed its audit: {' '.join(failed)}"
        notes = []
        unclear = [v.question for v in self.audit.verdicts if (v.about, v.answer) == ("privacy", "unclear")]
        if unclear:
            notes.append(f"the audit of {self.name} leaves open: {' '.join(unclear)}")
        if self.audit.rejection and not rejecting:
            notes.append(f"{self.name} was audited with --reject-copies alone: build with it, too")
        return "; ".join(notes) or None

    def to_grid(self) -> Grid:
        """The grid as geometry."""
        return self.grid.to_grid()


def read_card(path: Path) -> Card:
    """Read and validate `card.json`.

    Raises:
        CardError: names the file and every field that is wrong.
    """
    try:
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CardError(f"cannot read the card {path}: {error}") from error
    except ValidationError as error:
        lines = "\n".join(f"  {_field(e['loc'])}: {e['msg']}" for e in error.errors())
        raise CardError(f"the card {path} is not valid:\n{lines}") from error


def _field(location: tuple[int | str, ...]) -> str:
    """A field's path in the file: without the architecture, by which its networks were chosen."""
    path = [str(part) for part in location]
    if len(path) > 1 and path[0] == "networks":
        del path[1]
    return ".".join(path) or "card"


def card_json(card: Card) -> dict[str, Any]:
    """The card as plain JSON types."""
    return json.loads(card.model_dump_json())
