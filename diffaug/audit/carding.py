"""The outcome of an audit on the card of the generator whose samples were audited."""

from pathlib import Path

from diffaug.audit.record import Report
from diffaug.datasets.manifest import MANIFEST, read_manifest
from diffaug.errors import DiffaugError
from diffaug.files import atomic_write_json
from diffaug.generators.card import Audit, AuditAnswer, Card, card_json, read_card
from diffaug.generators.generator import Generator


def check_card(generator: Path, synthetic: Path) -> None:
    """Refuse to put an audit of `synthetic`, a built dataset, on the card of another generator.

    Raises:
        DiffaugError: the dataset has no manifest, or names other weights or another verb than `sample`.
    """
    card = read_card(generator / "card.json")
    if not (synthetic / MANIFEST).is_file():
        raise DiffaugError(
            f"{synthetic} has no {MANIFEST} that says which generator made it: leave --card out"
        )
    settings = read_manifest(synthetic / MANIFEST).settings
    weights = Generator.load(generator).weights_hash
    if settings.generator.weights != weights:
        raise DiffaugError(
            f"{synthetic} was made by {settings.generator.name} with the weights "
            f"{settings.generator.weights[:12]}, {card.name} in {generator} has {weights[:12]}: give the "
            "card of the generator that made it"
        )
    if settings.verb != "sample":
        raise DiffaugError(f"{synthetic} was made by {settings.verb}: an audit for a card is one of samples")


def put_on_card(generator: Path, synthetic: Path, report: Report) -> Card:
    """Write the answers of an audit on a generator's card; figures stay in the report."""
    settings = read_manifest(synthetic / MANIFEST).settings
    card = read_card(generator / "card.json").model_copy(
        update={
            "audit": Audit(
                answer=report.answer,
                weights=settings.generator.weights,
                verdicts=[
                    AuditAnswer(question=v.question, answer=v.answer, found=v.found) for v in report.verdicts
                ],
                samples=report.synthetic.cases,
                rejection=settings.inspection is not None,
                training=report.training.cases,
                held_out=report.held_out.cases,
                version=report.version,
            )
        }
    )
    atomic_write_json(generator / "card.json", card_json(card))
    return card
