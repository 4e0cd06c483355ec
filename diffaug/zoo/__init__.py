"""The zoo: generators by name. Bundled ones lie in the package; any folder that `diffaug fit` wrote loads by
its path."""

from pathlib import Path

from diffaug.errors import CardError
from diffaug.generators.generator import Generator

BUNDLED = Path(__file__).parent / "bundled"


def names() -> list[str]:
    """Names of the generators that come with the package."""
    return sorted(card.parent.name for card in BUNDLED.glob("*/card.json"))


def folder_of(name_or_folder: str | Path) -> Path:
    """The folder of a generator.

    Raises:
        CardError: neither a bundled name nor a folder with a `card.json`.
    """
    if str(name_or_folder) in names():
        return BUNDLED / str(name_or_folder)
    folder = Path(name_or_folder)
    if (folder / "card.json").is_file():
        return folder
    bundled = ", ".join(names()) or "none"
    raise CardError(
        f"{name_or_folder} is neither a bundled generator ({bundled}) nor a folder with a card.json"
    )


def load(name_or_folder: str | Path) -> Generator:
    """Load a generator by name or from a folder, on the CPU; move it with `.to(device)`."""
    return Generator.load(folder_of(name_or_folder))
