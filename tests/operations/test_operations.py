"""The operations behind all plug-ins: what they draw, change, and leave to the last bit."""

import copy
import json
import pickle
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import label as components

from diffaug.errors import CardError, LabelError, UnlikeError, VerbError
from diffaug.generators.generator import Generator
from diffaug.generators.intensity import IntensityConvention
from diffaug.operations import Case, Inpainting, Operation, Repaint, Variation, apply
from tests.conftest import make_tiny_generator

SHAPE = (22, 17, 15)
# Axes P, I, R with spacings 1.6, 1.4, 1.5 mm.
AFFINE = np.array([[0, 0, 1.5, -20], [-1.6, 0, 0, 30], [0, -1.4, 0, 10], [0, 0, 0, 1.0]])
ALL = [Variation, Inpainting, Repaint]


def make_case(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.int16, channels: int = 1) -> Case:
    """A noisy bright object of two labels, 1 and 2, in the middle of a dark volume."""
    label = torch.zeros(1, *shape, dtype=torch.int16)
    middle = tuple(slice(n // 3, n // 3 + max(1, n // 3)) for n in shape)
    label[(0, *middle)] = 1
    label[(0, slice(shape[0] // 2, middle[0].stop), *middle[1:])] = 2
    noise = torch.rand(channels, *shape, generator=torch.Generator().manual_seed(0))
    return Case((200 * noise + 15 * label).to(dtype), label)


@pytest.mark.parametrize("operation", ALL)
def test_parameters_are_plain_json_and_decide_the_result(
    tiny_generator_folder: Path, operation: type[Operation]
) -> None:
    case = make_case()
    # Less than 2 mm, the default, would move few of these voxels.
    own = {"amplitude": 4.0} if operation is Repaint else {}
    transform = operation(tiny_generator_folder, label_mapping={7: 1}, **own)
    parameters = transform.parameters(5)
    assert parameters == transform.parameters(5) != transform.parameters(6)
    assert parameters["weights_hash"] == Generator.load(tiny_generator_folder).weights_hash
    again = json.loads(json.dumps(parameters))
    first, second = (apply(p, case, AFFINE) for p in (parameters, again))
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.label, second.label)
    assert not torch.equal(first.image, case.image)
    assert first.image.dtype == case.image.dtype
    assert torch.equal(first.label, case.label) == (operation is not Repaint)


@pytest.mark.parametrize("operation", ALL)
def test_leaves_what_it_was_given_alone(tiny_generator_folder: Path, operation: type[Operation]) -> None:
    case = make_case(dtype=torch.float32)
    before = Case(case.image.clone(), case.label.clone())
    apply(operation(tiny_generator_folder).parameters(1), case, AFFINE)
    assert torch.equal(case.image, before.image)
    assert torch.equal(case.label, before.label)


@pytest.mark.parametrize("operation", ALL)
def test_mapped_ids_are_the_same_case(tiny_generator_folder: Path, operation: type[Operation]) -> None:
    image, label = make_case()
    other = torch.where(label == 2, 40, label)
    expected = apply(operation(tiny_generator_folder).parameters(3), Case(image, label), AFFINE)
    mapped = operation(tiny_generator_folder, label_mapping={40: 2}).parameters(3)
    found = apply(mapped, Case(image, other), AFFINE)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.label, torch.where(expected.label == 2, 40, expected.label))


def test_copies_and_pickles_share_the_weights(tiny_generator: Generator, tiny_generator_folder: Path) -> None:
    by_name, by_object = Variation(tiny_generator_folder), Variation(tiny_generator)
    assert copy.deepcopy(by_name) is by_name
    assert len(pickle.dumps(by_name)) < 1000
    for operation in (by_name, by_object):
        restored = pickle.loads(pickle.dumps(operation))
        assert restored.parameters(1) == operation.parameters(1)


def test_a_case_without_structure_is_left_as_it_is(tiny_generator_folder: Path) -> None:
    case = make_case()._replace(label=torch.zeros(1, *SHAPE, dtype=torch.int16))
    with pytest.warns(UserWarning, match="no structure"):
        left = apply(Repaint(tiny_generator_folder).parameters(1), case, AFFINE)
    assert torch.equal(left.image, case.image)


# -------- inpainting


@pytest.mark.parametrize("shape", ["ellipsoid", "box", "label", "around"])
def test_inpainting_changes_its_region_alone(tiny_generator_folder: Path, shape: Any) -> None:
    case = make_case(dtype=torch.float32)
    parameters = Inpainting(tiny_generator_folder, region=shape).parameters(4)
    made = apply(parameters, case, AFFINE)
    changed = (made.image != case.image)[0]
    assert 0 < changed.float().mean() < 0.5
    region = parameters["region"]
    if shape in ("ellipsoid", "box"):
        # Radii follow the generator's axes R, A, S, which are the case's 2, 0, 1.
        hits = changed.nonzero()
        extent = (hits.max(0).values - hits.min(0).values) * torch.tensor([1.6, 1.4, 1.5])
        assert bool((extent[[2, 0, 1]] <= 2 * torch.tensor(region["radii"]) + 1e-4).all())
    else:
        first = region["labels"][0]
        assert bool(changed[(case.label == first)[0]].any()) == (shape == "label")
        if shape == "around":
            assert not bool(changed[case.label[0] != 0].any())


def test_inpainting_of_a_label_that_is_not_there_takes_the_next(tiny_generator_folder: Path) -> None:
    image, label = make_case()
    parameters = Inpainting(tiny_generator_folder, region="label").parameters(0)
    first, second = parameters["region"]["labels"]
    only = torch.where(label == first, second, label)
    made = apply(parameters, Case(image, only), AFFINE)
    assert not torch.equal(made.image, image)


def test_regions_of_labels_need_labels(tiny_generator_folder: Path) -> None:
    with pytest.raises(LabelError, match=r"labels names \[5\]; the label maps may hold \[1, 2\]"):
        Inpainting(tiny_generator_folder, region="label", labels=[5])
    with pytest.raises(ValueError, match="region must be one of ellipsoid, box, label, around, got 'ball'"):
        Inpainting(tiny_generator_folder, region="ball")


# -------- repaint


def test_a_repaint_keeps_components_and_volumes_within_bounds() -> None:
    generator = make_tiny_generator()
    image, label = make_case()
    voxel = 1.5 * 1.6 * 1.4
    sizes = {v: float((label == v).sum()) * voxel for v in (1, 2)}
    bounds = {v: (0.85 * size, 1.15 * size) for v, size in sizes.items()}
    card = generator.card.model_copy(update={"label_volumes": bounds})
    generator = Generator(card, generator.model)
    changed = []
    for seed in range(6):
        made = apply(Repaint(generator, amplitude=4).parameters(seed), Case(image, label), AFFINE)
        changed.append(not torch.equal(made.label, label))
        assert set(torch.unique(made.label).tolist()) == {0, 1, 2}
        for value, (low, high) in bounds.items():
            assert low <= float((made.label == value).sum()) * voxel <= high
            assert components((made.label[0] == value).numpy(), np.ones((3, 3, 3)))[1] == 1
    assert sum(changed) >= 3


def test_a_deformation_without_an_allowed_share_warns() -> None:
    generator = make_tiny_generator()
    case = make_case()
    bounds = {v: (float((case.label == v).sum()) * 1.5 * 1.6 * 1.4,) * 2 for v in (1, 2)}
    generator = Generator(generator.card.model_copy(update={"label_volumes": bounds}), generator.model)
    with pytest.warns(UserWarning, match="no share of a deformation was within bounds"):
        made = apply(Repaint(generator, amplitude=9).parameters(2), case, AFFINE)
    assert torch.equal(made.label, case.label)
    assert not torch.equal(made.image, case.image)


def test_a_repaint_needs_labels_and_bounds(tiny_generator: Generator) -> None:
    model = tiny_generator.model
    unbounded = tiny_generator.card.model_copy(update={"label_volumes": {}})
    with pytest.raises(CardError, match="no label_volumes, which bound a deformation: fit it again"):
        Repaint(Generator(unbounded, model))
    with pytest.raises(LabelError, match="knows no labels, from which it could paint"):
        Repaint(Generator(unbounded.model_copy(update={"labels": {}}), model))
    parameters = Repaint(tiny_generator, allow_label_drift=True).parameters(0)
    with pytest.raises(LabelError, match="deforms a label map: give one"):
        apply(parameters, make_case()._replace(label=None), AFFINE)


@pytest.mark.parametrize("amplitude", [-1, (3, 2), "far"])
def test_amplitudes_out_of_range_are_errors(tiny_generator_folder: Path, amplitude: Any) -> None:
    with pytest.raises(ValueError, match="amplitude must be a number or a pair"):
        Repaint(tiny_generator_folder, amplitude=amplitude)


def test_a_verb_that_the_generator_lacks_is_an_error(tiny_generator: Generator) -> None:
    card = tiny_generator.card.model_copy(update={"verbs": ["vary"]})
    with pytest.raises(VerbError, match="no verb 'inpaint'; it has vary"):
        Inpainting(Generator(card, tiny_generator.model))


# -------- any geometry


@st.composite
def affines(draw: st.DrawFn) -> NDArray[np.float64]:
    """Any axis order and directions, 0.3 to 6 mm on each axis, turned by up to 20 degrees."""
    spacing = [draw(st.floats(0.3, 6)) for _ in range(3)]
    order = draw(st.permutations(range(3)))
    signs = [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    matrix = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[world, axis] = sign
    a, b = (np.deg2rad(draw(st.floats(-20, 20))) for _ in range(2))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ matrix * spacing
    affine[:3, 3] = [draw(st.floats(-200, 200)) for _ in range(3)]
    return affine


@cache
def generator_of(channels: int, window: bool) -> Generator:
    """A tiny generator of one to four channels, of MR in units of its own or of CT in HU."""
    generator = make_tiny_generator(channels=channels)
    if window:
        limits = [(-1000.0, 400.0)] * channels
        convention = IntensityConvention(kind="window", windows=limits, typical=limits)
        generator.card = generator.card.model_copy(update={"intensity": convention})
    return generator


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    affine=affines(),
    shape=st.tuples(*[st.integers(3, 60)] * 3),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.float64]),
    scale=st.sampled_from([1.0, 5000.0]),
    offset=st.sampled_from([0.0, -1024.0]),
    seed=st.integers(0, 2**31 - 1),
    operation=st.sampled_from(ALL),
    channels=st.integers(1, 4),
    window=st.booleans(),
)
def test_any_geometry_and_unit_comes_back_as_it_was(
    affine: NDArray[np.float64],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    scale: float,
    offset: float,
    seed: int,
    operation: type[Operation],
    channels: int,
    window: bool,
) -> None:
    """Shape and dtype, labels in their vocabulary, no NaN, and the same voxels wherever the generator does
    not reach; larger structures than it reaches are refused."""
    image, label = make_case(shape, torch.float32, channels)
    image = image / 200 * (200 if dtype == torch.uint8 else scale) + (0 if dtype == torch.uint8 else offset)
    case = Case(image.to(dtype), label)
    generator = generator_of(channels, window)
    parameters = operation(generator, steps=1).parameters(seed)
    try:
        placement = generator.placement(shape, affine, label)
    except VerbError:
        with pytest.raises(VerbError, match="lie outside the"):
            apply(parameters, case, affine)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = apply(parameters, case, affine)
    assert made.image.shape == case.image.shape
    assert made.image.dtype == dtype
    assert made.label.dtype == label.dtype
    assert bool(torch.isfinite(made.image).all())
    assert set(torch.unique(made.label).tolist()) <= {0, 1, 2}
    beyond = torch.ones(1, *shape, dtype=torch.bool)
    bounds = placement.window()
    placement.put_back(beyond, torch.zeros(1, *(b - a for a, b in bounds), dtype=torch.bool), bounds)
    outside = beyond.expand_as(case.image)
    assert torch.equal(made.image[outside], case.image[outside])
    assert torch.equal(made.label[beyond], label[beyond])
    if operation is not Repaint:
        assert torch.equal(made.label, label)


@pytest.mark.parametrize("operation", ALL)
def test_unlike_images_are_refused_when_asked(operation: type[Operation]) -> None:
    generator = make_tiny_generator()
    card = generator.card.model_copy(update={"unlike_above": 1e-6})
    generator = Generator(card, generator.model)
    parameters = operation(generator, unlike="raise").parameters(1)
    with pytest.raises(UnlikeError, match="Check modality, orientation and units"):
        apply(parameters, make_case(), AFFINE)
