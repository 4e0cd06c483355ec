"""Checkpoint files of MONAI's generators to a generator."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from diffaug.errors import CardError, DiffaugError
from diffaug.generators.card import Card, CardGrid, Defaults, Training
from diffaug.generators.generator import Generator
from diffaug.generators.latent_diffusion.model import LatentDiffusion
from diffaug.generators.latent_diffusion.networks import DiscreteProcess, FlowProcess, LatentDiffusionNetworks
from diffaug.generators.latent_diffusion.sizes import AutoencoderKLSizes, ControlNetSizes, DiffusionUNetSizes
from diffaug.generators.verbs import VERBS
from diffaug.version import __version__
from diffaug.zoo.folders import check_new, new_folder
from diffaug.zoo.medical_diffusion.choices import problems
from diffaug.zoo.monai.bundle import find, opened
from diffaug.zoo.monai.configuration import Configuration
from diffaug.zoo.monai.states import load_state, read_state, scale_factor
from diffaug.zoo.monai.templates import MAISI, TEMPLATES, Template

_CONFIGURATIONS = ("configs/inference.json", "configs/train_diffusion.json", "configs/train.json")
_AUTOENCODERS = ("models/model_autoencoder.pt", "models/autoencoder.pth", "models/autoencoder.pt")
_DENOISERS = ("models/model.pt", "models/diffusion_model.pth", "models/model_diffusion.pt")
# The outline of the body in MAISI's label maps, which label_dict.json does not name.
BODY = 200


class Imported(NamedTuple):
    """A generator, and what is to be said of its files."""

    generator: Generator
    notes: list[str]


@dataclass(frozen=True)
class Geometry:
    """What a user may choose of the volumes that convolutional networks make; None where nothing is said.

    Attributes:
        shape: in voxels; spacing: mm.
        window: of the latent, which the autoencoder works on at once.
    """

    shape: tuple[int, int, int] | None = None
    spacing: tuple[float, float, float] | None = None
    window: tuple[int, int, int] | None = None


AS_PUBLISHED = Geometry()


def import_monai_bundle(
    bundle: Path | str,
    output: Path | str,
    *,
    template: str | None = None,
    geometry: Geometry = AS_PUBLISHED,
    name: str | None = None,
) -> Imported:
    """Write a generator folder with the networks of a MONAI bundle of a latent diffusion model.

    Nothing in the bundle is executed: of its configuration the networks' definitions are read.

    Args:
        bundle: its folder, or the zip of one.
        output: folder of the generator; it must not exist, or be empty.
        template: whose grid, units and licence it has (`brats-flair-ldm`, `brain-t1-ldm`); default: that of
            the published networks which the bundle's are.
        geometry: of the volumes, instead of the template's.
        name: on the card (default: the folder's name).

    Raises:
        CardError: for a bundle that misses a file, networks or expressions that diffaug does not know,
            weights that do not fit, or one that is like no template.
    """
    output = Path(output)
    check_new(output)
    with opened(Path(bundle)) as folder:
        autoencoder, denoiser = find(folder, *_AUTOENCODERS), find(folder, *_DENOISERS)
        for file, names in ((autoencoder, _AUTOENCODERS), (denoiser, _DENOISERS)):
            if file is None:
                raise CardError(f"{bundle} has none of {', '.join(names)}: is it a latent diffusion bundle?")
        assert autoencoder is not None
        assert denoiser is not None
        found = find(folder, *_CONFIGURATIONS)
        configuration = None if found is None else Configuration(found)
        known = [each for each in TEMPLATES.values() if each.name not in MAISI]
        chosen = _template(template, known, configuration, Path(bundle))
        if configuration is not None and geometry.shape is None:
            shape = configuration.entry("latent_shape", "noise_shape")
            geometry = _with_latent_shape(geometry, shape, chosen, configuration)
        parts = _Parts(chosen, configuration)
        return parts.write(output, autoencoder, denoiser, geometry, name)


def import_maisi(
    autoencoder: Path | str,
    denoiser: Path | str,
    output: Path | str,
    *,
    template: str,
    control: Path | str | None = None,
    label_dict: Path | str | None = None,
    config: Path | str | None = None,
    geometry: Geometry = AS_PUBLISHED,
    name: str | None = None,
) -> Imported:
    """Write a generator folder with the networks of MAISI or NV-Generate.

    Args:
        autoencoder, denoiser: files, such as `autoencoder_v1.pt` and `diff_unet_3d_rflow-ct.pt`.
        output: folder of the generator; it must not exist, or be empty.
        template: `maisi-ct`, `nv-generate-ct`, `nv-generate-mr` or `nv-generate-mr-brain`.
        control: ControlNet's file; with it the generator paints label maps instead of sampling.
        label_dict: `label_dict.json`, which names the ids of these.
        config: JSON with definitions of networks that are not the published ones.
        geometry: of the volumes, instead of the template's.
        name: on the card (default: the folder's name).

    Raises:
        CardError: for weights that do not fit, or label names without a ControlNet and the reverse.
    """
    output = Path(output)
    check_new(output)
    if template not in MAISI:
        raise DiffaugError(f"there is no template {template!r} of MAISI; there are {', '.join(MAISI)}")
    chosen = TEMPLATES[template]
    if (control is None) != (label_dict is None):
        raise CardError(
            "a ControlNet and its label_dict.json go together: the latter names what label maps may hold"
        )
    if control is not None and chosen.control is None:
        raise CardError(f"{template} has no ControlNet: leave --control out")
    parts = _Parts(chosen, None if config is None else Configuration(Path(config)))
    labels = {} if label_dict is None else read_label_dict(Path(label_dict))
    return parts.write(
        output,
        Path(autoencoder),
        Path(denoiser),
        geometry,
        name,
        control=None if control is None else Path(control),
        labels=labels,
    )


def read_label_dict(path: Path) -> dict[int, str]:
    """MAISI's ids with their names, background and outline of the body included.

    Raises:
        CardError: the file is none of label names and ids.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not all(type(number) is int for number in content.values()):
        raise CardError(f"{path} is no label_dict.json, which holds names and their ids")
    labels = {number: str(name) for name, number in content.items() if number != 0}
    if wrong := sorted(number for number in labels if not 0 < number < 256):
        raise CardError(f"{path} holds the ids {wrong[:5]}; they must lie between 0 and 255")
    if len(labels) < sum(number != 0 for number in content.values()):
        raise CardError(f"{path} gives one id two names")
    return {0: "background", BODY: "body"} | labels


def _template(
    asked: str | None, known: list[Template], configuration: Configuration | None, bundle: Path
) -> Template:
    """The one asked for, or the one whose networks a bundle has."""
    names = ", ".join(each.name for each in known)
    if asked is not None:
        found = [each for each in known if each.name == asked]
        if not found:
            raise DiffaugError(f"there is no template {asked!r} of a bundle; there are {names}")
        return found[0]
    sizes = None if configuration is None else (configuration.autoencoder(), configuration.denoiser())
    alike = [each for each in known if (each.autoencoder, each.denoiser) == sizes]
    if len(alike) != 1:
        raise CardError(
            f"{bundle} does not say on which grid and in which units its volumes are, and its networks are "
            f"not those of {names}: say whose conventions it has with --template, and its own with --shape "
            "and --spacing"
        )
    return alike[0]


def _with_latent_shape(
    geometry: Geometry, shape: Any, template: Template, configuration: Configuration
) -> Geometry:
    """The volumes' shape from that of the latents, where nothing else is said."""
    if shape is None:
        return geometry
    if not isinstance(shape, list) or len(shape) < 3 or not all(isinstance(n, int) for n in shape):
        raise CardError(
            f"{configuration.path}: the latent's shape is {shape!r}, not numbers: give the volumes' --shape"
        )
    factor = (configuration.autoencoder() or template.autoencoder).factor
    i, j, k = (n * factor for n in shape[-3:])
    return Geometry((i, j, k), geometry.spacing, geometry.window)


class _Parts:
    """Sizes of the networks: a configuration's, and the template's where there is none."""

    def __init__(self, template: Template, configuration: Configuration | None) -> None:
        self.template = template
        self.autoencoder: AutoencoderKLSizes = template.autoencoder
        self.denoiser: DiffusionUNetSizes = template.denoiser
        self.control: ControlNetSizes | None = template.control
        self.process: DiscreteProcess | FlowProcess = template.process
        if configuration is not None:
            self.autoencoder = configuration.autoencoder() or self.autoencoder
            self.denoiser = configuration.denoiser() or self.denoiser
            self.control = configuration.control() or self.control
            self.process = configuration.process() or self.process

    def write(
        self,
        output: Path,
        autoencoder: Path,
        denoiser: Path,
        geometry: Geometry,
        name: str | None,
        *,
        control: Path | None = None,
        labels: dict[int, str] | None = None,
    ) -> Imported:
        """The generator's folder, after everything was read and fitted."""
        template, labels = self.template, dict(sorted((labels or {}).items()))
        states = {"autoencoder": (read_state(autoencoder), autoencoder)}
        states["denoiser"] = (read_state(denoiser), denoiser)
        if control is not None:
            states["control"] = (read_state(control), control)
        factor = scale_factor(states["denoiser"][0][1], denoiser) or template.scale_factor
        spacing = geometry.spacing or template.spacing
        try:
            networks = LatentDiffusionNetworks(
                autoencoder=self.autoencoder,
                denoiser=self.denoiser,
                control=self.control if control is not None else None,
                process=self.process,
                shape=geometry.shape or template.shape,
                spacing=spacing,
                scale_factor=factor or 1.0,
                conditions=template.conditions,
                label_ids=tuple(labels),
                window=geometry.window,
            )
            files = [autoencoder.name, denoiser.name, *([control.name] if control else [])]
            card = self._card(networks, spacing, labels, files, name or output.resolve().name)
        except ValidationError as error:
            raise CardError(f"these files make no generator: {problems(error)}") from error
        # Networks draw initial weights before they get theirs: the caller's random state must not notice.
        with torch.random.fork_rng(devices=[]):
            model = LatentDiffusion(networks)
        notes = []
        for part, ((state, _), path) in states.items():
            notes += load_state(getattr(model, part), state, path)
        if factor is None:
            raise CardError(
                f"{denoiser} holds no scale_factor, without which its latents are of no use: give the file "
                "as it was published"
            )
        generator = Generator(card, model)
        with new_folder(output) as folder:
            generator.save(folder)
        return Imported(generator, notes)

    def _card(
        self,
        networks: LatentDiffusionNetworks,
        spacing: tuple[float, float, float],
        labels: dict[int, str],
        files: list[str],
        name: str,
    ) -> Card:
        template = self.template
        sampler = template.sampler if template.sampler in networks.samplers else networks.samplers[0]
        # MONAI spends more steps at high noise the larger the latent is.
        i, j, k = networks.latent_shape
        shifts = isinstance(networks.process, FlowProcess) and networks.process.shifts
        shift = (i * j * k / 32**3) ** (1 / 3) if shifts else 1.0
        return Card(
            name=name,
            description=f"{template.makes}: latent diffusion with MONAI's networks, imported from "
            f"{', '.join(files)} by the conventions of {template.name}.",
            architecture="latent-diffusion",
            networks=networks,
            parameters=template.parameters,
            grid=CardGrid(
                orientation=template.orientation, spacing=spacing, shape=networks.shape, outside="background"
            ),
            extent="object",
            channels=[template.channel],
            intensity=template.intensity,
            labels=labels,
            verbs=[verb for verb in VERBS if verb in networks.verbs],
            defaults=Defaults(
                sampler=sampler,
                steps=min(template.steps, networks.process.steps),
                shift=shift,
            ),
            training=Training(
                dataset=template.dataset,
                cases={},
                patients=None,
                autoencoder_steps=None,
                denoiser_steps=None,
            ),
            licence=template.licence,
            commercial_use=template.commercial_use,
            redistribution=template.redistribution,
            citation=template.citation,
            files={},
            versions={"diffaug": __version__, "torch": torch.__version__},
        )
