"""What the training of an architecture gives."""

from dataclasses import dataclass, field
from typing import Any

from diffaug.generators.card import Defaults
from diffaug.generators.model import Model
from diffaug.generators.networks import Networks
from diffaug.training.loop import History


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        networks: for the card.
        histories: stage -> figures over the steps; the last stage is the "denoiser".
        evaluated: number of validation cases that the figures are of.
        figures: of the last evaluation, for the card.
        defaults: of the verbs, for the card.
    """

    networks: Networks
    model: Model
    histories: dict[str, History]
    evaluated: int
    figures: dict[str, Any]
    defaults: Defaults = field(default_factory=Defaults)
