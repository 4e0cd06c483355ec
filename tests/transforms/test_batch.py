"""The batch modules: each case as its parameters say, and nothing that a training loop notices."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffaug.errors import DiffaugError, LabelError
from diffaug.operations import Case, apply
from diffaug.transforms.batch import BatchInpainting, BatchRepaint, BatchVariation
from tests.operations.test_operations import AFFINE, make_case

ALL = [BatchVariation, BatchInpainting, BatchRepaint]


def make_batch(size: int = 3) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Cases that differ in brightness and in their place in the world."""
    image, label = make_case(dtype=torch.float32)
    scale = torch.arange(1, size + 1).view(-1, 1, 1, 1, 1)
    affines = np.stack([AFFINE] * size)
    affines[:, 0, 3] += np.arange(size)
    return image * scale, label.expand(size, *label.shape).clone(), affines


@pytest.mark.parametrize("kind", ALL)
def test_each_case_is_what_its_parameters_say(tiny_generator_folder: Path, kind: Any) -> None:
    image, label, affine = make_batch()
    before = image.clone(), label.clone()
    module = kind(tiny_generator_folder, p=1)
    torch.manual_seed(0)
    made = module(image, label, affine)
    images, labels = made if kind is BatchRepaint else (made, label)
    assert len({parameters["seed"] for parameters in module.last_params}) == 3
    for n, parameters in enumerate(module.last_params):
        expected = apply(parameters, Case(image[n], label[n]), affine[n])
        assert torch.equal(images[n], expected.image)
        assert torch.equal(labels[n], expected.label)
        assert not torch.equal(images[n], image[n])
    assert torch.equal(image, before[0])
    assert torch.equal(label, before[1])
    torch.manual_seed(0)
    again = module(image, label, affine)
    assert torch.equal(again[0] if kind is BatchRepaint else again, images)


def test_probability_is_per_case(tiny_generator_folder: Path) -> None:
    image, label, affine = make_batch(8)
    module = BatchVariation(tiny_generator_folder, p=0.5, steps=1)
    torch.manual_seed(1)
    made = module(image, label, affine)
    changed = [not torch.equal(a, b) for a, b in zip(made, image, strict=True)]
    assert changed == [parameters is not None for parameters in module.last_params]
    assert 0 < sum(changed) < 8
    strengths = {parameters["strength"] for parameters in module.last_params if parameters}
    assert len(strengths) == 1
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 2"):
        BatchVariation(tiny_generator_folder, p=2)


def test_a_training_loop_does_not_see_it(tiny_generator_folder: Path) -> None:
    image, label, affine = make_batch()
    module = nn.Sequential(nn.Identity(), nn.Conv3d(1, 1, 1))
    module.augment = BatchVariation(tiny_generator_folder, p=1)
    names = {name for name, _ in module.named_parameters()}
    torch.manual_seed(3)
    plain = module.augment(image, label, affine)
    assert names == {name for name, _ in module.named_parameters()} == set(module.state_dict())
    assert not plain.requires_grad
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.augment(image, label, affine), plain)
    torch.manual_seed(3)
    assert torch.equal(copy.deepcopy(module).augment(image, label, affine), plain)


def test_evaluation_mode_changes_nothing_and_pickles_are_small(tiny_generator_folder: Path) -> None:
    image, label, affine = make_batch()
    module = BatchVariation(tiny_generator_folder, p=1)
    module(image, label, affine)
    assert len(pickle.dumps(module)) < 5000
    assert torch.equal(module.eval()(image, label, affine), image)
    assert module.last_params == [None] * 3
    with pytest.raises(DiffaugError, match=r"affine must have shape \(4, 4\) or \(3, 4, 4\), got \(3, 3\)"):
        module(image, label, np.eye(3))
    with pytest.raises(LabelError, match="BatchRepaint deforms label maps: give them"):
        BatchRepaint(tiny_generator_folder, p=0)(image, None, affine)


def test_half_precision_keeps_its_dtype(tiny_generator_folder: Path) -> None:
    image, label, affine = make_batch()
    made = BatchVariation(tiny_generator_folder, p=1)(image.half(), label, affine)
    assert made.dtype == torch.float16
    assert bool(torch.isfinite(made).all())


def test_a_case_without_structure_is_left_as_it_is(tiny_generator_folder: Path) -> None:
    image, label, affine = make_batch()
    label[1] = 0
    with pytest.warns(UserWarning, match="shows no structure"):
        made = BatchVariation(tiny_generator_folder, p=1)(image, label, affine)
    assert [torch.equal(a, b) for a, b in zip(made, image, strict=True)] == [False, True, False]


def test_images_without_a_batch_axis_are_refused(tiny_generator_folder: Path) -> None:
    image, label, affine = make_batch()
    with pytest.raises(DiffaugError, match=r"must have shape \(B, C, I, J, K\)"):
        BatchVariation(tiny_generator_folder, p=1)(image[0], label[0], affine[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ALL)
def test_on_a_gpu(tiny_generator_folder: Path, kind: Any) -> None:
    image, label, affine = make_batch()
    module = kind(tiny_generator_folder, p=1)
    made = module(image.cuda(), label.cuda(), affine)
    images = made[0] if kind is BatchRepaint else made
    assert images.device.type == "cuda"
    assert not torch.equal(images.cpu(), image)
