"""What the commands on single files share: all checks first, then the generator, then all files or none."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffaug.errors import DiffaugError, LabelError, VerbError
from diffaug.files import atomic_paths

if TYPE_CHECKING:
    from diffaug.generators.card import Card
    from diffaug.generators.generator import Generator

NIFTI = (".nii.gz", ".nii")
LATENT = (".safetensors",)
# Verbs that make images, of which a user should know whether they are copies.
_MAKING = ("sample", "paint", "vary", "inpaint")
# Parameters worth a line on stderr.
_SHOWN = ("seed", "strength", "sampler", "steps", "guidance")


@dataclass(frozen=True)
class Job:
    """One verb on files.

    Attributes:
        verb: its name.
        generator: a name in the zoo, or a folder.
        outputs: files to write; an image may take one for each channel.
        settings: keyword arguments of the verb.
        inputs: files that are read, the image first.
        label: which of them is the label map.
        device: such as cpu or cuda; the fastest there is, by default.
        force: replace outputs that exist.
        as_json: print what was done as JSON, instead of the paths.
    """

    verb: str
    generator: str
    outputs: Sequence[Path]
    settings: Mapping[str, Any]
    inputs: Sequence[Path] = ()
    label: Path | None = None
    device: str | None = None
    force: bool = False
    as_json: bool = False

    def check(self) -> "Card":
        """The generator's card, read without its weights.

        Raises:
            DiffaugError: an output cannot be written, or the generator cannot be found, lacks the verb, or
                cannot sample with these settings.
        """
        from diffaug.generators.card import read_card
        from diffaug.zoo import folder_of

        endings = LATENT if self.verb == "encode" else NIFTI
        inputs = {path.resolve(): path for path in self.inputs}
        for index, path in enumerate(self.outputs):
            if not path.name.endswith(endings):
                raise DiffaugError(f"{path} must end with {' or '.join(endings)}: rename the output")
            if path.resolve() in inputs:
                raise DiffaugError(f"{path} is what {self.verb} reads: give another output")
            if path.resolve() in [other.resolve() for other in self.outputs[:index]]:
                raise DiffaugError(f"{path} is named twice: give each output a name of its own")
            if path.is_dir():
                raise DiffaugError(f"{path} is a folder: name a file in it")
            if os.path.lexists(path) and not self.force:
                raise DiffaugError(f"{path} exists: give another output, or replace it with --force")
            folder = next(parent for parent in path.absolute().parents if parent.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                raise DiffaugError(f"{path} cannot be written, since {folder} is no folder to write in")
        card = read_card(folder_of(self.generator) / "card.json")
        if self.verb not in card.verbs:
            raise VerbError(f"{card.name} has no verb {self.verb!r}; it has {', '.join(sorted(card.verbs))}")
        self._settled(card)
        return card

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors name the file that they are about."""
        try:
            yield
        except DiffaugError as error:
            message = str(error)
            files = [self.label] if isinstance(error, LabelError) and self.label else self.inputs[:1]
            if not any(str(file) in message for file in self.inputs):
                message = ": ".join([*map(str, files), message])
            raise DiffaugError(message) from error

    def run(self, make: "Callable[[Generator], Sequence[bytes]]") -> None:
        """Load the generator, let it make the contents of the outputs (`.gz` files not yet compressed), write
        them all or none, and say so."""
        import torch

        from diffaug.progress import Progress
        from diffaug.zoo import load

        progress = Progress()
        with progress.console.status(f"loading {self.generator}"):
            device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
            generator = load(self.generator).to(device)
        record = self._record(generator)
        start = time.perf_counter()
        with progress.console.status(f"{self.verb} by {generator.name}"), self.explained():
            contents = make(generator)
        seconds = time.perf_counter() - start
        self._write(contents)
        used = [f"{key} {record['parameters'][key]}" for key in _SHOWN if key in record["parameters"]]
        progress.note(
            f"{self.verb} by {generator.name}, licence {generator.card.licence}: "
            f"{', '.join([*used, f'{seconds:.1f} s on {generator.device}'])}"
        )
        if self.verb in _MAKING and (note := generator.card.audit_note()):
            progress.note(note)
        typer.echo(json.dumps(record) if self.as_json else "\n".join(map(str, self.outputs)))

    def _record(self, generator: "Generator") -> dict[str, Any]:
        """What makes the outputs again, with the card's defaults filled in."""
        from diffaug.version import __version__

        parameters = self._settled(generator.card)
        return {
            "outputs": [str(path) for path in self.outputs],
            "inputs": [str(path) for path in self.inputs],
            "generator": generator.name,
            "weights": generator.weights_hash,
            "licence": generator.card.licence,
            "verb": self.verb,
            "parameters": {key: value for key, value in parameters.items() if value is not None},
            "device": str(generator.device),
            "version": __version__,
        }

    def _settled(self, card: "Card") -> dict[str, Any]:
        """The settings with the card's defaults.

        Raises:
            DiffaugError: the generator cannot sample with them.
        """
        parameters = dict(self.settings)
        if "strength" in parameters and parameters["strength"] is None:
            parameters["strength"] = card.defaults.strength
        if "sampler" in parameters:
            told = parameters.pop("parameters", {})
            sampling = card.sampling(
                self.verb, parameters["steps"], parameters.get("guidance"), parameters["sampler"], told
            )
            parameters |= {key: value for key, value in asdict(sampling).items() if key in parameters}
            if card.parameters:
                defaults = {name: each.default for name, each in card.parameters.items()}
                parameters["parameters"] = defaults | dict(told)
        return parameters

    def _write(self, contents: Sequence[bytes]) -> None:
        from diffaug.datasets.layouts import compressed

        current = self.outputs[0]
        try:
            with atomic_paths(self.outputs) as temporaries:
                for current, temporary, content in zip(self.outputs, temporaries, contents, strict=True):
                    temporary.write_bytes(compressed(content) if current.name.endswith(".gz") else content)
        except OSError as error:
            raise DiffaugError(f"{current} cannot be written: {error}") from error
