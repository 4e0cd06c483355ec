"""What checkpoints of Medical Diffusion do not say, and what may be said otherwise than they do."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from diffaug.generators.grid import Outside
from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.medical_diffusion.model import CITATION
from diffaug.generators.medical_diffusion.vqgan import PaddingMode

DIFFTUMOR = "Chen Q et al. Towards Generalizable Tumor Synthesis. CVPR 2024"


class Choices(BaseModel):
    """Settings of an import; None where nothing is said.

    `diffaug import medical-diffusion` has an option for each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    downsampling: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        default=None, description="of the VQ-GAN: depth, height, width"
    )
    groups: PositiveInt | None = Field(default=None, description="of the VQ-GAN's normalisation")
    padding: PaddingMode | None = Field(default=None, description="of the VQ-GAN's encoder")
    denoiser_groups: PositiveInt | None = Field(default=None, description="of the U-Net's normalisation")
    clip: bool | None = Field(default=None, description="samplers clip the clean latent to [-1, 1]")
    bfloat16: bool | None = Field(default=None, description="the networks may compute in mixed precision")
    sampler: str | None = None
    steps: PositiveInt | None = Field(default=None, description="of the sampler")
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        default=None, description="of the volumes, voxels, in the grid's axes"
    )
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = Field(default=None, description="mm")
    orientation: tuple[str, str, str] | None = Field(default=None, description="axis codes, such as RAS")
    outside: Outside | None = Field(
        default=None, description="what images show on the grid beyond the end of a scan"
    )
    axes: tuple[int, int, int] | None = Field(
        default=None, description="the grid's axes that the networks take for depth, height and width"
    )
    intensity: IntensityConvention | None = None
    channels: list[str] | None = None
    extent: Literal["object", "patch"] | None = None
    licence: str | None = None
    commercial_use: bool | None = Field(default=None, description="whether the licence allows it")
    redistribution: bool | None = Field(default=None, description="whether the licence allows it")
    citation: list[str] | None = None
    dataset: str | None = Field(default=None, description="what the networks were trained on")

    def over(self, other: "Choices") -> "Choices":
        """These choices, and the other's where these say nothing."""
        said = {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}
        if "sampler" in said:
            # The other's steps are those of its own sampler.
            said.setdefault("steps", None)
        elif said.get("clip") is False and other.sampler == "ancestral":
            # It does not go without clipping.
            said |= {"sampler": None, "steps": said.get("steps")}
        return other.model_copy(update=said)


def window(bounds: list[tuple[float, float]]) -> IntensityConvention:
    """Fixed values (low, high), one pair a channel, become -1 and 1; what lies beyond is clipped."""
    return IntensityConvention(kind="window", windows=bounds, typical=bounds, clip=1.0)


def percentiles(low: float, high: float, typical: list[tuple[float, float]]) -> IntensityConvention:
    """Each volume's own percentiles become -1 and 1; volumes made from nothing get the typical values."""
    return IntensityConvention(kind="percentile", low=low, high=high, typical=typical, clip=1.0)


def difftumor(steps: int) -> Choices:
    """What DiffTumor's inpainting networks with a schedule of `steps` were trained with.

    Those with 4 steps were sampled by all of them, clipped; those with 200 by 50 steps of DDIM, unclipped.
    """
    few = steps <= 4
    return Choices(
        downsampling=(4, 4, 4),
        groups=32,
        padding="replicate",
        clip=few,
        sampler="ancestral" if few else "ddim",
        shape=(96, 96, 96),
        spacing=(1.0, 1.0, 1.0),
        orientation=("R", "A", "S"),
        axes=(2, 0, 1),
        intensity=window([(-175.0, 250.0)]),
        channels=["CT"],
        extent="patch",
        licence="CC-BY-NC-ND: DiffTumor's terms, for its networks and what they make",
        commercial_use=False,
        redistribution=False,
        citation=[DIFFTUMOR, CITATION],
        dataset="DiffTumor",
    )


def problems(error: ValidationError, prefix: str = "") -> str:
    """What is wrong with which field, in one line; `prefix` makes options of the fields' names."""
    texts = []
    for each in error.errors():
        text = str(each["msg"]).removeprefix("Value error, ")
        # What pydantic finds by itself does not say what it found.
        if each["type"] != "value_error" and not isinstance(each["input"], dict):
            text += f", not {each['input']!r}"
        texts.append(f"{prefix}{'.'.join(map(str, each['loc']))}: {text}" if each["loc"] else text)
    return "; ".join(texts)
