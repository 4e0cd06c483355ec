"""Every verb of the Generator, on a generator with random weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffaug.errors import DiffaugError, LabelError, UnlikeError, VerbError
from diffaug.generators.card import Card, CardGrid, Training
from diffaug.generators.cases import fade_inside
from diffaug.generators.generator import Generator
from diffaug.generators.grid import place
from diffaug.generators.intensity import IntensityConvention, fit_intensity_map
from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import DenoiserConfig
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.generators.joint_flow.networks import JointFlowNetworks
from diffaug.generators.model import Sampling
from diffaug.generators.seeds import CaseNoise
from diffaug.generators.verbs import VERBS
from tests.conftest import make_tiny_generator

STEPS = 2
GRID = (16, 24, 16)
# The tiny generator's orientation and spacing, and one that differs in both.
SAME = np.diag([1.5, 1.5, 1.5, 1.0])
OTHER = np.array([[0, 0, -2.0, 40], [1.1, 0, 0, -7], [0, -1.3, 0, 9], [0, 0, 0, 1]])
# With the second, as long as the grid on one axis and shorter on the others; with the first too.
FITTING = (15, 17, 12)


def scans(
    count: int,
    shape: tuple[int, int, int] = GRID,
    channels: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Images of noise on a gradient, and label maps of two blocks in their middle."""
    generator = torch.Generator().manual_seed(seed)
    image = 60 + 20 * torch.rand(count, channels, *shape, generator=generator)
    image += torch.linspace(0, 80, shape[1]).view(-1, 1)
    label = torch.zeros(count, 1, *shape, dtype=torch.int16)
    i, j, k = (n // 2 for n in shape)
    label[..., i - 2 : i + 2, j - 3 : j, k - 2 : k + 2] = 1
    label[..., i - 2 : i + 2, j : j + 3, k - 2 : k + 2] = 2
    return image.to(dtype), label


def ball(shape: tuple[int, ...], centre: tuple[int, ...], radius: float) -> Tensor:
    """A mask `(1, 1, *shape)`."""
    axes = (torch.arange(n) - c for n, c in zip(shape, centre, strict=True))
    i, j, k = torch.meshgrid(*axes, indexing="ij")
    return (i**2 + j**2 + k**2 <= radius**2)[None, None]


def unlabelled_generator() -> Generator:
    """A generator with random weights that knows no labels."""
    networks = JointFlowNetworks(
        image_autoencoder=AutoencoderConfig(
            channels=1, latent_channels=4, downsampling=(4, 4, 4), widths=(8, 16), blocks=1
        ),
        label_autoencoder=None,
        denoiser=DenoiserConfig(
            image_channels=4,
            label_channels=0,
            latent_shape=(4, 6, 4),
            convolution_width=8,
            width=16,
            depth=2,
            heads=2,
        ),
    )
    card = Card(
        name="unlabelled",
        description="Random weights, for tests.",
        networks=networks,
        grid=CardGrid(orientation=("R", "A", "S"), spacing=(1.5, 1.5, 1.5), shape=GRID),
        extent="object",
        channels=["MR"],
        intensity=IntensityConvention(kind="percentile", typical=[(0.0, 1000.0)]),
        labels={},
        verbs=[verb for verb in VERBS if verb not in ("paint", "segment")],
        training=Training(dataset="none", cases={}, patients=None, autoencoder_steps=0, denoiser_steps=0),
        licence="CC0-1.0",
        files={},
    )
    model = JointFlow(networks)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return Generator(card, model)


# -- what each verb gives ------------------------------------------------------------------------------------


def test_sample(tiny_generator: Generator) -> None:
    image, label, affine = tiny_generator.sample(3, seed=1, steps=STEPS)
    assert image.shape == (3, 1, *GRID)
    assert image.dtype == torch.float32
    assert label.shape == (3, 1, *GRID)
    assert label.dtype == torch.int16
    assert set(label.unique().tolist()) <= {0, 1, 2}
    assert len(label.unique()) > 1
    assert np.array_equal(affine, tiny_generator.grid.affine)
    assert not torch.equal(image[0], image[1])
    # Typical units 0 to 1000 are -1 to 1, and what lies beyond 1.5 is clipped.
    assert image.min() >= -250
    assert image.max() <= 1250
    assert image.std() > 50


def test_paint_depends_on_the_label(tiny_generator: Generator) -> None:
    _, label = scans(1)
    image = tiny_generator.paint(label, SAME, steps=STEPS)
    assert image.shape == (1, 1, *GRID)
    assert image.dtype == torch.float32
    assert not torch.equal(tiny_generator.paint(label.flip(3), SAME, steps=STEPS), image)
    assert not torch.equal(tiny_generator.paint(label, SAME, steps=STEPS, seed=1), image)
    assert torch.equal(tiny_generator.paint(label, SAME, steps=STEPS), image)


@pytest.mark.parametrize("verb", ["vary", "inpaint"])
def test_vary_and_inpaint_depend_on_label_and_seed(tiny_generator: Generator, verb: str) -> None:
    image, label = scans(1)
    run = {
        "vary": lambda label, seed: tiny_generator.vary(
            image, label, SAME, strength=0.7, seed=seed, steps=STEPS
        ),
        "inpaint": lambda label, seed: tiny_generator.inpaint(
            image, ball(GRID, (8, 12, 8), 5), label, SAME, seed=seed, steps=STEPS
        ),
    }[verb]
    expected = run(label, 0)
    assert not torch.equal(expected, image)
    assert torch.equal(run(label, 0), expected)
    assert not torch.equal(run(label.flip(3), 0), expected)
    assert not torch.equal(run(label, 1), expected)


def test_segment(tiny_generator: Generator) -> None:
    image, _ = scans(2, FITTING)
    label = tiny_generator.segment(image, OTHER, steps=STEPS)
    assert label.shape == image.shape
    assert label.dtype == torch.int16
    assert set(label.unique().tolist()) <= {0, 1, 2}
    assert len(label.unique()) > 1


def test_encode_and_decode(tiny_generator: Generator) -> None:
    image, _ = scans(2)
    latent = tiny_generator.encode(image, SAME)
    assert latent.shape == (2, 4, 4, 6, 4)
    decoded = tiny_generator.decode(latent)
    assert decoded.shape == image.shape
    # The generator's own arithmetic, by hand: network units -1 to 1 are typical units 0 to 1000.
    expected = (tiny_generator.model.decode_image(latent[:1]).clamp(-1.5, 1.5) + 1) * 500
    assert torch.allclose(decoded[:1], expected.clamp(min=0), atol=1e-2)


def test_a_latent_of_another_shape_is_refused(tiny_generator: Generator) -> None:
    with pytest.raises(
        DiffaugError, match=r"a latent must have shape \(B, 4, 4, 6, 4\), got \(1, 4, 4, 6, 5\)"
    ):
        tiny_generator.decode(torch.zeros(1, 4, 4, 6, 5))


def test_residual_vary_adds_the_difference_of_two_decodes(tiny_generator: Generator) -> None:
    image, label = scans(1)
    residual = tiny_generator.vary(image, label, SAME, strength=0.6, steps=STEPS)
    plain = tiny_generator.vary(image, label, SAME, strength=0.6, steps=STEPS, residual=False)
    rebuilt = tiny_generator.vary(image, label, SAME, strength=0, residual=False)
    assert not torch.allclose(rebuilt, image, atol=10)
    units = fit_intensity_map(image[0], tiny_generator.card.intensity)
    low, high = units.low.item() - 0.2 * (units.high - units.low), units.high + 0.2 * (units.high - units.low)
    # Where neither clip nor floor acts.
    free = (plain > image.min()) & (rebuilt > image.min()) & (residual > image.min())
    free &= (plain < high) & (rebuilt < high) & (plain > low)
    assert free.float().mean() > 0.2
    assert torch.allclose(residual[free], (image + plain - rebuilt)[free], atol=1e-3)


@pytest.mark.parametrize("residual", [True, False])
def test_nothing_made_is_darker_than_the_scan(tiny_generator: Generator, residual: bool) -> None:
    image, label = scans(1)
    varied = tiny_generator.vary(image, label, SAME, strength=1.0, steps=STEPS, residual=residual)
    assert varied.min() >= image.min()
    assert (varied == image.min()).sum() > 1


# -- the same bytes ------------------------------------------------------------------------------------------

BATCH = 5


def verbs_on(generator: Generator) -> dict[str, Callable[[slice, list[int]], tuple[Tensor, ...]]]:
    """Each verb on a slice of one batch of unlike cases, with the seeds of that slice."""
    image, label = scans(BATCH, FITTING)
    image[1] *= 3
    label[2] = label[2].roll(2, dims=2)
    affines = np.stack([OTHER] * BATCH)
    affines[3] = np.diag([-1.4, 1.2, 1.5, 1.0])
    mask = torch.cat([ball(FITTING, (9, 8, 3 + n), 3) for n in range(BATCH)])
    mask[4] = False
    latent = torch.randn(BATCH, 4, 4, 6, 4, generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"steps": STEPS, "guidance": 1.5}
    return {
        "sample": lambda part, seed: tuple(generator.sample(len(seed), seed=seed, **options)[:2]),
        "paint": lambda part, seed: (generator.paint(label[part], affines[part], seed=seed, **options),),
        "vary": lambda part, seed: (
            generator.vary(image[part], label[part], affines[part], strength=0.6, seed=seed, **options),
        ),
        "inpaint": lambda part, seed: (
            generator.inpaint(image[part], mask[part], label[part], affines[part], seed=seed, **options),
        ),
        "segment": lambda part, seed: (
            generator.segment(image[part], affines[part], seed=seed, steps=STEPS),
        ),
        "encode": lambda part, seed: (generator.encode(image[part], affines[part]),),
        "decode": lambda part, seed: (generator.decode(latent[part]),),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_case_has_the_same_bytes_in_every_batch(tiny_generator: Generator, verb: str) -> None:
    run = verbs_on(tiny_generator)[verb]
    seeds = [11, 22, 33, 44, 55]
    together = run(slice(0, BATCH), seeds)
    for size in range(1, BATCH):
        for start in range(0, BATCH, size):
            part = slice(start, min(start + size, BATCH))
            for found, expected in zip(run(part, seeds[part]), together, strict=True):
                assert torch.equal(found, expected[part])


def test_an_integer_seed_gives_case_k_the_same_bytes_in_every_batch(tiny_generator: Generator) -> None:
    image, label = scans(3)
    many = tiny_generator.sample(3, seed=9, steps=STEPS)
    few = tiny_generator.sample(2, seed=9, steps=STEPS)
    assert torch.equal(few.image, many.image[:2])
    assert torch.equal(few.label, many.label[:2])
    varied = tiny_generator.vary(image, label, SAME, seed=9, steps=STEPS)
    assert torch.equal(tiny_generator.vary(image[:2], label[:2], SAME, seed=9, steps=STEPS), varied[:2])


def test_masks_of_other_cases_do_not_move_a_case(tiny_generator: Generator) -> None:
    """Without label and box, the grid lies around each case's own mask."""
    shape = (50, 60, 55)
    image, _ = scans(3, shape)
    mask = torch.cat(
        [ball(shape, (10, 12, 14), 3), ball(shape, (40, 45, 42), 3), torch.zeros(1, 1, *shape) != 0]
    )
    settings: dict[str, Any] = {"steps": STEPS, "allow_label_drift": True}
    together = tiny_generator.inpaint(image, mask, None, SAME, seed=[1, 2, 3], **settings)
    for n in range(3):
        alone = tiny_generator.inpaint(
            image[n : n + 1], mask[n : n + 1], None, SAME, seed=[n + 1], **settings
        )
        assert torch.equal(together[n : n + 1], alone)
    assert torch.equal(together[2], image[2])
    assert not torch.equal(together[0], image[0])


def test_saving_and_loading_keeps_the_bytes(tmp_path: Path) -> None:
    generator = make_tiny_generator(seed=3)
    generator.plan = {"grid": [1, 2, 3]}
    generator.save(tmp_path)
    loaded = Generator.load(tmp_path)
    assert loaded.card == generator.card
    assert loaded.plan == generator.plan
    assert loaded.weights_hash == generator.weights_hash
    for verb in VERBS:
        found, expected = (verbs_on(g)[verb](slice(0, 2), [1, 2]) for g in (loaded, generator))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), verb
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / "joint_flow.safetensors").read_bytes() == (
        tmp_path / "joint_flow.safetensors"
    ).read_bytes()


# -- in and out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_shape_and_dtype_come_back(dtype: torch.dtype, channels: int) -> None:
    if channels == 2 and dtype not in (torch.uint8, torch.float64):
        return
    generator = make_tiny_generator(channels=channels)
    shape = FITTING
    image, label = scans(2, shape, channels, dtype)
    mask = ball(shape, (9, 8, 6), 3).expand(2, -1, -1, -1, -1)
    before = image.clone()
    varied = generator.vary(image, label, OTHER, strength=0.8, steps=STEPS)
    plain = generator.vary(image, label, OTHER, strength=0.8, steps=STEPS, residual=False)
    filled = generator.inpaint(image, mask, label, OTHER, steps=STEPS)
    for made in (varied, plain, filled):
        assert made.shape == image.shape
        assert made.dtype == dtype
        assert made.is_contiguous()
        changed = (made != image).flatten(2).any(dim=2)
        assert changed.all(), "every channel of every case changes"
    assert torch.equal(image, before)
    assert torch.equal(generator.vary(image, label, OTHER, strength=0), image)
    assert generator.paint(label, OTHER, steps=STEPS).shape == image.shape
    assert generator.segment(image, OTHER, steps=STEPS).shape == label.shape


def test_integers_are_rounded_and_clipped_not_wrapped() -> None:
    image, label = scans(1, dtype=torch.uint8)
    image = (image.float() * 1.6).clamp(0, 255).to(torch.uint8)
    generator = make_tiny_generator()
    as_bytes = generator.vary(image, label, SAME, strength=1.0, steps=STEPS)
    as_floats = generator.vary(image.double(), label, SAME, strength=1.0, steps=STEPS)
    assert as_floats.max() > 256
    assert torch.equal(as_bytes, as_floats.round().clamp(0, 255).to(torch.uint8))


def test_large_values_keep_their_last_digits(tiny_generator: Generator) -> None:
    """A scan far from zero changes as the same scan near zero does: nothing is rounded to float32."""
    image, label = scans(1, (40, 50, 45), dtype=torch.int32)
    far = image + 1_000_000_000
    near_change, far_change = (
        tiny_generator.vary(x, label, SAME, strength=0.5, steps=STEPS) - x for x in (image, far)
    )
    assert near_change.abs().max() > 20
    assert (near_change - far_change).abs().max() <= 1


def test_voxels_outside_the_mask_are_copied_not_computed(tiny_generator: Generator) -> None:
    """Not even a float64 holds these values."""
    image, label = scans(1, dtype=torch.int64)
    image += 2**60 + 1
    mask = ball(GRID, (8, 12, 8), 4)
    filled = tiny_generator.inpaint(image, mask, label, SAME, steps=STEPS)
    assert torch.equal(filled[~mask], image[~mask])


@pytest.mark.parametrize("strength", [0, 0.0])
def test_strength_zero_is_the_identity(tiny_generator: Generator, strength: float) -> None:
    image, label = scans(2, (40, 50, 45), dtype=torch.float64)
    image += 0.123456789
    varied = tiny_generator.vary(image, label, OTHER, strength=strength)
    assert torch.equal(varied, image)
    assert varied.data_ptr() != image.data_ptr()


def test_change_grows_with_strength(tiny_generator: Generator) -> None:
    image, label = scans(1)
    changes = [
        (tiny_generator.vary(image, label, SAME, strength=s, steps=20) - image).abs().mean().item()
        for s in (0.05, 0.3, 0.9)
    ]
    assert changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 24, 3), (10, 11, 9), (16, 30, 20)])
@pytest.mark.parametrize("affine", [SAME, np.diag([-1.0, 2.0, 1.5, 1.0])], ids=["same", "other"])
def test_small_volumes_are_padded_and_cropped_back(
    tiny_generator: Generator, shape: tuple[int, int, int], affine: np.ndarray
) -> None:
    image, label = torch.rand(1, 1, *shape) * 100, torch.zeros(1, 1, *shape, dtype=torch.uint8)
    label[(..., *(slice(n // 4, n - n // 4) for n in shape))] = 1
    varied = tiny_generator.vary(image, label, affine, strength=0.7, steps=STEPS)
    assert varied.shape == image.shape
    assert torch.isfinite(varied).all()
    spacing = np.abs(np.diag(affine)[:3])
    if (np.array(shape) * spacing <= np.array(GRID) * 1.5).all():
        # Nothing fades, since the volume ends within the grid: all that stays is what ends at a bound.
        plain = tiny_generator.vary(image, label, affine, strength=0, residual=False)
        clipped = (plain == plain.min()) | (plain == plain.max())
        assert ((varied != image) | (varied == image.min()) | clipped).all()
        assert image.numel() == 1 or (varied != image).float().mean() > 0.5


def test_the_orientation_on_disk_does_not_matter(tiny_generator: Generator) -> None:
    image, label = scans(1, (16, 20, 13))
    expected = tiny_generator.vary(image, label, SAME, strength=0.7, steps=STEPS)
    # The same volume, its axes as (-z, x, y).
    turned = np.zeros((4, 4))
    turned[0, 1] = turned[1, 2] = 1.5
    turned[2, 0] = -1.5
    turned[2, 3] = 12 * 1.5
    turned[3, 3] = 1

    def turn(x: Tensor) -> Tensor:
        return x.permute(0, 1, 4, 2, 3).flip(2)

    found = tiny_generator.vary(turn(image), turn(label), turned, strength=0.7, steps=STEPS)
    assert torch.equal(found, turn(expected))


def test_affines_may_be_given_per_case_and_as_tensors(tiny_generator: Generator) -> None:
    image, label = scans(2, (16, 20, 13))
    per_case = tiny_generator.vary(
        image, label, torch.tensor(np.stack([SAME, OTHER])), seed=[1, 2], steps=STEPS
    )
    assert torch.equal(per_case[:1], tiny_generator.vary(image[:1], label[:1], SAME, seed=[1], steps=STEPS))
    assert torch.equal(per_case[1:], tiny_generator.vary(image[1:], label[1:], OTHER, seed=[2], steps=STEPS))
    with pytest.raises(
        DiffaugError, match=r"affine must have shape \(4, 4\) or \(2, 4, 4\), got \(3, 4, 4\)"
    ):
        tiny_generator.vary(image, label, np.stack([SAME] * 3))


# -- larger scans --------------------------------------------------------------------------------------------

LARGE = (50, 60, 55)


def large_scan(dtype: torch.dtype = torch.int16) -> tuple[Tensor, Tensor]:
    """A scan about three times as long as the grid, its structure away from the middle."""
    image, _ = scans(1, LARGE, dtype=dtype)
    label = torch.zeros(1, 1, *LARGE, dtype=torch.int16)
    label[..., 11:17, 32:41, 20:26] = 2
    return image, label


def window_of(centre: tuple[float, ...], spacing: float) -> tuple[slice, ...]:
    half = [n * 1.5 / spacing / 2 + 1 for n in GRID]
    return tuple(slice(int(max(0, c - h)), int(c + h) + 1) for c, h in zip(centre, half, strict=True))


@pytest.mark.parametrize("spacing", [1.5, 1.0, 2.0])
@pytest.mark.parametrize("where", ["label", "box"])
def test_a_larger_scan_changes_around_the_label_or_box_alone(
    tiny_generator: Generator, spacing: float, where: str
) -> None:
    image, label = large_scan()
    affine = np.diag([spacing, spacing, spacing, 1.0])
    given: dict[str, Any] = (
        {"label": label}
        if where == "label"
        else {"label": None, "box": ((11, 17), (32, 41), (20, 26)), "allow_label_drift": True}
    )
    varied = tiny_generator.vary(image, affine=affine, strength=1.0, steps=STEPS, **given)
    changed = varied != image
    window = window_of((13.5, 36, 22.5), spacing)
    assert changed[..., *window].float().mean() > 0.3
    assert changed[..., 12:16, 33:40, 21:25].float().mean() > 0.8
    changed[..., *window] = False
    assert not changed.any()


@pytest.mark.parametrize("spacing", [1.5, 1.0])
def test_no_seam_at_the_windows_faces(tiny_generator: Generator, spacing: float) -> None:
    """Next to untouched voxels the change is small beside the change inside."""
    image, label = large_scan(torch.float64)
    # Dark voxels far away, so that the scan's minimum bounds nothing in the window.
    image[..., -1, -1, -1] = -1e4
    affine = np.diag([spacing, spacing, spacing, 1.0])
    change = (tiny_generator.vary(image, label, affine, strength=1.0, steps=STEPS) - image)[0, 0]
    touched = change != 0
    typical = change[touched].abs().mean()
    for axis in range(3):
        hit = touched.movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten()
        start, stop = int(hit[0]), int(hit[-1]) + 1
        assert start > 0
        assert stop < LARGE[axis]
        profile = change.movedim(axis, 0).flatten(1).abs().amax(dim=1)
        largest = change.abs().max()
        assert profile[start] < 0.1 * largest
        assert profile[stop - 1] < 0.1 * largest
        # The change rises over several voxels.
        assert profile[start] < profile[start + 1] < profile[start + 2]
        assert profile[stop - 1] < profile[stop - 2] < profile[stop - 3]
    assert typical > 0


@pytest.mark.parametrize("verb", ["vary", "inpaint", "segment", "encode", "paint"])
def test_a_larger_scan_needs_a_label_or_a_box(tiny_generator: Generator, verb: str) -> None:
    image, label = large_scan()
    empty = torch.zeros_like(label)
    run: dict[str, Callable[[], object]] = {
        "vary": lambda: tiny_generator.vary(image, None, SAME, allow_label_drift=True),
        "inpaint": lambda: tiny_generator.inpaint(image, label > 0, empty, SAME),
        "segment": lambda: tiny_generator.segment(image, SAME),
        "encode": lambda: tiny_generator.encode(image, SAME),
        "paint": lambda: tiny_generator.paint(empty, SAME),
    }
    with pytest.raises(DiffaugError, match=r"give the object's label map.*or box="):
        run[verb]()


def test_segment_and_encode_work_in_the_box(tiny_generator: Generator) -> None:
    image, _ = large_scan()
    box = ((11, 17), (32, 41), (20, 26))
    label = tiny_generator.segment(image, SAME, steps=STEPS, box=box)
    assert (label[..., *window_of((13.5, 36, 22.5), 1.5)] != 0).any()
    label[..., *window_of((13.5, 36, 22.5), 1.5)] = 0
    assert not label.any()
    assert not torch.equal(
        tiny_generator.encode(image, SAME, box=box),
        tiny_generator.encode(image, SAME, box=((30, 31), (30, 31), (30, 31))),
    )


def test_paint_leaves_the_floor_around_the_box(tiny_generator: Generator) -> None:
    _, label = large_scan()
    image = tiny_generator.paint(label, SAME, steps=STEPS)
    window = window_of((13.5, 36, 22.5), 1.5)
    assert (image[..., *window] != 0).float().mean() > 0.5
    image[..., *window] = 0
    assert not image.any()


def test_percentiles_come_from_the_whole_scan(tiny_generator: Generator) -> None:
    """A bright region far from the window changes the units there."""
    image, label = large_scan(torch.float32)
    brighter = image.clone()
    brighter[..., 40:, :, :] *= 10
    plain, bright = (
        tiny_generator.vary(x, label, SAME, strength=0.8, steps=STEPS) - x for x in (image, brighter)
    )
    assert bright.abs().max() > 3 * plain.abs().max()


def test_a_plain_decode_of_a_larger_scan_is_refused(tiny_generator: Generator) -> None:
    image, label = large_scan()
    with pytest.raises(VerbError, match=r"covers \(16, 24, 16\) of the \(50, 60, 55\) voxels"):
        tiny_generator.vary(image, label, SAME, residual=False)


# -- inpainting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "affine", [SAME, OTHER, np.diag([0.9, -0.8, 1.0, 1.0])], ids=["same", "other", "finer"]
)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [FITTING, LARGE])
def test_inpaint_leaves_every_voxel_outside_the_mask(
    tiny_generator: Generator, affine: np.ndarray, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    image, label = scans(1, shape, dtype=dtype)
    mask = ball(shape, tuple(n // 2 for n in shape), 4)
    filled = tiny_generator.inpaint(image, mask, label, affine, steps=STEPS)
    changed = filled != image
    assert not changed[~mask].any()
    assert changed[mask].float().mean() > 0.8


def test_the_mask_is_made_anew_whatever_it_held_and_fades_in_over_two_voxels(
    tiny_generator: Generator,
) -> None:
    """Of two scans that differ within the mask alone, the results differ where the old content shows
    through."""
    image, label = scans(1, dtype=torch.float64)
    inside = (..., slice(4, 12), slice(6, 18), slice(4, 12))
    mask = torch.zeros(1, 1, *GRID)
    mask[inside] = 7
    # The same values in another order leave the percentiles as they are; every code is near the mask, so is
    # made anew.
    other = image.clone()
    other[inside] = image[inside].flip(4)
    first, second = (tiny_generator.inpaint(x, mask, label, SAME, steps=STEPS) for x in (image, other))
    kept = ((second - first) / (other - image))[0, 0]
    assert kept[4:12, 12, 8].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0, 0, 1 / 3, 2 / 3], abs=1e-6)
    assert kept[8, 6:18, 8].tolist() == pytest.approx([2 / 3, 1 / 3, *[0] * 8, 1 / 3, 2 / 3], abs=1e-6)
    assert kept[4, 6, 4].item() == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("thickness", "weights"),
    [(1, [1]), (2, [1, 1]), (3, [0.5, 1, 0.5]), (5, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])],
)
def test_the_middle_of_a_thin_mask_is_all_new(
    tiny_generator: Generator, thickness: int, weights: list[float]
) -> None:
    mask = torch.zeros(1, *GRID, dtype=torch.bool)
    mask[..., slice(4, 12), slice(6, 18), slice(8, 8 + thickness)] = True
    placement = place(tiny_generator.grid, GRID, SAME)
    weight = fade_inside(mask, placement, placement.window())
    assert weight[0, 8, 12, 8 : 8 + thickness].tolist() == pytest.approx(weights)
    assert not weight[~mask].any()


@pytest.mark.parametrize("verb", ["vary", "inpaint"])
def test_a_crop_keeps_the_intensity_map_of_its_scan(tiny_generator: Generator, verb: str) -> None:
    """The whole scan's percentiles are far from the crop's: with them the crop changes as the scan does."""
    image, label = large_scan(torch.float64)
    image[..., :8, :, :] += 4000
    whole = fit_intensity_map(image[0], tiny_generator.card.intensity)
    window = place(tiny_generator.grid, LARGE, SAME, foreground=label[0, 0] > 0).window()
    part = (..., *(slice(start, stop) for start, stop in window))
    corner = SAME.copy()
    corner[:3, 3] = SAME[:3] @ [*(start for start, _ in window), 1]

    def run(image: Tensor, label: Tensor, affine: np.ndarray, **settings: Any) -> Tensor:
        if verb == "vary":
            return tiny_generator.vary(image, label, affine, strength=0.5, steps=STEPS, **settings)
        return tiny_generator.inpaint(image, label, label, affine, steps=STEPS, **settings)

    def middle(volume: Tensor) -> Tensor:
        return volume[..., 6:10, 9:15, 6:10]

    expected = middle(run(image, label, SAME)[part])
    cropped = image[part].contiguous(), label[part].contiguous(), corner
    torch.testing.assert_close(middle(run(*cropped, intensity=[whole])), expected, rtol=0, atol=1e-3)
    assert not torch.allclose(middle(run(*cropped)), expected, rtol=0, atol=1.0)
    # The whole scan on the scale of a region of it: voxels darker than that region stay as dark as they may.
    region = fit_intensity_map(image[0][..., 6:10, 9:15, 6:10] + 50, tiny_generator.card.intensity)
    assert run(image, label, SAME, intensity=[region]).min() < region.floor.min()
    with pytest.raises(DiffaugError, match="intensity needs a list of 1 maps, one a case; got 2"):
        run(*cropped, intensity=[whole, whole])


def test_a_mask_at_the_border_of_the_volume_is_not_faded_there(tiny_generator: Generator) -> None:
    image, label = scans(1)
    everything = torch.ones(1, 1, *GRID, dtype=torch.bool)
    filled = tiny_generator.inpaint(image, everything, label, SAME, steps=STEPS)
    again = tiny_generator.inpaint(image, everything, label, SAME, steps=STEPS, seed=5)
    # No voxel keeps a part of the old scan: at pure noise only the label is kept.
    assert ((filled != again) | (filled == image.min())).float().mean() > 0.99


def test_a_mask_at_the_windows_face_is_faded_where_the_scan_goes_on(tiny_generator: Generator) -> None:
    image, label = large_scan(torch.float64)
    placement = place(tiny_generator.grid, LARGE, SAME, foreground=label[0, 0] > 0)
    inside = (..., *(slice(start, stop) for start, stop in placement.window()))
    mask = torch.zeros_like(label)
    mask[inside] = 1
    other = image.clone()
    other[inside] = image[inside].flip(4)
    first, second = (tiny_generator.inpaint(x, mask, label, SAME, steps=STEPS) for x in (image, other))
    kept = ((second - first) / (other - image))[inside][0, 0]
    ends = torch.stack([kept[:3, 12, 9], kept[-3:, 12, 9].flip(0), kept[8, :3, 9], kept[8, -3:, 9].flip(0)])
    assert torch.allclose(ends, torch.tensor([2 / 3, 1 / 3, 0], dtype=torch.float64), atol=1e-6)


def test_inpaint_works_around_the_mask_without_a_label(tiny_generator: Generator) -> None:
    image, _ = large_scan()
    mask = ball(LARGE, (40, 12, 44), 3)
    filled = tiny_generator.inpaint(image, mask, None, SAME, steps=STEPS, allow_label_drift=True)
    changed = filled != image
    assert changed[mask].float().mean() > 0.8
    assert not changed[~mask].any()


def test_a_residual_inpainting_keeps_the_grain_that_no_code_holds(tiny_generator: Generator) -> None:
    """What it adds is a difference of two decodes, which are the same with and without the grain."""
    image, label = scans(1, dtype=torch.float64)
    mask, core = torch.zeros(2, 1, 1, *GRID, dtype=torch.bool)
    mask[..., 3:13, 5:19, 3:13] = True
    # Beyond the rim over which new content fades in.
    core[..., 6:10, 8:16, 6:10] = True
    plain, residual = (
        tiny_generator.inpaint(image, mask, label, SAME, steps=STEPS, residual=residual)
        for residual in (False, True)
    )
    assert torch.equal(residual[~mask], image[~mask])
    decoded = tiny_generator.vary(image, label, SAME, strength=0.0, residual=False)
    # Where neither decode is raised to the image's lowest value.
    core &= torch.minimum(plain, decoded) > image.min() + 1
    assert core.sum() > 5
    expected = (image + plain - decoded).clamp_min(float(image.min()))
    assert torch.allclose(residual[core], expected[core], atol=1e-3 * float(image.max()))
    assert not torch.allclose(residual[core], plain[core], atol=1e-3 * float(image.max()))


def test_an_empty_mask_changes_nothing(tiny_generator: Generator) -> None:
    image, label = scans(1)
    assert torch.equal(
        tiny_generator.inpaint(image, torch.zeros_like(label), label, SAME, steps=STEPS), image
    )


def test_a_mask_beyond_the_grid_is_refused(tiny_generator: Generator) -> None:
    image, label = large_scan()
    mask = ball(LARGE, (14, 36, 23), 3) | ball(LARGE, (40, 36, 23), 3)
    with pytest.raises(VerbError, match=r"mask of case 0 has 246 voxels.*covers 123 of them"):
        tiny_generator.inpaint(image, mask, label, SAME)


def test_a_mask_of_another_shape_is_refused(tiny_generator: Generator) -> None:
    image, label = scans(2)
    with pytest.raises(
        DiffaugError, match=r"mask must have shape \(2, 1, 16, 24, 16\).*got \(1, 1, 16, 24, 16\)"
    ):
        tiny_generator.inpaint(image, label[:1], label, SAME)


@pytest.mark.parametrize("verb", ["vary", "paint", "inpaint"])
def test_a_label_of_several_structures_is_refused_where_they_do_not_fit(
    tiny_generator: Generator, verb: str
) -> None:
    """The grid would lie between them, around neither."""
    image, label = large_scan()
    label[..., 30:36, 32:41, 20:26] = 1
    run = {
        "vary": lambda **box: tiny_generator.vary(image, label, SAME, steps=STEPS, **box),
        "paint": lambda **box: tiny_generator.paint(label, SAME, steps=STEPS, **box),
        "inpaint": lambda **box: tiny_generator.inpaint(
            image, ball(LARGE, (14, 36, 23), 3), label, SAME, steps=STEPS, **box
        ),
    }[verb]
    with pytest.raises(VerbError, match=r"of the label's 648 voxels lie outside.*keep one structure"):
        run()
    made = run(box=((11, 17), (32, 41), (20, 26)))
    assert made.shape == image.shape


@pytest.mark.parametrize("verb", ["segment", "encode"])
def test_arrays_are_refused(tiny_generator: Generator, verb: str) -> None:
    with pytest.raises(DiffaugError, match=r"must be a torch\.Tensor, got ndarray"):
        getattr(tiny_generator, verb)(np.zeros((1, 1, *GRID)), SAME)
    with pytest.raises(LabelError, match=r"must be a torch\.Tensor, got ndarray"):
        tiny_generator.paint(np.zeros((1, 1, *GRID), np.int16), SAME)


@pytest.mark.parametrize("device", ["cuda:77", "gpu0"])
def test_a_device_that_cannot_be_used_changes_nothing(tiny_generator: Generator, device: str) -> None:
    with pytest.raises(DiffaugError, match=f"cannot use the device {device}"):
        tiny_generator.to(device)
    assert tiny_generator.device.type == "cpu"
    assert tiny_generator.sample(1, steps=1).image.shape == (1, 1, *GRID)


# -- labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["vary", "inpaint"])
def test_a_missing_label_is_an_error_unless_it_may_drift(tiny_generator: Generator, verb: str) -> None:
    image, label = scans(1)

    def run(**settings: Any) -> Tensor:
        if verb == "vary":
            return tiny_generator.vary(image, None, SAME, steps=STEPS, **settings)
        return tiny_generator.inpaint(image, label, None, SAME, steps=STEPS, **settings)

    with pytest.raises(LabelError, match="allow_label_drift=True"):
        run()
    assert not torch.equal(run(allow_label_drift=True), image)


@pytest.mark.parametrize("verb", ["vary", "inpaint", "paint"])
def test_label_mapping(tiny_generator: Generator, verb: str) -> None:
    image, label = scans(1)
    run: Callable[..., Tensor] = {
        "vary": lambda label, **s: tiny_generator.vary(image, label, SAME, strength=0.8, steps=STEPS, **s),
        "inpaint": lambda label, **s: tiny_generator.inpaint(
            image, ball(GRID, (8, 12, 8), 4), label, SAME, steps=STEPS, **s
        ),
        "paint": lambda label, **s: tiny_generator.paint(label, SAME, steps=STEPS, **s),
    }[verb]
    own = label * 10
    with pytest.raises(LabelError, match=r"\[10, 20\] are not in .*1: head, 2: body.* holds \[0, 10, 20\]"):
        run(own)
    assert torch.equal(run(own, label_mapping={10: 1, 20: 2}), run(label))
    assert not torch.equal(run(own, label_mapping={10: 2, 20: 1}), run(label))


def test_an_id_that_maps_to_background_does_not_locate_the_object(tiny_generator: Generator) -> None:
    image, label = large_scan()
    with_rest = torch.where(label == 0, 9, label)
    expected = tiny_generator.vary(image, label, SAME, steps=STEPS)
    found = tiny_generator.vary(image, with_rest, SAME, steps=STEPS, label_mapping={9: 0})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(1, 1, 16, 24, 15), (2, 1, 16, 24, 16), (1, 2, 16, 24, 16), (16, 24, 16)])
def test_a_label_of_another_shape_is_refused(tiny_generator: Generator, shape: tuple[int, ...]) -> None:
    image, _ = scans(1)
    with pytest.raises(LabelError, match="label"):
        tiny_generator.vary(image, torch.zeros(shape, dtype=torch.int16), SAME)


def test_painting_nothing_is_refused(tiny_generator: Generator) -> None:
    _, label = scans(2)
    label[1] = 0
    with pytest.raises(LabelError, match="label map 1 of the batch shows no structure"):
        tiny_generator.paint(label, SAME)


# -- generators without labels -------------------------------------------------------------------------------


def test_a_generator_without_labels_samples_and_varies() -> None:
    generator = unlabelled_generator()
    image, label = scans(2)
    sample = generator.sample(2, steps=STEPS)
    assert sample.image.shape == (2, 1, *GRID)
    assert not sample.label.any()
    varied = generator.vary(image, None, SAME, strength=0.7, steps=STEPS)
    assert not torch.equal(varied, image)
    mask = ball(GRID, (8, 12, 8), 4).expand(2, -1, -1, -1, -1)
    assert torch.equal(generator.inpaint(image, mask, None, SAME, steps=STEPS)[~mask], image[~mask])
    # There is nothing to condition on, so guidance is refused, and a label that may drift changes nothing.
    with pytest.raises(DiffaugError, match="knows no labels that could guide it: leave guidance=2"):
        generator.vary(image, None, SAME, strength=0.7, steps=STEPS, guidance=2.0)
    assert torch.equal(
        generator.vary(image, label, SAME, strength=0.7, steps=STEPS, allow_label_drift=True), varied
    )


def test_a_generator_without_labels_does_not_claim_to_preserve_one() -> None:
    generator = unlabelled_generator()
    image, label = scans(1)
    with pytest.raises(LabelError, match=r"knows no labels and cannot preserve one.*allow_label_drift=True"):
        generator.vary(image, label, SAME)
    with pytest.raises(LabelError, match="knows no labels"):
        generator.inpaint(image, label, label, SAME)


def test_a_label_locates_the_object_even_for_a_generator_without_labels() -> None:
    generator = unlabelled_generator()
    image, label = large_scan()
    varied = generator.vary(image, label * 77, SAME, steps=STEPS, allow_label_drift=True)
    changed = varied != image
    assert changed[label > 0].float().mean() > 0.8
    changed[..., *window_of((13.5, 36, 22.5), 1.5)] = False
    assert not changed.any()


def test_a_generator_without_labels_saves_and_loads(tmp_path: Path) -> None:
    generator = unlabelled_generator()
    generator.save(tmp_path)
    loaded = Generator.load(tmp_path)
    assert torch.equal(loaded.sample(1, steps=STEPS).image, generator.sample(1, steps=STEPS).image)


@pytest.mark.parametrize("verb", ["paint", "segment"])
def test_a_verb_that_is_not_there_is_answered_with_those_that_are(verb: str) -> None:
    generator = unlabelled_generator()
    image, label = scans(1)
    assert generator.verbs == {"sample", "vary", "inpaint", "encode", "decode"}
    volume = label if verb == "paint" else image
    with pytest.raises(
        VerbError, match=rf"has no verb '{verb}'; it has decode, encode, inpaint, sample, vary"
    ):
        getattr(generator, verb)(volume, SAME)


# -- guidance and settings -----------------------------------------------------------------------------------


def test_guidance_extrapolates_from_free_to_conditioned(tiny_generator: Generator) -> None:
    """One Euler step is linear in the velocity, so the latent is linear in the guidance."""
    model = tiny_generator.model
    label = torch.randn(1, 2, 4, 6, 4, generator=torch.Generator().manual_seed(0))

    def painted(condition: torch.Tensor, guidance: float) -> torch.Tensor:
        with torch.no_grad():
            return model.paint(condition, CaseNoise([3]), Sampling("euler", steps=1, guidance=guidance))

    free, plain, guided = (painted(label, guidance) for guidance in (0.0, 1.0, 2.5))
    assert torch.allclose(free, painted(label[:, :0], 1.0), atol=1e-5)
    assert not torch.allclose(plain, free, atol=1e-2)
    assert torch.allclose(guided, free + 2.5 * (plain - free), atol=1e-4)


def test_guidance_of_one_is_none(tiny_generator: Generator) -> None:
    _, label = scans(1)
    plain = tiny_generator.paint(label, SAME, steps=STEPS)
    assert torch.equal(tiny_generator.paint(label, SAME, steps=STEPS, guidance=1.0), plain)
    assert not torch.equal(tiny_generator.paint(label, SAME, steps=STEPS, guidance=3.0), plain)
    sample = tiny_generator.sample(1, steps=STEPS, guidance=1.0)
    guided = tiny_generator.sample(1, steps=STEPS, guidance=3.0)
    assert not torch.equal(guided.image, sample.image)


def test_defaults_come_from_the_card(tiny_generator: Generator) -> None:
    image, label = scans(1)
    defaults = tiny_generator.card.defaults
    assert torch.equal(
        tiny_generator.vary(image, label, SAME),
        tiny_generator.vary(
            image,
            label,
            SAME,
            strength=defaults.strength,
            steps=defaults.steps,
            guidance=defaults.guidance,
            seed=0,
        ),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": -1.0}, "guidance must be at least 0"),
        ({"strength": 1.01}, r"strength must lie in \[0, 1\], got 1.01"),
        ({"strength": -0.1}, "strength must lie in"),
        ({"strength": float("nan")}, "strength must lie in"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 cases"),
        ({"box": ((0, 99), (0, 9), (0, 9))}, "does not lie in the volume"),
    ],
)
def test_impossible_settings_are_refused(
    tiny_generator: Generator, settings: dict[str, Any], message: str
) -> None:
    image, label = scans(1)
    with pytest.raises(DiffaugError, match=message):
        tiny_generator.vary(image, label, SAME, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(tiny_generator: Generator, value: float) -> None:
    image, label = scans(3)
    image[1, 0, 3, 4, 5] = value
    with pytest.raises(DiffaugError, match=r"NaN or infinite values in case\(s\) \[1\]"):
        tiny_generator.vary(image, label, SAME)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_images_that_are_no_numbers_are_refused(tiny_generator: Generator, dtype: torch.dtype) -> None:
    image, label = scans(1)
    with pytest.raises(DiffaugError, match="must hold integers or floats"):
        tiny_generator.vary(image.to(dtype), label, SAME)


@pytest.mark.parametrize("shape", [(1, 2, 16, 24, 16), (1, 16, 24, 16)])
def test_images_of_other_channels_are_refused(tiny_generator: Generator, shape: tuple[int, ...]) -> None:
    with pytest.raises(DiffaugError, match=r"image must have shape \(B, 1, I, J, K\) with the channels"):
        tiny_generator.vary(torch.zeros(shape), None, SAME)


def test_sampling_no_case_is_refused(tiny_generator: Generator) -> None:
    with pytest.raises(DiffaugError, match="n must be at least 1, got 0"):
        tiny_generator.sample(0)


def test_constant_scans_stay_finite(tiny_generator: Generator) -> None:
    _, label = scans(1)
    varied = tiny_generator.vary(torch.full((1, 1, *GRID), 7.0), label, SAME, strength=1.0, steps=STEPS)
    assert torch.isfinite(varied).all()
    assert varied.min() >= 7


def test_loading_leaves_the_random_state_alone(tiny_generator_folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Generator.load(tiny_generator_folder)
    assert torch.equal(torch.rand(3), expected)


# -------- images unlike the training data


def test_images_unlike_the_training_data_are_told(tiny_generator: Generator) -> None:
    image, label = scans(2)
    errors = tiny_generator.reconstruction_error(image, SAME)
    plain = tiny_generator.vary(image, label, SAME, strength=0.0, residual=False)
    assert len(errors) == 2
    assert min(errors) > 0
    assert plain.shape == image.shape

    def with_limit(limit: float) -> Generator:
        card = tiny_generator.card.model_copy(update={"unlike_above": limit})
        return Generator(card, tiny_generator.model)

    strict, lenient = with_limit(min(errors) * 0.99), with_limit(max(errors) * 1.01)
    between = with_limit((min(errors) + max(errors)) / 2)
    mask = ball(GRID, (8, 12, 8), 3).expand(2, -1, -1, -1, -1)
    expected = tiny_generator.vary(image, label, SAME, strength=0.5, steps=STEPS)
    with pytest.warns(
        UserWarning, match=r"case\(s\) \[0, 1\] of the batch are unlike what tiny was trained on"
    ):
        assert torch.equal(strict.vary(image, label, SAME, strength=0.5, steps=STEPS), expected)
    worse = int(errors[1] > errors[0])
    with pytest.raises(UnlikeError, match=rf"case\(s\) \[{worse}\] .* is off by {max(errors):.3f}"):
        between.vary(image, label, SAME, strength=0.5, steps=STEPS, unlike="raise")
    with pytest.raises(UnlikeError, match="unlike"):
        strict.inpaint(image, mask, label, SAME, steps=STEPS, residual=True, unlike="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lenient.vary(image, label, SAME, strength=0.5, steps=STEPS)
        strict.vary(image, label, SAME, strength=0.5, steps=STEPS, unlike="ignore")
