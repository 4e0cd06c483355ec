"""Published generators whose files diffaug imports: where they are, and what they become."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from diffaug.errors import CardError
from diffaug.zoo.medical_diffusion import Choices, import_medical_diffusion
from diffaug.zoo.medical_diffusion.choices import DIFFTUMOR, difftumor
from diffaug.zoo.monai import import_maisi, import_monai_bundle
from diffaug.zoo.monai.importing import AS_PUBLISHED, Geometry
from diffaug.zoo.monai.templates import TEMPLATES

Convert = Callable[[Path, Path, Geometry], Any]


@dataclass(frozen=True)
class RemoteFile:
    """One file of an entry.

    Attributes:
        path: under the entry's name, in a mirror and on disk.
        repository: on Hugging Face, in which it has the same path; None where its publisher's address is not
            known here.
        md5: that its publisher states, or None.
    """

    path: str
    repository: str | None = None
    md5: str | None = None


class Facts(NamedTuple):
    """What is known of a generator before it is pulled."""

    makes: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    verbs: tuple[str, ...]
    licence: str
    commercial_use: bool | None
    redistribution: bool | None
    citation: tuple[str, ...]
    weights_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Entry:
    """A published generator.

    Attributes:
        files: that make it.
        by_hand: how to get them where their address is not known here.
        facts: what is known of it.
        convert: makes the generator's folder of the folder of its files, for volumes of a geometry.
    """

    name: str
    files: tuple[RemoteFile, ...]
    by_hand: str
    facts: Facts
    convert: Convert


# Of DiffTumor's 6.0 and 1.7 million parameters, and with activations of 96^3 voxels.
_DIFFTUMOR_WEIGHTS = 31 * 10**6
_DIFFTUMOR_BYTES = 2 * 2**30


def _facts(name: str, millions: float, *, control: bool = False) -> Facts:
    """Of MONAI's networks with so many parameters."""
    template, weights = TEMPLATES[name], round(4e6 * millions)
    makes = template.makes
    return Facts(
        makes,
        template.shape,
        template.spacing,
        ("paint" if control else "sample", "vary", "inpaint", "encode", "decode"),
        template.licence,
        template.commercial_use,
        template.redistribution,
        tuple(template.citation),
        weights,
        weights
        + max(
            template.autoencoder.working_bytes(prod(template.shape)),
            template.denoiser.working_bytes(prod(template.shape) // template.autoencoder.factor**3),
        ),
    )


def _bundle(template: str) -> Convert:
    return lambda files, output, geometry: import_monai_bundle(
        files, output, template=template, geometry=geometry, name=template
    )


def _maisi(template: str, autoencoder: str, denoiser: str, control: str | None = None) -> Convert:
    def convert(files: Path, output: Path, geometry: Geometry) -> Any:
        more: Mapping[str, Any] = {}
        if control is not None:
            more = {"control": files / control, "label_dict": files / "configs/label_dict.json"}
        return import_maisi(
            files / autoencoder,
            files / denoiser,
            output,
            template=template,
            geometry=geometry,
            name=template,
            **more,
        )

    return convert


def _difftumor(organ: str) -> Entry:
    repository, name = "MrGiovanni/DiffTumor", f"difftumor-{organ}"
    autoencoder = "AutoencoderModel/AutoencoderModel.ckpt"
    denoiser = f"DiffusionModel/{organ}_early.pt"
    said: Choices = difftumor(4)

    def convert(files: Path, output: Path, geometry: Geometry) -> Any:
        if geometry != AS_PUBLISHED:
            raise CardError(f"{name} works on patches of 96 x 96 x 96 voxels of 1 mm alone")
        return import_medical_diffusion(
            files / denoiser, output, autoencoder=files / autoencoder, preset="difftumor", name=name
        )

    return Entry(
        name,
        (RemoteFile(autoencoder, repository), RemoteFile(denoiser, repository)),
        f"download {autoencoder} and {denoiser} of {repository}, then `diffaug import medical-diffusion "
        "--preset difftumor`",
        Facts(
            f"early tumours, by inpainting, in CT of the {organ}",
            (96, 96, 96),
            (1.0, 1.0, 1.0),
            ("inpaint", "encode", "decode"),
            said.licence or "",
            False,
            False,
            (DIFFTUMOR,),
            _DIFFTUMOR_WEIGHTS,
            _DIFFTUMOR_BYTES,
        ),
        convert,
    )


_MAISI_CONTROL = "models/controlnet-20datasets-e20wl100fold0bc_noi_dia_fsize_current.pt"
_MAISI_UNET = "models/input_unet3d_data-all_steps1000size512ddpm_random_current_inputx_v1.pt"
_LABELS = RemoteFile("configs/label_dict.json", md5="c5fc6270c0fa2b4af8e67ba95a7dd5bd")
_AUTOENCODER_V1 = RemoteFile("models/autoencoder_v1.pt", "nvidia/NV-Generate-CT")


def _flow(
    name: str,
    millions: float,
    repository: str,
    autoencoder: RemoteFile,
    denoiser: str,
    control: str | None = None,
) -> Entry:
    files = [autoencoder, RemoteFile(denoiser, repository)]
    if control is not None:
        files += [RemoteFile(control, repository), _LABELS]
    return Entry(
        name,
        tuple(files),
        f"download the files of {repository} and, for label maps, label_dict.json of MONAI's tutorials; then "
        "`diffaug import maisi`",
        _facts(name, millions, control=control is not None),
        _maisi(name, autoencoder.path, denoiser, control),
    )


_ALL = (
    Entry(
        "brats-flair-ldm",
        (
            RemoteFile("models/model_autoencoder.pt", md5="9e6df4cc9a2decf49ab3332606b32c55"),
            RemoteFile("models/model.pt", md5="35258b1112f701f3d485676d33141a55"),
        ),
        "`python -m monai.bundle download brats_mri_generative_diffusion --bundle_dir .`, then `diffaug "
        "import monai-bundle brats_mri_generative_diffusion`",
        _facts("brats-flair-ldm", 210.3),
        _bundle("brats-flair-ldm"),
    ),
    Entry(
        "brain-t1-ldm",
        (RemoteFile("models/autoencoder.pth"), RemoteFile("models/diffusion_model.pth")),
        "download both files of brain_image_synthesis_latent_diffusion_model (GenerativeModels' model zoo, "
        "on Google Drive) into a folder models/, then `diffaug import monai-bundle FOLDER --template "
        "brain-t1-ldm`",
        _facts("brain-t1-ldm", 566.9),
        _bundle("brain-t1-ldm"),
    ),
    Entry(
        "maisi-ct",
        (
            RemoteFile("models/autoencoder_epoch273.pt", md5="917cfb1e49631c8a713e3bb7c758fbca"),
            RemoteFile(_MAISI_UNET, md5="623bd02ff223b70d280cc994fcb70a69"),
            RemoteFile(_MAISI_CONTROL, md5="6c36572335372f405a0e85c760fa6dee"),
            _LABELS,
        ),
        "`python -m monai.bundle download maisi_ct_generative --version 0.4.5 --bundle_dir .`, then `diffaug "
        "import maisi --template maisi-ct`",
        _facts("maisi-ct", 259.0, control=True),
        _maisi("maisi-ct", "models/autoencoder_epoch273.pt", _MAISI_UNET, _MAISI_CONTROL),
    ),
    _flow(
        "nv-generate-ct",
        273.5,
        "nvidia/NV-Generate-CT",
        _AUTOENCODER_V1,
        "models/diff_unet_3d_rflow-ct.pt",
        "models/controlnet_3d_rflow-ct.pt",
    ),
    _flow(
        "nv-generate-mr",
        201.4,
        "nvidia/NV-Generate-MR",
        RemoteFile("models/autoencoder_v2.pt", "nvidia/NV-Generate-MR"),
        "models/diff_unet_3d_rflow-mr.pt",
    ),
    _flow(
        "nv-generate-mr-brain",
        201.4,
        "nvidia/NV-Generate-MR-Brain",
        _AUTOENCODER_V1,
        "models/diff_unet_3d_rflow-mr-brain_v1.pt",
    ),
    *(_difftumor(organ) for organ in ("liver", "pancreas", "kidney")),
)
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ALL}
