"""What the files of published generators do not say: grids, units, parameters, licences.

Sizes of the networks are the published ones, too; those of a configuration go before them.
"""

from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from diffaug.generators.card import Parameter
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.latent_diffusion.networks import DiscreteProcess, FlowProcess
from diffaug.generators.latent_diffusion.sizes import AutoencoderKLSizes, ControlNetSizes, DiffusionUNetSizes

ROMBACH = (
    "Rombach R et al. High-resolution image synthesis with latent diffusion models. arXiv:2112.10752, 2022"
)
PINAYA = "Pinaya WHL et al. Brain imaging generation with latent diffusion models. arXiv:2209.07162, 2022"
GUO = "Guo P et al. MAISI: Medical AI for synthetic imaging. WACV 2025. arXiv:2409.11169"


class Template(BaseModel):
    """A published generator without its weights.

    Attributes:
        makes: in a few words.
        sizes: of the networks.
        shape, spacing (mm), orientation: of the volumes that it makes unasked.
        scale_factor: of the latents, where the files do not hold it.
        licence: of the weights; commercial_use, redistribution: whether it allows them; None: not stated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    makes: str
    autoencoder: AutoencoderKLSizes
    denoiser: DiffusionUNetSizes
    control: ControlNetSizes | None = None
    process: DiscreteProcess | FlowProcess
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: tuple[str, str, str] = ("R", "A", "S")
    scale_factor: float | None = None
    conditions: tuple[str, ...] = ()
    parameters: dict[str, Parameter] = Field(default_factory=dict)
    intensity: IntensityConvention
    channel: str
    sampler: str
    steps: int
    licence: str
    commercial_use: bool | None
    redistribution: bool | None
    citation: list[str]
    dataset: str


# MR is not clipped above: up to twice the percentile (network units are -1 at 0, 1 at the percentile).
_CLIP = 3.0


def _percentiles(high: float) -> IntensityConvention:
    """From 0 to a percentile of 99.5 become the networks' 0 and 1."""
    return IntensityConvention(kind="percentile", low=0.0, high=99.5, clip=_CLIP, typical=[(0.0, high)])


_HOUNSFIELD = IntensityConvention(
    kind="window", windows=[(-1000.0, 1000.0)], typical=[(-1000.0, 1000.0)], clip=1.0
)
_UNIT = "0 to 1, as the networks were trained: scaled over the training data's range"
_CONDITIONS = {
    "sex": Parameter(description="0 or 1, the training data's two sexes", default=0.5),
    "age": Parameter(description=f"age, {_UNIT}", default=0.5),
    "ventricular_volume": Parameter(description=f"volume of the ventricles, {_UNIT}", default=0.5),
    "brain_volume": Parameter(
        description=f"volume of the brain, normalised for the size of the head, {_UNIT}", default=0.5
    ),
}
_REGIONS = {"head": 0, "chest": 1, "abdomen": 2, "lower-body": 3}
_MODALITIES = {
    "unknown": 0,
    "ct": 1,
    "ct_wo_contrast": 2,
    "ct_contrast": 3,
    "mri": 8,
    "mri_t1": 9,
    "mri_t2": 10,
    "mri_flair": 11,
    "mri_pd": 12,
    "mri_dwi": 13,
    "mri_adc": 14,
    "mri_ssfp": 15,
    "mri_mra": 16,
    "mri_t1c": 17,
    "mri_swi": 20,
    "mri_t1_skull_stripped": 29,
    "mri_t2_skull_stripped": 30,
    "mri_flair_skull_stripped": 31,
    "mri_swi_skull_stripped": 32,
    "mri_mra_skull_stripped": 33,
}


def _modality(default: str) -> dict[str, Parameter]:
    """The modalities that go with one, by which the intensities are scaled."""
    kind = default[:2]
    choices = {name: code for name, code in _MODALITIES.items() if name[:2] in (kind, "un")}
    return {
        "modality": Parameter(
            description="modality and sequence of the image", default=default, choices=choices
        )
    }


_plain = partial(
    AutoencoderKLSizes, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, include_fc=False
)
_MAISI_AUTOENCODER = _plain(
    kind="AutoencoderKlMaisi",
    latent_channels=4,
    channels=(64, 128, 256),
    attention_levels=(False, False, False),
    num_res_blocks=(2, 2, 2),
)
_unet = partial(
    DiffusionUNetSizes,
    kind="DiffusionModelUNetMaisi",
    in_channels=4,
    out_channels=4,
    channels=(64, 128, 256, 512),
    attention_levels=(False, False, True, True),
    num_head_channels=(0, 0, 32, 32),
    include_spacing_input=True,
)
_DDPM_UNET = _unet(
    include_fc=False, include_top_region_index_input=True, include_bottom_region_index_input=True
)
_FLOW_UNET = _unet(include_fc=True, resblock_updown=True, num_class_embeds=128)
_MAISI_SHARED: dict[str, Any] = {
    "autoencoder": _MAISI_AUTOENCODER,
    "control": ControlNetSizes(),
    "shape": (256, 256, 128),
    "citation": [GUO, ROMBACH],
}
_CT: dict[str, Any] = {"spacing": (1.5, 1.5, 2.0), "channel": "CT", "intensity": _HOUNSFIELD}
_MR: dict[str, Any] = {
    "denoiser": _FLOW_UNET,
    "process": FlowProcess(),
    "spacing": (1.0, 1.0, 1.2),
    "channel": "MR",
    "intensity": _percentiles(1000.0),
    "sampler": "euler",
    "steps": 30,
    "control": None,
}

_ALL = (
    Template(
        name="brats-flair-ldm",
        makes="FLAIR MR of brains with tumours",
        autoencoder=_plain(latent_channels=8, channels=(64, 128, 256), attention_levels=(False,) * 3),
        denoiser=DiffusionUNetSizes(
            in_channels=8,
            out_channels=8,
            channels=(256, 256, 512),
            attention_levels=(False, True, True),
            num_head_channels=(0, 64, 64),
            include_fc=False,
        ),
        process=DiscreteProcess(),
        shape=(144, 176, 112),
        spacing=(1.1, 1.1, 1.1),
        # Latents were scaled by 1 / their standard deviation in training, about 1; the bundle's own sampler
        # decodes without it.
        scale_factor=1.0,
        intensity=_percentiles(1000.0),
        channel="FLAIR",
        sampler="ddim",
        steps=50,
        licence="Apache-2.0",
        commercial_use=True,
        redistribution=True,
        citation=[PINAYA, ROMBACH],
        dataset="Medical Segmentation Decathlon Task01_BrainTumour (CC-BY-SA 4.0), FLAIR of 388 cases",
    ),
    Template(
        name="brain-t1-ldm",
        makes="T1 MR of adult brains, by sex, age, ventricular and brain volume",
        autoencoder=_plain(latent_channels=3, channels=(64, 128, 128, 128), attention_levels=(False,) * 4),
        denoiser=DiffusionUNetSizes(
            in_channels=7,
            out_channels=3,
            channels=(256, 512, 768),
            attention_levels=(False, True, True),
            num_head_channels=(0, 512, 768),
            resblock_updown=True,
            with_conditioning=True,
            cross_attention_dim=4,
            upcast_attention=True,
        ),
        process=DiscreteProcess(beta_end=0.0205),
        shape=(160, 224, 160),
        spacing=(1.0, 1.0, 1.0),
        scale_factor=1.0,
        conditions=("sex", "age", "ventricular_volume", "brain_volume"),
        parameters=_CONDITIONS,
        intensity=_percentiles(1000.0),
        channel="T1",
        sampler="ddim",
        steps=50,
        licence="not stated (code Apache-2.0; trained on UK Biobank)",
        commercial_use=None,
        redistribution=None,
        citation=[PINAYA, ROMBACH],
        dataset="UK Biobank, T1 of 31740 participants",
    ),
    Template(
        name="maisi-ct",
        makes="CT of any region of the body, from label maps of 132 structures",
        denoiser=_DDPM_UNET,
        process=DiscreteProcess(),
        parameters={
            "top_region": Parameter(
                description="region of the body at the upper end", default="chest", choices=_REGIONS
            ),
            "bottom_region": Parameter(
                description="region of the body at the lower end", default="abdomen", choices=_REGIONS
            ),
        },
        sampler="ancestral",
        steps=1000,
        licence="NCLS v1 (NVIDIA, non-commercial)",
        commercial_use=False,
        redistribution=False,
        dataset="CT of several public datasets (MAISI)",
        **_MAISI_SHARED,
        **_CT,
    ),
    Template(
        name="nv-generate-ct",
        makes="CT of any region of the body, from label maps of 132 structures, in 30 steps",
        denoiser=_FLOW_UNET,
        process=FlowProcess(),
        parameters=_modality("ct"),
        sampler="euler",
        steps=30,
        licence="NVIDIA Open Model License",
        commercial_use=True,
        redistribution=True,
        dataset="CT of several public datasets (NV-Generate)",
        **_MAISI_SHARED,
        **_CT,
    ),
    Template(
        name="nv-generate-mr",
        makes="MR of several regions and sequences",
        parameters=_modality("mri"),
        licence="NVIDIA Non-Commercial (autoencoder_v2: research only)",
        commercial_use=False,
        redistribution=False,
        dataset="MR of several public datasets (NV-Generate)",
        **{**_MAISI_SHARED, **_MR},
    ),
    Template(
        name="nv-generate-mr-brain",
        makes="MR of brains, several sequences",
        parameters=_modality("mri_t1"),
        licence="NVIDIA Open Model License",
        commercial_use=True,
        redistribution=True,
        dataset="MR of brains of several public datasets (NV-Generate)",
        **{**_MAISI_SHARED, **_MR},
    ),
)
TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
MAISI = tuple(name for name in TEMPLATES if name.startswith(("maisi", "nv-")))
