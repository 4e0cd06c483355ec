"""The outcome of an audit on the card of the generator whose samples were audited."""

from collections.abc import Sequence
from pathlib import Path

from diffaug.audit.record import Report
from diffaug.datasets.manifest import MANIFEST, read_manifest
from diffaug.datasets.training_scans import FILE as TRAINING_SCANS
from diffaug.datasets.training_scans import check_training_scans
from diffaug.datasets.volumes import CaseFiles
from diffaug.errors import DiffaugError
from diffaug.files import PRIVATE, atomic_write_json
from diffaug.generators.card import Audit, AuditAnswer, Card, card_json, read_card
from diffaug.generators.generator import Generator
from diffaug.progress import Progress


def check_card(
    generator: Path,
    synthetic: Path,
    training: Sequence[CaseFiles],
    held_out: Sequence[CaseFiles],
    progress: Progress,
) -> None:
    """Refuse to put an audit on the card of a generator that it says nothing of.

    Args:
        generator: its folder; where the fit's private part is still in it, the scans are compared with those
            that trained it.
        synthetic: folder of the dataset that is audited.
        training: the audit's training cases.
        held_out: its held-out cases.
        progress: where to show it.

    Raises:
        DiffaugError: the dataset has no manifest, or names other weights or another verb than `sample`; or
            the cases are not those that the generator was, and was not, trained on.
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
    scans = generator / PRIVATE / TRAINING_SCANS
    if scans.is_file():
        check_training_scans(scans, training, held_out, progress)


def put_on_card(generator: Path, synthetic: Path, report: Report) -> Card:
    """Write the answers of an audit on a generator's card; figures stay in the report."""
    settings = read_manifest(synthetic / MANIFEST).settings
    card = read_card(generator / "card.json").model_copy(
        update={
            "audit": Audit(
                answer=report.answer,
                weights=settings.generator.weights,
                verdicts=[
                    AuditAnswer(question=v.question, about=v.about, answer=v.answer, found=v.found)
                    for v in report.verdicts
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
