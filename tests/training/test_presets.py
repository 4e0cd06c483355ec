"""The published recipes on phantoms: pipelines, diffaug's own canvases, plans, and what is refused."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
import typer
from numpy.typing import NDArray

from diffaug.cli.fit import Axis, _mirror_axes
from diffaug.cli.fit import Preset as PresetOption
from diffaug.datasets.reading import Dataset, read_dataset
from diffaug.datasets.volumes import load_case
from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.grid import Grid, place
from diffaug.generators.intensity import fit_intensity_map
from diffaug.generators.medical_diffusion.factorised_unet import UNetConfig
from diffaug.generators.medical_diffusion.vqgan import VQGANConfig
from diffaug.progress import Progress
from diffaug.training.augmentation import AugmentationConfig, Augmenter
from diffaug.training.cases import make_canvases
from diffaug.training.fingerprint import Fingerprint
from diffaug.training.fit import fit_generator
from diffaug.training.medical_diffusion import planning
from diffaug.training.medical_diffusion.pipelines import CenterForeground, split_breasts
from diffaug.training.medical_diffusion.plan import MedicalDiffusionPlan
from diffaug.training.medical_diffusion.presets import PRESETS
from diffaug.training.plan import GridPlan
from diffaug.training.subsets import split_cases

QUIET = Progress(quiet=True)
Triple = tuple[float, float, float]

# -- phantoms: arrays in RAS, then stored in any orientation -------------------------------------------------


def coordinates(shape: tuple[int, int, int], spacing: Triple) -> list[NDArray[np.float64]]:
    """Millimetres from the volume's centre along each axis, shaped to broadcast."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij", sparse=True))


def ellipsoid(x: list[NDArray[np.float64]], centre: Triple, radii: Triple) -> NDArray[np.bool_]:
    return sum(((a - c) / r) ** 2 for a, c, r in zip(x, centre, radii, strict=True)) < 1


def texture(shape: tuple[int, int, int], seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=shape)


def nifti(
    array: NDArray[Any], spacing: Triple, orientation: str = "RAS", tilt: float = 0.0
) -> nib.Nifti1Image:
    """An RAS array stored in another orientation, its centre at (5, -20, 30) mm, tilted about the first."""
    tilt = np.deg2rad(tilt)
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    affine[:3, 3] = np.array([5, -20, 30]) - affine[:3, :3] @ ((np.array(array.shape) - 1) / 2)
    image = nib.Nifti1Image(array, affine)
    codes = nib.orientations.axcodes2ornt(tuple(orientation))
    stored = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), codes))
    assert nib.aff2axcodes(stored.affine) == tuple(orientation)
    return stored


def chest(shape: tuple[int, int, int], spacing: Triple, seed: int = 0) -> NDArray[np.int16]:
    """HU: a body that the scan cuts above and below, lungs, a spine beyond 400 HU, a table, and the value
    that scanners write outside their circle."""
    x = coordinates(shape, spacing)
    hu = np.full(shape, -1000.0)
    hu[np.broadcast_to(abs(x[1] + 125) < 6, shape)] = 120  # table, behind the patient
    hu[ellipsoid(x, (0, 0, 0), (150, 105, 1e6))] = 40
    for side in (-70, 70):
        hu[ellipsoid(x, (side, 5, 10), (50, 75, 110))] = -850
    hu[ellipsoid(x, (0, -70, 0), (20, 18, 1e6))] = 700
    hu += 15 * texture(shape, seed)
    hu[np.broadcast_to(np.hypot(x[0], x[1]) > 165, shape)] = -2000
    return hu.astype(np.int16)


def brain(shape: tuple[int, int, int], spacing: Triple, seed: int = 0) -> NDArray[np.float64]:
    """Arbitrary units up to about 900, 0 around a brain that does not lie in the middle of the scan."""
    x = coordinates(shape, spacing)
    volume = 500 + 60 * texture(shape, seed)
    volume[ellipsoid(x, (0, 8, 30), (25, 30, 18))] += 300
    return np.where(ellipsoid(x, (0, 8, 22), (66, 82, 60)), volume.clip(1), 0).round()


def knee(shape: tuple[int, int, int], spacing: Triple, seed: int = 0) -> NDArray[np.float64]:
    x = coordinates(shape, spacing)
    volume = 40 + 10 * abs(texture(shape, seed))
    volume[ellipsoid(x, (0, 0, 45), (40, 30, 60))] += 350
    volume[ellipsoid(x, (0, 0, -50), (40, 30, 50))] += 300
    volume[ellipsoid(x, (0, 50, 20), (18, 12, 20))] += 600
    return volume.round()


def breasts(shape: tuple[int, int, int], spacing: Triple, seed: int = 0) -> NDArray[np.float64]:
    """Two breasts in front of a chest wall; the patient's left one is twice as bright."""
    x = coordinates(shape, spacing)
    volume = 10 + 3 * abs(texture(shape, seed))
    volume[np.broadcast_to(x[1] < -40, shape)] += 150
    volume[ellipsoid(x, (-70, -20, 0), (45, 60, 40))] += 600
    volume[ellipsoid(x, (70, -20, 0), (45, 60, 40))] += 300
    return volume.round()


def save(image: nib.Nifti1Image, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, file)
    return file


def fingerprint(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "cases": 10,
        "labelled_cases": 0,
        "spacing_median": [2.0, 2.0, 2.0],
        "shape_median": [80, 80, 80],
        "shape_largest": [80, 80, 80],
        "label_box_largest_mm": None,
        "label_volumes_mm3": {},
        "intensity_low": [0.0],
        "intensity_high": [800.0],
        "intensity_min": [0.0],
        "intensity_max": [1200.0],
    }
    return Fingerprint.model_validate(values | changes)


CT = {"intensity_low": [-1010.0], "intensity_high": [900.0]}


def on_grid(image: Any, name: str, spacing: Triple | None = None) -> NDArray[np.float32]:
    """What diffaug's own machinery makes of a NIfTI image: a canvas without its margin."""
    preset = PRESETS[name]
    data = fingerprint(**(CT if preset.window else {}))
    grid = preset.grid(data)
    volume = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))[None]
    placement = place(
        Grid(grid.orientation, spacing or grid.spacing, grid.shape, grid.outside),
        volume.shape[1:],
        image.affine,
    )
    normalised = fit_intensity_map(volume, preset.intensity(data)).normalise(volume)
    return placement.image_to_grid(normalised[None])[0, 0].numpy()


# -- pipelines and canvases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "spacing", "orientation"),
    [((180, 176, 101), (1.9, 1.95, 2.8), "LPS"), ((96, 90, 60), (3.4, 3.6, 5.0), "RAS")],
    ids=["finer than the grid", "coarser than the grid"],
)
def test_chest_pipeline_makes_the_canvas_but_for_the_kind_of_blur(
    tmp_path: Path, shape: tuple[int, int, int], spacing: Triple, orientation: str
) -> None:
    """Both interpolate linearly; before it diffaug blurs by 0.5 sqrt(k^2 - 1) voxels, TorchIO by 0.42: up to
    a tenth of the range where its ends meet."""
    image = nifti(chest(shape, spacing), spacing, orientation)
    out = PRESETS["chest-lidc"].pipeline()(tio.ScalarImage(save(image, tmp_path / "chest.nii.gz")))
    assert out.shape == (1, 128, 128, 128)
    assert out.spacing == pytest.approx((2.5, 2.5, 2.5))
    assert out.orientation == ("R", "A", "S")
    assert -1 <= out.data.min() <= out.data.max() <= 1
    difference = abs(out.data[0].numpy() - on_grid(image, "chest-lidc"))
    assert difference.max() < 0.2
    assert difference.mean() < 0.005


@pytest.mark.parametrize("shape", [(128, 120, 110), (141, 121, 111)])
def test_chest_of_the_grids_spacing_is_copied(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    image = nifti(chest(shape, (2.5, 2.5, 2.5)), (2.5, 2.5, 2.5), "LPS")
    out = PRESETS["chest-lidc"].pipeline()(tio.ScalarImage(save(image, tmp_path / "chest.nii.gz")))
    np.testing.assert_allclose(out.data[0], on_grid(image, "chest-lidc"), atol=1e-6)


def test_chest_keeps_its_place_and_its_units(tmp_path: Path) -> None:
    """Lungs, body, bone and air have the values that HU say, where the patient has them; air lies beyond."""
    shape, spacing = (160, 160, 90), (2.1, 2.1, 2.8)
    image = nifti(chest(shape, spacing), spacing, "LPS")
    out = PRESETS["chest-lidc"].pipeline()(tio.ScalarImage(save(image, tmp_path / "chest.nii.gz")))

    def around(x: float, y: float, z: float) -> NDArray[np.float32]:
        # The phantom's centre is at (5, -20, 30) mm.
        voxel = (
            nib.affines.apply_affine(np.linalg.inv(out.affine), (x + 5, y - 20, z + 30)).round().astype(int)
        )
        i, j, k = (slice(n - 1, n + 2) for n in voxel)
        return out.data[0, i, j, k].numpy()

    assert around(70, 5, 10) == pytest.approx(2 * 150 / 1400 - 1, abs=0.03)
    assert around(0, 60, 0) == pytest.approx(2 * 1040 / 1400 - 1, abs=0.03)
    assert around(0, -70, 0) == pytest.approx(1)
    assert around(0, 140, 0) == pytest.approx(-1, abs=0.03)
    beyond = out.data[0, :, :, :20]  # the scan begins 34 mm above the grid's lower face
    assert (beyond[:, :, :12] == -1).all()
    assert (out.data[0, 64, 64, 14:114] > 0).all()


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32, np.float64])
def test_brain_pipeline_makes_the_canvas_whatever_the_dtype(tmp_path: Path, dtype: type) -> None:
    spacing = (1.6, 2.0, 2.0)
    volume = brain((110, 120, 118), spacing)
    file = save(nifti(volume.astype(dtype), spacing, "PIR"), tmp_path / "raw.nii.gz")
    out = PRESETS["brain-adni"].pipeline()(tio.ScalarImage(file))
    CenterForeground()(tio.ScalarImage(file)).save(tmp_path / "centred.nii.gz")
    difference = abs(out.data[0].numpy() - on_grid(nib.load(tmp_path / "centred.nii.gz"), "brain-adni"))
    assert difference.max() < 0.2
    assert difference.mean() < 0.005
    assert out.data.dtype == torch.float32
    assert out.spacing == pytest.approx((3.0, 3.0, 3.0))
    again = PRESETS["brain-adni"].pipeline()(tio.ScalarImage(tmp_path / "centred.nii.gz"))
    assert again.data.equal(out.data)
    reference = save(nifti(volume.astype(np.int32), spacing, "PIR"), tmp_path / "reference.nii.gz")
    assert out.data.equal(PRESETS["brain-adni"].pipeline()(tio.ScalarImage(reference)).data)


def test_brain_is_brought_to_the_middle_with_its_lengths_amid_background(tmp_path: Path) -> None:
    spacing = (2.0, 2.0, 2.0)
    file = save(nifti(brain((100, 110, 100), spacing), spacing), tmp_path / "brain.nii.gz")
    out = PRESETS["brain-adni"].pipeline()(tio.ScalarImage(file)).data[0]
    found = (out > -0.9).nonzero()
    low, high = found.amin(dim=0), found.amax(dim=0)
    assert ((low + high - 63).abs() <= 2).all()
    assert (high - low + 1).numpy() == pytest.approx(np.array([132, 164, 120]) / 3, abs=2)
    assert (out[[0, -1]] == -1).all()


def test_a_scan_without_foreground_is_refused() -> None:
    with pytest.raises(DiffaugError, match="nothing in the image is above 0"):
        PRESETS["brain-adni"].pipeline()(tio.ScalarImage(tensor=torch.zeros(1, 20, 20, 20)))


@pytest.mark.parametrize(
    ("shape", "orientation", "tilt"),
    [((32, 256, 256), "RAS", 0), ((29, 256, 251), "PIR", 7), ((35, 261, 257), "SLA", 3)],
    ids=["as published", "smaller, oblique", "larger, oblique"],
)
def test_knee_pipeline_copies_sagittal_slices_as_the_canvas_does(
    tmp_path: Path, shape: tuple[int, int, int], orientation: str, tilt: float
) -> None:
    spacing = (3.5, 0.6, 0.62)
    image = nifti(knee(shape, spacing).astype(np.uint16), spacing, orientation, tilt)
    out = PRESETS["knee-mrnet"].pipeline(spacing)(tio.ScalarImage(save(image, tmp_path / "knee.nii.gz")))
    assert out.shape == (1, 32, 256, 256)
    assert out.spacing == pytest.approx(spacing)
    canvas = on_grid(image, "knee-mrnet", spacing)
    values = out.data[0].numpy()
    shown = np.ix_(*(slice_of(n, m) for n, m in zip(shape, (32, 256, 256), strict=True)))
    np.testing.assert_allclose(values, canvas, atol=1e-6)
    assert values.max() == pytest.approx(1)
    padding = np.ones(values.shape, bool)
    padding[shown] = False
    assert (values[padding] == -1).all()


def slice_of(size: int, length: int) -> NDArray[np.int64]:
    """The voxels of a grid axis of `length` that a centred volume of `size` voxels covers."""
    start = max(0, (length - size) // 2)
    return np.arange(start, start + min(size, length))


def test_constant_slices_are_no_part_of_the_range(tmp_path: Path) -> None:
    """A scanner's zeros around the slices would else lift the darkest tissue from the low end."""
    spacing = (3.5, 0.6, 0.6)
    volume = np.pad(knee((24, 256, 250), spacing) + 200, ((4, 4), (0, 0), (3, 3)))
    image = nifti(volume.astype(np.int16), spacing, "PIR")
    out = PRESETS["knee-mrnet"].pipeline(spacing)(tio.ScalarImage(save(image, tmp_path / "knee.nii.gz")))
    np.testing.assert_allclose(out.data[0], on_grid(image, "knee-mrnet", spacing), atol=1e-6)
    assert (out.data[0, 4:28, 3:253, 3:253] < -0.99).any()


def test_breasts_are_halved_in_place_and_each_has_its_own_scale(tmp_path: Path) -> None:
    shape, spacing = (401, 230, 32), (0.9, 0.9, 3.0)
    file = save(nifti(breasts(shape, spacing).astype(np.int16), spacing, "LAS"), tmp_path / "both.nii.gz")
    halves = split_breasts(tio.ScalarImage(file))
    assert [half.spatial_shape for half in halves] == [(200, 230, 32), (201, 230, 32)]
    for half, side in zip(halves, (-70, 70), strict=True):
        half.save(tmp_path / "half.nii.gz")
        image = nib.load(tmp_path / "half.nii.gz")
        position = (
            nib.affines.apply_affine(np.linalg.inv(image.affine), (side + 5, -40, 30)).round().astype(int)
        )
        assert image.get_fdata()[tuple(position)] > 300
        out = PRESETS["breast-duke"].pipeline(spacing)(tio.ScalarImage(tmp_path / "half.nii.gz"))
        assert out.shape == (1, 256, 256, 32)
        values, canvas = out.data[0].numpy(), on_grid(image, "breast-duke", spacing)
        np.testing.assert_allclose(values, canvas, atol=1e-6)
        assert (values.min(), values.max()) == (-1, pytest.approx(1))
        assert (values[:20] == -1).all()


def test_label_maps_follow_their_image_onto_the_grid(tmp_path: Path) -> None:
    spacing = (2.0, 2.0, 2.5)
    hu = chest((160, 160, 100), spacing)
    scan = save(nifti(hu, spacing, "LPS"), tmp_path / "chest.nii.gz")
    lungs = save(nifti((hu < -700).astype(np.uint8) * 3, spacing, "LPS"), tmp_path / "lungs.nii.gz")
    out = PRESETS["chest-lidc"].pipeline()(tio.Subject(ct=tio.ScalarImage(scan), air=tio.LabelMap(lungs)))
    label = out["air"].data
    assert label.unique().tolist() == [0, 3]
    assert (label[:, :, :, :8] == 0).all()
    assert (out["ct"].data[label == 3] < 0).float().mean() > 0.97


def test_presets_that_take_the_datas_spacing_ask_for_it() -> None:
    with pytest.raises(DiffaugError, match=r"give it, as pipeline\(spacing=plan\.grid\.spacing\)"):
        PRESETS["knee-mrnet"].pipeline()


# -- plans ---------------------------------------------------------------------------------------------------

# Few and large voxels: as long as real scans, and quick to read.
SCANS: dict[str, tuple[Any, tuple[int, int, int], Triple]] = {
    "knee-mrnet": (knee, (15, 40, 40), (7.0, 4.0, 4.0)),
    "brain-adni": (brain, (38, 38, 38), (6.0, 6.0, 6.0)),
    "breast-duke": (breasts, (28, 40, 16), (6.0, 6.0, 6.0)),
    "chest-lidc": (chest, (43, 43, 38), (8.0, 8.0, 8.0)),
}


def make_dataset(folder: Path, name: str, count: int = 3) -> Dataset:
    make, shape, spacing = SCANS[name]
    for n in range(count):
        volume = make(shape, spacing, seed=n).astype(np.int16)
        save(nifti(volume, spacing, "LPS"), folder / "images" / f"case{n}.nii.gz")
    return read_dataset(folder, images=folder / "images")


@pytest.fixture
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the time of training steps, and memory for them, for granted."""
    monkeypatch.setattr(planning, "available_memory", lambda device: 64e9)
    monkeypatch.setattr(planning, "time_steps", lambda plan, accelerator: (0.5, 1.0, 1.0))


@pytest.mark.usefixtures("quick_steps")
@pytest.mark.parametrize(
    ("name", "grid", "downsampling", "axes", "latent"),
    [
        ("knee-mrnet", ((7.0, 4.0, 4.0), (32, 256, 256)), 8, (0, 2, 1), (4, 32, 32)),
        ("brain-adni", ((3.0, 3.0, 3.0), (64, 64, 64)), 2, (0, 2, 1), (32, 32, 32)),
        ("breast-duke", ((6.0, 6.0, 6.0), (256, 256, 32)), 8, (2, 1, 0), (4, 32, 32)),
        ("chest-lidc", ((2.5, 2.5, 2.5), (128, 128, 128)), 8, (2, 1, 0), (16, 16, 16)),
    ],
)
def test_the_plan_is_the_published_recipe(
    tmp_path: Path,
    name: str,
    grid: tuple[Triple, tuple[int, int, int]],
    downsampling: int,
    axes: tuple[int, int, int],
    latent: tuple[int, int, int],
) -> None:
    dataset = make_dataset(tmp_path, name)
    plan = fit_generator(dataset, tmp_path / "fit", preset=name, budget=600, dry_run=True, progress=QUIET)
    assert isinstance(plan, MedicalDiffusionPlan)
    assert not plan.problems()
    assert (plan.preset, plan.architecture, plan.diffusion_steps) == (name, "medical-diffusion", 300)
    assert plan.grid == GridPlan(spacing=grid[0], shape=grid[1], outside="background")
    assert plan.autoencoder.downsampling == (downsampling,) * 3
    assert plan.autoencoder.latent_shape([plan.grid.shape[axis] for axis in plan.axes]) == latent
    assert plan.axes == axes
    assert plan.augmentation.mirror_axes == (() if name == "chest-lidc" else (0,))
    assert plan.intensity.clip == 1
    if name == "chest-lidc":
        assert plan.intensity.windows == plan.intensity.typical == [(-1000, 400)]
    else:
        assert (plan.intensity.kind, plan.intensity.low, plan.intensity.high) == ("percentile", 0, 100)
        scans = [load_case(case).image for case in dataset.cases if case in split_cases(dataset, 0).train]
        ends = np.median([(scan.min(), scan.max()) for scan in scans], axis=0)
        assert plan.intensity.typical == [tuple(ends)], "units of what is made from nothing"
    # Without resampling, what trains is what the pipeline makes.
    canvases = make_canvases(plan, dataset.cases[:1], tmp_path / "canvases", QUIET)
    image, _ = canvases.on_grid(0, plan.grid.shape)
    assert -1 <= image.min() <= image.max() <= 1
    if PRESETS[name].spacing is None:
        file = dataset.cases[0].images[0]
        out = PRESETS[name].pipeline(plan.grid.spacing)(tio.ScalarImage(file))
        np.testing.assert_allclose(out.data[0], image[0], atol=1e-3)


@pytest.mark.usefixtures("quick_steps")
def test_mirrors_that_the_user_asks_for_replace_the_presets(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, "brain-adni")
    plan = fit_generator(
        dataset, tmp_path / "fit", preset="brain-adni", mirror_axes=(1,), dry_run=True, progress=QUIET
    )
    assert isinstance(plan, MedicalDiffusionPlan)
    assert plan.augmentation.mirror_axes == (1,)


@pytest.mark.usefixtures("quick_steps")
def test_no_mirrors_at_all_is_an_answer_too(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, "brain-adni")
    options: dict[str, Any] = {"preset": "brain-adni", "mirror_axes": (), "progress": QUIET}
    plan = fit_generator(dataset, tmp_path / "fit", dry_run=True, **options)
    assert isinstance(plan, MedicalDiffusionPlan)
    assert plan.augmentation.mirror_axes == ()
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    again = fit_generator(dataset, tmp_path / "fit", dry_run=True, plan=tmp_path / "plan.json", **options)
    assert again == plan


def test_what_augmentation_moves_in_was_scanned_or_is_background() -> None:
    """A canvas holds all that the largest moves reach; beyond it a mirror would make anatomy up."""
    shape, spacing = (24, 32, 20), (1.0, 1.5, 2.0)
    augmentation = AugmentationConfig(gamma=0.0)
    margins = augmentation.reach(shape, spacing)
    x = np.meshgrid(*(np.arange(n + 2 * m) for n, m in zip(shape, margins, strict=True)), indexing="ij")
    ramp = (sum(a / 100 for a in x) - 0.9).astype(np.float32)[None]
    for seed in range(20):
        moved, _ = Augmenter(augmentation, shape, spacing, "background", threads=1).draw(ramp, None, seed)
        # A moved ramp is a ramp: mirrored or missing voxels would bend it.
        for axis in range(1, 4):
            assert abs(np.diff(moved, n=2, axis=axis)).max() < 2e-3, seed
    outside = Augmenter(augmentation, (64, 64, 64), spacing, "background", threads=1).draw(ramp, None, 0)[0]
    assert outside[0, 0, 0, 0] == pytest.approx(-1)


def test_augmentation_does_not_turn_flat_voxels() -> None:
    """8 degrees between axes of 32 and 256 voxels would move the outermost of them by 18 slices."""
    slices = np.arange(40, dtype=np.float32)[:, None, None]
    canvas = np.broadcast_to(slices / 20 - 1, (1, 40, 72, 72)).astype(np.float32)
    for name in ("knee-mrnet", "breast-duke"):
        augmentation = PRESETS[name].augmentation.model_copy(update={"gamma": 0.0, "mirror_axes": ()})
        drawn, _ = Augmenter(augmentation, (32, 64, 64), threads=1).draw(canvas, None, seed=1)
        assert np.ptp(drawn[0], axis=(1, 2)).max() < 0.01


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found", "channels", "said"),
    [
        (
            "chest-lidc",
            {"intensity_low": [12.0]},
            ["CT"],
            "Hounsfield units, where air is -1000; .* at 12 and",
        ),
        ("chest-lidc", {"intensity_low": [-1.0]}, ["CT"], "at -1 and below"),
        ("knee-mrnet", {"intensity_low": [-1010.0]}, ["MRI"], "is for MR; .* at -1010 and below"),
        ("brain-adni", {}, ["CT"], "is for MR; .* the channel is called 'CT'"),
        ("breast-duke", {}, ["T1", "T2"], r"scans of one channel, the dataset has 2, \['T1', 'T2'\]"),
        (
            "brain-adni",
            {"shape_median": [166, 256, 256], "spacing_median": [1.2, 1.0, 1.0]},
            ["MRI"],
            "199 mm long left-right, brain-adni takes 216 to 240 mm: bring the brain to the middle",
        ),
        (
            "breast-duke",
            {"shape_median": [512, 512, 160], "spacing_median": [0.7, 0.7, 1.0]},
            ["MRI"],
            "358 mm long left-right and 358 mm posterior-anterior, .* 0.75 times as much: cut the scans into",
        ),
        (
            "chest-lidc",
            {**CT, "shape_median": [512, 512, 300], "spacing_median": [1.2, 1.2, 1.0]},
            ["CT"],
            r"614 mm long left-right, chest-lidc takes 0 to \d+ mm: crop the scans",
        ),
    ],
)
def test_data_that_a_recipe_is_not_for(
    name: str, found: dict[str, Any], channels: list[str], said: str
) -> None:
    with pytest.raises(DiffaugError, match=said):
        PRESETS[name].check(fingerprint(**found), tuple(channels))


@pytest.mark.usefixtures("quick_steps")
def test_a_single_scan_that_is_too_large_is_named_before_training(tmp_path: Path) -> None:
    make_dataset(tmp_path, "chest-lidc")
    file = tmp_path / "images" / "long.nii.gz"
    save(nifti(chest((43, 43, 80), (8.0, 8.0, 8.0)).astype(np.int16), (8.0, 8.0, 8.0), "LPS"), file)
    dataset = read_dataset(tmp_path, images=tmp_path / "images")
    with pytest.raises(DiffaugError, match=r"1 scan\(s\) are too large .*\n.*long\.nii\.gz: .* 640 mm long"):
        fit_generator(dataset, tmp_path / "fit", preset="chest-lidc", progress=QUIET)
    assert not (tmp_path / "fit" / "plan.json").exists()


def test_large_scans_are_taken_where_every_one_has_a_label() -> None:
    labelled = {"labelled_cases": 10, "label_box_largest_mm": [150.0, 180.0, 140.0]}
    PRESETS["brain-adni"].check(fingerprint(shape_median=[256, 256, 256], **labelled), ("MRI",))


@pytest.mark.parametrize(
    ("shape", "label", "spacing"),
    [
        ((36, 256, 256), None, (3.3, 0.6, 0.6)),
        ((120, 512, 512), None, (12.375, 1.2, 1.2)),
        ((120, 512, 512), [100.0, 140.0, 150.0], (3.3, 0.6, 0.6)),
        ((120, 512, 512), [132.0, 140.0, 160.0], (4.125, 0.6, 0.625)),
    ],
    ids=["a few slices are cropped", "the scan", "a label that fits", "a label that does not"],
)
def test_spacing_is_the_datas_unless_the_grid_would_not_hold_it(
    shape: tuple[int, int, int], label: list[float] | None, spacing: Triple
) -> None:
    found = fingerprint(
        spacing_median=[3.3, 0.6, 0.6],
        shape_median=list(shape),
        labelled_cases=10 if label else 0,
        label_box_largest_mm=label,
    )
    assert PRESETS["knee-mrnet"].grid(found).spacing == pytest.approx(spacing)


def test_a_preset_that_does_not_fit_the_call_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, "chest-lidc")
    for case in dataset.cases:
        case.images[0].write_bytes(b"not read")
    with pytest.raises(DiffaugError, match="no preset 'lung'; there are knee-mrnet, brain-adni, breast-duke"):
        fit_generator(dataset, tmp_path / "fit", preset="lung", progress=QUIET)
    with pytest.raises(DiffaugError, match="chest-lidc is a preset of medical-diffusion, not of joint-flow"):
        fit_generator(
            dataset, tmp_path / "fit", preset="chest-lidc", architecture="joint-flow", progress=QUIET
        )


def test_mirrors_on_the_command_line() -> None:
    assert _mirror_axes(None) is None
    assert _mirror_axes([Axis.NONE]) == ()
    assert _mirror_axes([Axis.INFERIOR_SUPERIOR, Axis.LEFT_RIGHT]) == (0, 2)
    with pytest.raises(typer.BadParameter, match="none goes with no other axis"):
        _mirror_axes([Axis.NONE, Axis.LEFT_RIGHT])


def test_the_command_offers_every_preset() -> None:
    assert [option.value for option in PresetOption] == list(PRESETS)


# -- a fit ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_steps")
def test_a_fit_by_a_preset_makes_a_generator_in_the_recipes_units(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, "chest-lidc")
    plan = fit_generator(dataset, tmp_path, preset="chest-lidc", dry_run=True, progress=QUIET)
    assert isinstance(plan, MedicalDiffusionPlan)
    small = plan.model_copy(
        update={
            "grid": plan.grid.model_copy(update={"spacing": (40.0,) * 3, "shape": (8, 8, 8)}),
            "autoencoder": VQGANConfig(downsampling=(2, 2, 2), codes=16),
            "denoiser": UNetConfig(dim=8, dim_mults=(1, 2)),
            "diffusion_steps": 4,
            "autoencoder_training": plan.autoencoder_training.model_copy(
                update={"steps": 2, "discriminator_start": 1}
            ),
            "denoiser_training": plan.denoiser_training.model_copy(update={"steps": 2, "rounds": 1}),
        }
    )
    (tmp_path / "plan.json").write_text(small.model_dump_json())
    output = tmp_path / "fit"
    generator = fit_generator(
        dataset, output, preset="chest-lidc", plan=tmp_path / "plan.json", progress=QUIET
    )
    assert isinstance(generator, Generator)
    assert generator.card.architecture == "medical-diffusion"
    assert generator.plan["preset"] == "chest-lidc"
    assert generator.grid.outside == "background"
    made = generator.sample(1).image
    assert made.shape == (1, 1, 8, 8, 8)
    assert -1000 <= made.min() <= made.max() <= 400
    with pytest.raises(DiffaugError, match="preset: 'chest-lidc' in the plan, 'knee-mrnet' given"):
        fit_generator(dataset, output, preset="knee-mrnet", progress=QUIET)
    with pytest.raises(DiffaugError, match=r"the preset chest-lidc and .*, the generator to start from"):
        fit_generator(dataset, tmp_path / "other", preset="chest-lidc", init=output, progress=QUIET)
