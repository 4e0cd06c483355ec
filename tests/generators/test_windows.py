"""Generators of patches on volumes of any size: windows, their averages, and every verb."""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffaug.errors import DiffaugError
from diffaug.generators.generator import Generator
from diffaug.generators.grid import covering_grid, place
from diffaug.generators.windows import over_windows, window_starts
from diffaug.operations import Case, Inpainting, Repaint, Variation, apply
from tests.conftest import make_tiny_generator

# Axes P, I, R with spacings 1.6, 1.4, 1.5 mm.
AFFINE = np.array([[0, 0, 1.5, -20], [-1.6, 0, 0, 30], [0, -1.4, 0, 10], [0, 0, 0, 1.0]])
LARGE = (44, 31, 40)


@pytest.fixture(scope="module")
def patches() -> Generator:
    """The tiny generator, whose grid of (16, 24, 16) voxels is a window."""
    generator = make_tiny_generator()
    card = generator.card.model_copy(update={"extent": "patch", "label_volumes": {1: (1, 1e6), 2: (1, 1e6)}})
    return Generator(card, generator.model)


def scan(shape: tuple[int, int, int] = LARGE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A noisy volume with two structures far larger than a window."""
    label = torch.zeros(1, 1, *shape, dtype=torch.int16)
    label[:, :, 4:-4, 3:-3, 5:20] = 1
    label[:, :, 4:-4, 3:-3, 20:-5] = 2
    noise = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    return (100 * noise + 60 * label).to(dtype), label


@settings(deadline=None)
@given(length=st.integers(1, 300), window=st.integers(1, 64))
def test_windows_cover_an_axis(length: int, window: int) -> None:
    starts = window_starts(length, window)
    covered = np.zeros(max(length, window), bool)
    for start in starts:
        covered[start : start + window] = True
    assert covered.all()
    assert starts == sorted(set(starts))
    assert all(b - a <= max(1, window // 2) for a, b in pairwise(starts))
    assert starts[-1] + window == max(length, window)


@settings(deadline=None)
@given(
    lattice=st.tuples(*[st.integers(3, 11)] * 3),
    window=st.tuples(*[st.integers(1, 3)] * 3),
    at_once=st.integers(1, 5),
    up=st.booleans(),
)
def test_what_windows_agree_on_is_kept(
    lattice: tuple[int, int, int], window: tuple[int, int, int], at_once: int, up: bool
) -> None:
    """Copies, enlarged or reduced, are those of the whole volume, whatever the windows."""
    fine, coarse = (2, 4, 1), (1, 1, 1)
    volume = torch.randn(2, 3, *(n * (1 if up else f) for n, f in zip(lattice, fine, strict=True)))

    def function(x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=[float(f) for f in fine]) if up else pool(x)

    def pool(x: Tensor) -> Tensor:
        return nn.functional.avg_pool3d(x, fine, fine)

    scale = (coarse, fine) if up else (fine, coarse)
    (found,) = over_windows(function, [volume], window, scale, at_once=at_once)
    torch.testing.assert_close(found, function(volume), rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 90)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 6)] * 3),
    order=st.permutations(range(3)),
    signs=st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3),
)
def test_a_covering_grid_covers(
    shape: tuple[int, int, int], spacing: tuple[float, ...], order: list[int], signs: tuple[float, ...]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[order] * np.array(spacing) * np.array(signs)
    own = make_tiny_generator().grid
    grid = covering_grid(own, shape, affine, (4, 4, 4))
    assert all(n >= o and (n == o or n % 4 == 0) for n, o in zip(grid.shape, own.shape, strict=True))
    placement = place(grid, shape, affine)
    assert [stop - start for start, stop in placement.window()] == list(placement.source_shape)
    assert float(placement.fade().min()) == 1


def test_a_volume_of_one_window_is_what_an_object_is(patches: Generator) -> None:
    whole = Generator(patches.card.model_copy(update={"extent": "object"}), patches.model)
    image, label = scan((16, 24, 16))
    affine = np.diag([1.5, 1.5, 1.5, 1])
    for verb in ("vary", "paint", "segment"):
        made = []
        for generator in (patches, whole):
            if verb == "vary":
                made.append(generator.vary(image, label, affine, strength=0.6, steps=3))
            elif verb == "paint":
                made.append(generator.paint(label, affine, steps=3))
            else:
                made.append(generator.segment(image, affine, steps=3))
        assert torch.equal(*made)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_every_verb_on_a_large_volume(patches: Generator, dtype: torch.dtype) -> None:
    image, label = scan(dtype=dtype)
    assert torch.equal(patches.vary(image, label, AFFINE, strength=0), image)
    varied = patches.vary(image, label, AFFINE, strength=0.5, steps=2, seed=1)
    plain = patches.vary(image, label, AFFINE, strength=0.5, steps=2, seed=1, residual=False)
    painted = patches.paint(label, AFFINE, steps=2)
    found = patches.segment(image, AFFINE, steps=2)
    for made in (varied, plain, painted, found):
        assert made.shape == image.shape
        assert bool(torch.isfinite(made.float()).all())
    assert varied.dtype == plain.dtype == dtype
    assert (varied != image).float().mean() > 0.5
    assert set(torch.unique(found).tolist()) <= {0, 1, 2}
    mask = torch.zeros_like(label, dtype=torch.bool)
    mask[:, :, 10:35, 5:25, 8:32] = True
    filled = patches.inpaint(image, mask, label, AFFINE, steps=2)
    assert torch.equal(filled[~mask], image[~mask])
    assert (filled[mask] != image[mask]).float().mean() > 0.5
    latent = patches.encode(image.float(), AFFINE)
    assert latent.shape[2:] > patches.model.image_latent[1:]
    assert patches.decode(latent).shape[2:] == tuple(4 * n for n in latent.shape[2:])


def test_bytes_do_not_depend_on_the_batch(patches: Generator) -> None:
    image, label = scan()
    two = torch.cat([image, 2 * image]), torch.cat([label, label])
    both = patches.vary(*two, AFFINE, strength=0.5, steps=2, seed=[3, 4])
    alone = patches.vary(2 * image, label, AFFINE, strength=0.5, steps=2, seed=[4])
    assert torch.equal(both[1:], alone)


def test_noise_is_one_lattice(patches: Generator) -> None:
    """With velocities that do not depend on the window, the windows leave no trace."""
    model = make_tiny_generator().model
    denoiser = model.denoiser

    class Linear(nn.Module):
        config = denoiser.config

        def forward(self, image: Tensor, label: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return 0.5 * image, 0.5 * label

    model.denoiser = Linear()
    generator = Generator(patches.card, model)
    image, label = scan()
    levels = {"strength": 0.7, "steps": 4, "seed": 2}
    placement = generator.placement(image.shape[2:], AFFINE, label[0])
    latent = generator.encode(image, AFFINE)
    from diffaug.generators.samplers import SAMPLERS, add_noise, noise_levels
    from diffaug.generators.seeds import CaseNoise, case_seeds

    sampling = generator.card.sampling("vary", 4, None, None)
    noise = CaseNoise(case_seeds(2, 1)).draw((6, *latent.shape[2:]))[:, :4]
    steps = noise_levels(max(1, round(4 * 0.7)), start=0.7, shift=sampling.shift)
    expected = SAMPLERS[sampling.sampler](lambda x, _: 0.5 * x, add_noise(latent, noise, 0.7), steps)
    found = []
    original = generator.model.decode_image
    generator.model.decode_image = lambda z: found.append(z) or original(z)
    generator.vary(image, label, AFFINE, **levels)
    assert placement.grid.shape != generator.grid.shape
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", [Variation, Inpainting, Repaint])
def test_operations_work_on_large_volumes(patches: Generator, operation: type) -> None:
    image, label = scan()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = apply(operation(patches, steps=1).parameters(3), Case(image[0], label[0]), AFFINE)
    assert made.image.shape == image.shape[1:]
    assert not torch.equal(made.image, image[0])


def test_a_batch_of_different_spacings_is_refused(patches: Generator) -> None:
    image, label = (torch.cat([x, x]) for x in scan())
    affines = np.stack([AFFINE, AFFINE @ np.diag([2, 2, 2, 1])])
    with pytest.raises(DiffaugError, match=r"cover differently many voxels.*give them one by one"):
        patches.vary(image, label, affines, strength=0.5, steps=1)


def test_a_card_of_patches_survives_its_folder(patches: Generator, tmp_path: Path) -> None:
    generator = make_tiny_generator()
    generator.card = patches.card
    generator.save(tmp_path)
    image, label = scan()
    again = Generator.load(tmp_path).vary(image, label, AFFINE, strength=0.4, steps=1)
    assert torch.equal(again, generator.vary(image, label, AFFINE, strength=0.4, steps=1))
