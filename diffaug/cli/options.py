"""Options that several commands have, and what they say."""

from pathlib import Path
from typing import Annotated

import typer

LabelMapping = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SOURCE=GENERATOR",
        help="A label id of the source, such as 3=1, or a .csv table of them; may be repeated.",
    ),
]
ToldParameters = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter",
        metavar="NAME=VALUE",
        help="What else the generator is told, such as age=0.6 or modality=mri_t2; may be repeated.",
        show_default="the card's",
    ),
]


def parse_pair(text: str) -> tuple[int, int]:
    """The ids in ``SOURCE=GENERATOR``, such as ``3=1``; raises BadParameter for anything else."""
    source, _, target = text.partition("=")
    if not (source.isdecimal() and target.isdecimal()):
        raise typer.BadParameter(
            f"{text!r} is not a pair of label ids, nor a .csv table of them; write it like 3=1"
        )
    return int(source), int(target)


def parse_mapping(given: list[str] | None, generator: str | None) -> dict[int, int] | None:
    """Pairs of ids and tables of them, later ones before earlier; None for none.

    Raises:
        BadParameter: something is neither.
        LabelError: a table is wrong.
    """
    from diffaug.datasets.label_tables import read_label_table
    from diffaug.generators.card import read_card
    from diffaug.generators.labels import CompleteMapping
    from diffaug.zoo import folder_of

    mapping: dict[int, int] = {}
    complete = False
    for text in given or []:
        if text.endswith(".csv") and generator is not None:
            labels = read_card(folder_of(generator) / "card.json").labels
            mapping |= read_label_table(Path(text), labels)
            complete = True
        else:
            mapping |= [parse_pair(text)]
    if complete:
        return CompleteMapping(mapping)
    return mapping if given else None


def parse_told(given: list[str] | None) -> dict[str, float | str]:
    """Names and values of ``NAME=VALUE``; raises BadParameter for anything else."""
    pairs = [text.partition("=") for text in given or []]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        raise typer.BadParameter(
            f"{wrong[0]!r} is no parameter; write it like age=0.6", param_hint="--parameter"
        )
    return {name: _number_or_text(value) for name, _, value in pairs}


def _number_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
