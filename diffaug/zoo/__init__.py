"""The zoo: generators by name. Bundled ones lie in the package, others are pulled or registered; any folder
that `diffaug fit` wrote loads by its path."""

from pathlib import Path

from diffaug.errors import CardError
from diffaug.generators.generator import Generator
from diffaug.zoo.home import pulled, registered

BUNDLED = Path(__file__).parent / "bundled"


def bundled() -> dict[str, Path]:
    """Generators that come with the package: name -> folder."""
    return {card.parent.name: card.parent for card in sorted(BUNDLED.glob("*/card.json"))}


def names() -> list[str]:
    """Names of the generators that are here: bundled, pulled and registered."""
    return sorted({*bundled(), *pulled(), *registered()})


def folder_of(name_or_folder: str | Path) -> Path:
    """The folder of a generator.

    Raises:
        CardError: neither a name nor a folder with a `card.json`; says how a published one is pulled.
    """
    # One after the other: what is wrong with a user's own zoo must not keep bundled generators from loading.
    for here in (bundled, pulled, registered):
        if (folder := here().get(str(name_or_folder))) is not None:
            return folder
    folder = Path(name_or_folder)
    if (folder / "card.json").is_file():
        return folder
    from diffaug.zoo.entries import ENTRIES

    if str(name_or_folder) in ENTRIES:
        raise CardError(f"{name_or_folder} is not here yet: run `diffaug zoo pull {name_or_folder}` first")
    raise CardError(
        f"{name_or_folder} is neither a generator of the zoo (here are {', '.join(names()) or 'none'}; "
        f"`diffaug zoo list` shows all) nor a folder with a card.json"
    )


def load(name_or_folder: str | Path) -> Generator:
    """Load a generator by name or from a folder, on the CPU; move it with `.to(device)`."""
    return Generator.load(folder_of(name_or_folder))
