"""Generators as transforms name them: by name, folder or object; recorded parameters find them again."""

from functools import cache
from pathlib import Path
from weakref import WeakValueDictionary

from diffaug.errors import CardError
from diffaug.generators.card import Card, read_card
from diffaug.generators.generator import Generator
from diffaug.zoo import folder_of, load, names

GeneratorLike = Generator | str | Path

# Generator objects that were given to a transform, by name and weight hash: parameters find them again.
_given: WeakValueDictionary[tuple[str, str], Generator] = WeakValueDictionary()


def reference(generator: GeneratorLike) -> str:
    """How parameters name a generator: a bundled name, an absolute folder, or the name of a Generator object.

    An object is remembered while it lives, so that parameters with its name and weight hash find it.
    """
    if isinstance(generator, Generator):
        _given[generator.name, generator.weights_hash] = generator
        return generator.name
    name = str(generator)
    return str(Path(name).absolute()) if name not in names() and Path(name).is_dir() else name


def card_of(generator: GeneratorLike, weights_hash: str | None = None) -> Card:
    """The card of a generator, read without its weights.

    Args:
        generator: a bundled name, a folder, or a Generator object.
        weights_hash: if given, the weights it must have.

    Raises:
        CardError: for an unknown name, a card that is missing or not valid, or other weights.
    """
    if isinstance(generator, Generator):
        card = generator.card
    elif given := _given.get((str(generator), weights_hash or "")):
        card = given.card
    else:
        card = _read(reference(generator))
    _check_weights(generator, card, weights_hash)
    return card


def resolve(generator: GeneratorLike, weights_hash: str | None = None) -> Generator:
    """The generator that a name, a folder or recorded parameters mean; loaded once per process, on the CPU.

    Raises:
        CardError: as for `card_of`, or where its weights cannot be loaded.
    """
    if isinstance(generator, Generator):
        found = generator
    else:
        found = _given.get((str(generator), weights_hash or "")) or _load(reference(generator))
    _check_weights(generator, found.card, weights_hash)
    return found


def _check_weights(generator: GeneratorLike, card: Card, expected: str | None) -> None:
    if expected not in (None, card.weights_hash):
        raise CardError(
            f"the parameters were recorded with the weights {expected} of {generator}, which now has "
            f"{card.weights_hash}: use the generator that they were recorded with"
        )


@cache
def _read(name_or_folder: str) -> Card:
    return read_card(folder_of(name_or_folder) / "card.json")


@cache
def _load(name_or_folder: str) -> Generator:
    return load(name_or_folder)
