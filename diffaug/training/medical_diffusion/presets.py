"""The four data recipes of Medical Diffusion (Khader et al. 2023, doi 10.1038/s41598-023-34341-2) as presets.

A preset fixes what the data decide in a plan: grid, intensities, down-sampling, the networks' axes and the
augmentation. The canvases of a fit and the verbs of its generator follow from that plan, as from any other.
`Preset.pipeline` is the same preprocessing in TorchIO's terms, for scans prepared outside diffaug.

What differs from the published preprocessing, in all of them: the orientation is canonical and the spacing
known; beyond a scan lies background, not a middle grey; the scale does not depend on the voxels' dtype; only
training cases are augmented, by more than a mirror (and ADNI's factor on the intensities), and mirrored
only where that makes no other anatomy: chests are not. Networks, batches and iterations are those of any
other fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffaug.errors import DiffaugError
from diffaug.generators.grid import LARGER_SCAN
from diffaug.generators.intensity import IntensityConvention
from diffaug.training.augmentation import AugmentationConfig
from diffaug.training.fingerprint import ORIENTATION, Fingerprint
from diffaug.training.plan import GridPlan

if TYPE_CHECKING:
    import torchio as tio

Triple = tuple[float, float, float]

# Air is -1000 HU and is part of every CT scan; MR images hold nothing as low.
DARKEST_CT = -500.0
# Length of a centred scan, of the grid's, at least.
CENTRED_SCAN = 1.125
# The grid's axes, to readers of messages.
AXES = ("left-right", "posterior-anterior", "inferior-superior")
# A rotation of a few degrees moves the ends of a slice of 256 voxels by more than the canvas's margin.
WIDE_SLICES = AugmentationConfig(rotation=0, mirror_axes=(0,))


@dataclass(frozen=True)
class Preset:
    """A published recipe: what scans it is for, and what a plan made by it says.

    Attributes:
        description: the scans it is for, and what is made of them.
        shape: of the grid, voxels in RAS order.
        spacing: of the grid, mm; None takes the data's median.
        downsampling: of the autoencoder, on each axis.
        axes: the grid's axes that the networks take for depth, height and width.
        window: HU that become -1 and 1; None for MR, where each scan's own minimum and maximum do.
        centred: the structure has to lie in the middle of the scan, amid background.
        widest: how long a scan may be left-right, as a share of its length posterior-anterior; None for any.
        preparation: what to do with scans for which that, or the grid, does not hold.
    """

    name: str
    description: str
    shape: tuple[int, int, int]
    spacing: Triple | None
    downsampling: int
    axes: tuple[int, int, int]
    window: tuple[float, float] | None
    augmentation: AugmentationConfig
    centred: bool
    widest: float | None = None
    preparation: str = ""

    def grid(self, fingerprint: Fingerprint) -> GridPlan:
        """The grid of a plan: its spacing is the recipe's or the data's median, and coarser on an axis on
        which the median scan (where all are labelled, the largest label) would not fit otherwise."""
        if self.spacing is not None:
            return self._grid(self.spacing)
        spacing = []
        for n, own, length in zip(self.shape, fingerprint.spacing_median, _lengths(fingerprint), strict=True):
            slack = 1.0 if _all_labelled(fingerprint) else LARGER_SCAN
            spacing.append(round(own if length <= slack * n * own else length / n, 4))
        return self._grid((spacing[0], spacing[1], spacing[2]))

    def _grid(self, spacing: Triple) -> GridPlan:
        return GridPlan(orientation=ORIENTATION, spacing=spacing, shape=self.shape, outside="background")

    def intensity(self, fingerprint: Fingerprint) -> IntensityConvention:
        """How intensities become network units."""
        if self.window is not None:
            return IntensityConvention(kind="window", clip=1, windows=[self.window], typical=[self.window])
        typical = list(zip(fingerprint.intensity_min, fingerprint.intensity_max, strict=True))
        return IntensityConvention(kind="percentile", low=0, high=100, clip=1, typical=typical)

    def check(self, fingerprint: Fingerprint, channels: tuple[str, ...]) -> None:
        """Raises DiffaugError for a dataset that the recipe is not for, naming the value found."""
        if len(channels) != 1:
            raise DiffaugError(
                f"{self.name} is for scans of one channel, the dataset has {len(channels)}, "
                f"{list(channels)}: leave all but one out, or fit without a preset"
            )
        darkest = fingerprint.intensity_low[0]
        found = f"the darkest 0.5 % of the dataset's voxels lie at {darkest:g} and below (median over cases)"
        if self.window is not None and darkest > DARKEST_CT:
            raise DiffaugError(
                f"{self.name} is for CT in Hounsfield units, where air is -1000; {found}: convert the scans "
                "to HU, or take another preset"
            )
        if self.window is None and (darkest < DARKEST_CT or channels[0].strip().upper() == "CT"):
            raise DiffaugError(
                f"{self.name} is for MR; {found} and the channel is called {channels[0]!r}, so this is CT: "
                "take another preset, or fit without one"
            )
        if _all_labelled(fingerprint):
            return
        across, along, _ = _lengths(fingerprint)
        if self.widest is not None and across > self.widest * along:
            raise DiffaugError(
                f"the median scan is {across:.0f} mm long {AXES[0]} and {along:.0f} mm {AXES[1]}, "
                f"{self.name} takes at most {self.widest:g} times as much: {self.preparation}; or give label "
                "maps, around which the grid is laid"
            )
        if self.spacing is None:
            return
        reach = self.augmentation.reach(self.shape, self.spacing)
        for axis, length in enumerate(_lengths(fingerprint)):
            grid = self.shape[axis] * self.spacing[axis]
            canvas = grid + 2 * reach[axis] * self.spacing[axis]
            # A scan whose structure was brought to the middle is a little longer than the grid.
            low, high = (
                (CENTRED_SCAN * grid, LARGER_SCAN * grid) if self.centred else (0, LARGER_SCAN * canvas)
            )
            if not low <= length <= high:
                raise DiffaugError(
                    f"the median scan is {length:.0f} mm long {AXES[axis]}, {self.name} takes {low:.0f} to "
                    f"{high:.0f} mm: {self.preparation}; or give label maps, around which the grid is laid"
                )

    def pipeline(self, spacing: Triple | None = None) -> tio.Compose:
        """The preprocessing as a TorchIO transform of a subject or an image; needs the extra "torchio".

        What comes out has the grid's shape and spacing, in RAS, and values from -1 to 1.

        Args:
            spacing: of the grid, mm, for the presets that leave it to the data: `plan.grid.spacing`.

        Raises:
            DiffaugError: no spacing was given where the preset has none.
        """
        from diffaug.training.medical_diffusion.pipelines import PIPELINES

        spacing = spacing or self.spacing
        if spacing is None:
            raise DiffaugError(
                f"{self.name} takes the spacing of its data: give it, as pipeline(spacing=plan.grid.spacing)"
            )
        return PIPELINES[self.name](spacing, self.shape)


def find_preset(name: str) -> Preset:
    """The preset of this name; raises DiffaugError where there is none."""
    if name not in PRESETS:
        raise DiffaugError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _all_labelled(fingerprint: Fingerprint) -> bool:
    """Whether every grid is laid around a label."""
    return fingerprint.label_box_largest_mm is not None and fingerprint.labelled_cases == fingerprint.cases


def _lengths(fingerprint: Fingerprint) -> list[float]:
    """What the grid has to hold on each axis, mm: the largest label where all cases have one, else the
    median scan."""
    if _all_labelled(fingerprint) and fingerprint.label_box_largest_mm is not None:
        return fingerprint.label_box_largest_mm
    return [n * s for n, s in zip(fingerprint.shape_median, fingerprint.spacing_median, strict=True)]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="knee-mrnet",
            description="Knee MR, sagittal T2 with fat saturation, as MRNet's: 32 sagittal slices of 256 x "
            "256 at the data's spacing. Mirrored left-right, a right knee for a left one; the published run "
            "mirrored front to back.",
            shape=(32, 256, 256),
            spacing=None,
            downsampling=8,
            axes=(0, 2, 1),
            window=None,
            augmentation=WIDE_SLICES,
            centred=False,
        ),
        Preset(
            name="brain-adni",
            description="Brain MR, T1 MP-RAGE, skull-stripped (0 around the brain), as ADNI's: the brain's "
            "box in 64^3 voxels of 3 mm. The published run padded every box to a cube of its longest side "
            "and resized that to 64^3, so that voxels had another size in every case.",
            shape=(64, 64, 64),
            spacing=(3.0, 3.0, 3.0),
            downsampling=2,
            axes=(0, 2, 1),
            window=None,
            augmentation=AugmentationConfig(mirror_axes=(0,)),
            centred=True,
            preparation="bring the brain to the middle of each scan (CenterForeground in "
            "diffaug.training.medical_diffusion.pipelines)",
        ),
        Preset(
            name="breast-duke",
            description="Breast MR, axial T1 without fat saturation, as DUKE's, cut into a left and a right "
            "half: 32 axial slices of 256 x 256 at the data's spacing, coarser where a half would not fit; "
            "the published run cropped it there. Mirrored left-right; the published run mirrored front to "
            "back.",
            shape=(256, 256, 32),
            spacing=None,
            downsampling=8,
            axes=(2, 1, 0),
            window=None,
            augmentation=WIDE_SLICES,
            centred=False,
            widest=0.75,
            preparation="cut the scans into halves (split_breasts in "
            "diffaug.training.medical_diffusion.pipelines)",
        ),
        Preset(
            name="chest-lidc",
            description="Chest CT in HU, as LIDC-IDRI's: the middle 320 mm in 128^3 voxels of 2.5 mm, -1000 "
            "to 400 HU; air beyond the scan. The published run mirrored half of the volumes, which puts "
            "hearts on the right or backs in front, and clipped after two cubic interpolations (to 1 mm, "
            "then to 2.5), here it is before a linear one.",
            shape=(128, 128, 128),
            spacing=(2.5, 2.5, 2.5),
            downsampling=8,
            axes=(2, 1, 0),
            window=(-1000.0, 400.0),
            augmentation=AugmentationConfig(),
            centred=False,
            preparation='crop the scans to the chest (torchio.CropOrPad(380, units="mm", only_crop=True))',
        ),
    )
}
