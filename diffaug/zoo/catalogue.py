"""What is known of every generator: by its card where it is here, else by what was published."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from diffaug.errors import CardError
from diffaug.generators.card import NAME_PATTERN, Card, Parameter, read_card
from diffaug.generators.latent_diffusion.networks import LatentDiffusionNetworks
from diffaug.zoo import bundled, folder_of
from diffaug.zoo.entries import ENTRIES, Entry
from diffaug.zoo.home import pin_of, pulled, register, registered
from diffaug.zoo.monai.templates import TEMPLATES

# Of a small generator such as hippocampus-mr; a process of torch alone takes 0.4 GiB.
_SMALL_BYTES = 2**30


class Listed(NamedTuple):
    """A generator of the zoo.

    Attributes:
        state: "bundled", "pulled", "registered", "a folder" or "to pull".
        weights_bytes: size of its weights, memory_bytes: about what it takes at its grid.
        files: name -> hash, or what is known of it.
        commercial_use, redistribution: whether its licence allows them; None where it is not stated.
    """

    name: str
    makes: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    extent: str
    verbs: tuple[str, ...]
    parameters: dict[str, str]
    labels: dict[int, str]
    weights_bytes: int
    memory_bytes: int
    licence: str
    commercial_use: bool | None
    redistribution: bool | None
    citation: tuple[str, ...]
    files: dict[str, str]
    state: str
    folder: Path | None


def catalogue() -> list[Listed]:
    """All generators: bundled, pulled and registered ones, then those that can be pulled."""
    found: dict[str, Listed] = {}
    for state, here in (("bundled", bundled()), ("pulled", pulled()), ("registered", registered())):
        for name, folder in here.items():
            if name not in found:
                try:
                    card = read_card(folder / "card.json")
                except CardError as error:
                    warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                else:
                    found[name] = _of_card(name, card, folder, state)
    return list(found.values()) + [_of_entry(entry) for name, entry in ENTRIES.items() if name not in found]


def describe(name_or_folder: str) -> Listed:
    """One generator.

    Raises:
        CardError: there is none of that name, and no such folder.
    """
    for each in catalogue():
        if each.name == name_or_folder:
            return each
    folder = folder_of(name_or_folder)
    card = read_card(folder / "card.json")
    return _of_card(card.name, card, folder, "a folder")


def register_own(folder: Path, name: str | None = None) -> str:
    """Register a folder under a name, by default that on its card; returns the name.

    Raises:
        CardError: it is no generator's folder, or the name is another's.
    """
    card = read_card(folder / "card.json")
    chosen = name or card.name
    if chosen in ENTRIES or chosen in bundled() or chosen in pulled():
        raise CardError(f"{chosen} is the name of another generator of the zoo: give a name of your own")
    if not re.fullmatch(NAME_PATTERN, chosen):
        raise CardError(f"{chosen!r} is no name: letters, digits, points, hyphens and underscores")
    register(chosen, folder)
    return chosen


def _of_card(name: str, card: Card, folder: Path, state: str) -> Listed:
    networks = card.networks
    weights = sum((folder / file).stat().st_size for file in card.files if (folder / file).is_file())
    memory = _SMALL_BYTES
    if isinstance(networks, LatentDiffusionNetworks):
        memory = weights + networks.working_bytes
    published = ENTRIES.get(name)
    if published is not None and not isinstance(networks, LatentDiffusionNetworks):
        memory = published.facts.memory_bytes
    return Listed(
        name=name,
        makes=published.facts.makes if published is not None else card.description,
        shape=card.grid.shape,
        spacing=card.grid.spacing,
        extent=card.extent,
        verbs=tuple(card.verbs),
        parameters=_described(card.parameters),
        labels=card.labels,
        weights_bytes=weights,
        memory_bytes=memory,
        licence=card.licence,
        commercial_use=card.commercial_use,
        redistribution=card.redistribution,
        citation=tuple(card.citation),
        files={file: f"SHA-256 {sha256}" for file, sha256 in card.files.items()},
        state=state,
        folder=folder,
    )


def _of_entry(entry: Entry) -> Listed:
    template, facts = TEMPLATES.get(entry.name), entry.facts
    parameters = {} if template is None else template.parameters
    files = {}
    for file in entry.files:
        recorded = pin_of(f"{entry.name}/{file.path}")
        stated = f"MD5 {file.md5}" if file.md5 else "no published hash"
        files[file.path] = f"SHA-256 {recorded}, as accepted" if recorded and not file.md5 else stated
    return Listed(
        name=entry.name,
        makes=facts.makes,
        shape=facts.shape,
        spacing=facts.spacing,
        extent="object" if template else "patch",
        verbs=facts.verbs,
        parameters=_described(parameters),
        labels={},
        weights_bytes=facts.weights_bytes,
        memory_bytes=facts.memory_bytes,
        licence=facts.licence,
        commercial_use=facts.commercial_use,
        redistribution=facts.redistribution,
        citation=facts.citation,
        files=files,
        state="to pull",
        folder=None,
    )


def _described(parameters: Mapping[str, Parameter]) -> dict[str, str]:
    texts = {}
    for name, each in parameters.items():
        choices = (
            f"; one of {', '.join(each.choices)}" if each.choices else f"; {each.low:g} to {each.high:g}"
        )
        texts[name] = f"{each.description} (default {each.default}{choices})"
    return texts
