"""What an audit finds, as it is written to JSON."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from diffaug.evaluation.statistics import Interval
from diffaug.generators.card import CardGrid

Answer = Literal["pass", "unclear", "fail"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Part):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval) -> "Figure":
        """From a named tuple."""
        return cls(value=interval.value, low=interval.low, high=interval.high)

    def __str__(self) -> str:
        return f"{_short(self.value)} [{_short(self.low)}, {_short(self.high)}]"


class Beside(_Part):
    """A figure of synthetic cases, and the same of real cases in their place."""

    synthetic: Figure
    real: Figure


class SearchRecord(_Part):
    """One search for copies: a case above `threshold` is suspected, one above `clear_threshold`, which only
    decisive searches have, is clear."""

    name: str
    title: str
    threshold: float
    clear_threshold: float | None
    copies: int
    clear_copies: int
    expected: float
    most: float


class CopyRecord(_Part):
    """Suspected copies.

    Attributes:
        copies: N_copies, synthetic cases that any search suspects.
        clear_copies: those that any search finds clearly.
        training_cases: training cases that are the nearest of a suspected copy.
        training_patients: their patients.
        searches: what each search found; `expected` is the share of suspected cases among independent real
            ones, `most` the largest share that chance explains.
    """

    copies: int
    clear_copies: int
    training_cases: int
    training_patients: int
    searches: list[SearchRecord]


class Memorisation(_Part):
    """What one feature space says of memorisation.

    Attributes:
        tau: Dar's threshold for training cases.
        memorised_share: of the training cases, those with a match above tau among `matched` synthetic cases.
        memorised_null: the same among as many held-out cases.
        matched: cases that each training case was compared with.
        balance: share of the samples nearer to training than to held-out cases; 0.5 where nothing is
            memorised.
        balance_cases: training and held-out cases in it, each.
        balance_of_copies: what it would be of nothing but copies of training cases drawn by chance.
        authentic_share: samples farther from their nearest training case than this is from another patient's.
        authentic_null: the same of held-out cases.
        neighbour_ratio: median distance to the nearest training patient over that to the second nearest.
        neighbour_ratio_null: the same of held-out cases.
        membership_auc: of telling training from held-out cases by their nearest sample.
    """

    tau: float
    memorised_share: float
    memorised_null: float
    matched: int
    balance: Figure
    balance_cases: float
    balance_of_copies: float
    authentic_share: float
    authentic_null: float
    neighbour_ratio: float
    neighbour_ratio_null: float
    membership_auc: Figure


class SpaceReport(_Part):
    """One feature space: copies, and distributions by name of the figure."""

    name: str
    title: str
    memorisation: Memorisation
    distributions: dict[str, Beside]


class PairSimilarity(_Part):
    """MS-SSIM of pairs of synthetic, and of pairs of training cases."""

    ms_ssim: Beside
    scales: int
    kernel: int
    pairs: int


class Suspect(_Part):
    """A suspected copy and the training case that it resembles."""

    synthetic: str
    training: str
    search: str
    similarity: float
    clear: bool


class SetRecord(_Part):
    """One of the three sets: `files` is the SHA-256 of all its files on the audit's grid."""

    name: str
    cases: int
    patients: int | None
    licence: str | None
    files: str


class Utility(_Part):
    """Mean Dice of a reference U-Net, by the cases that trained it and those it was tested on."""

    trained_on_synthetic_tested_on_real: Figure
    trained_on_real_tested_on_real: Figure
    trained_on_real_tested_on_synthetic: Figure
    training_cases: int
    steps: int


class Verdict(_Part):
    """A plain answer: the question, what it is about, what was found, the threshold, and pass, unclear or
    fail."""

    question: str
    about: Literal["privacy", "use"]
    answer: Answer
    found: str
    threshold: str


class Report(_Part):
    """A whole audit."""

    format: Literal[1] = 1
    version: str
    synthetic: SetRecord
    training: SetRecord
    held_out: SetRecord
    grid: CardGrid
    encoder: str
    verdicts: list[Verdict]
    copies: CopyRecord
    spaces: list[SpaceReport]
    measures: dict[str, Beside]
    similarity: PairSimilarity
    suspects: list[Suspect]
    utility: Utility | None = None
    notes: list[str] = []

    @property
    def answer(self) -> Answer:
        """The worst of the verdicts."""
        return worst([verdict.answer for verdict in self.verdicts])

    def answer_about(self, about: Literal["privacy", "use"]) -> Answer:
        """The worst of the verdicts about privacy, or about the use of the data."""
        return worst([verdict.answer for verdict in self.verdicts if verdict.about == about])


def worst(answers: Sequence[Answer]) -> Answer:
    """The least good of some answers."""
    return "fail" if "fail" in answers else "unclear" if "unclear" in answers else "pass"


def _short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"
