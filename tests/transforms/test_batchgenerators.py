"""The transforms in nnU-Net's own pipeline, on patches with padding."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from diffaug.errors import DiffaugError
from diffaug.nnunet.trainers import patch_affine
from diffaug.operations import Case, apply
from diffaug.transforms.batchgenerators import InpaintingTransform, RepaintTransform, VariationTransform
from tests.operations.test_operations import AFFINE, make_case

FORWARD = (0, 1, 2)
OURS = patch_affine(
    nib.orientations.aff2axcodes(AFFINE), FORWARD, [float(s) for s in nib.affines.voxel_sizes(AFFINE)[::-1]]
)


def make_patch() -> tuple[torch.Tensor, torch.Tensor]:
    """A case in nnU-Net's axes, with a margin that lies outside the scan."""
    image, label = make_case(dtype=torch.float32)
    image, label = (x.permute(0, 3, 2, 1).contiguous() for x in (image, label))
    label[:, :2] = -1
    image[:, :2] = 0
    return image, label


@pytest.mark.parametrize("kind", [VariationTransform, InpaintingTransform, RepaintTransform])
def test_is_the_operation_in_other_axes(tiny_generator_folder: Path, kind: Any) -> None:
    image, label = make_patch()
    before = image.clone(), label.clone()
    own = {"amplitude": 4.0} if kind is RepaintTransform else {}
    transform = kind(OURS, tiny_generator_folder, **own)
    torch.manual_seed(0)
    made = transform(image=image, segmentation=label)
    torch.manual_seed(0)
    parameters = transform.get_parameters()["parameters"]
    turned = Case(*(x.permute(0, 3, 2, 1).contiguous() for x in (before[0], before[1].clamp(min=0))))
    affine = AFFINE.copy()
    affine[:3, 3] = 0
    expected = apply(parameters, turned, affine)
    assert torch.allclose(made["image"], expected.image.permute(0, 3, 2, 1), atol=1e-3)
    assert not torch.equal(made["image"], before[0])
    outside = before[1] < 0
    assert torch.equal(made["segmentation"] < 0, outside)
    if kind is RepaintTransform:
        moved = expected.label.permute(0, 3, 2, 1)
        assert torch.equal(made["segmentation"][~outside], moved[~outside])
        assert not torch.equal(made["segmentation"], before[1])
    else:
        assert torch.equal(made["segmentation"], before[1])


def test_first_in_the_pipeline_of_nnunet(tiny_generator_folder: Path) -> None:
    angle = (-0.5, 0.5)
    patch = (12, 14, 18)
    pipeline = nnUNetTrainer.get_training_transforms(patch, angle, [[1, 1, 1], [0.5] * 3], (0, 1, 2), False)
    vary = VariationTransform(OURS, tiny_generator_folder)
    pipeline.transforms.insert(0, RandomTransform(vary, apply_probability=1))
    image, label = make_patch()
    for _ in range(3):
        made = pipeline(image=image.clone(), segmentation=label.clone())
        assert made["image"].shape == (1, *patch)
        assert bool(torch.isfinite(made["image"]).all())
        assert [tuple(level.shape[1:]) for level in made["segmentation"]] == [patch, (6, 7, 9)]
    assert len(pickle.dumps(vary)) < 3000


def test_a_repaint_of_a_cascade_is_refused(tiny_generator_folder: Path) -> None:
    image, label = make_patch()
    with pytest.raises(DiffaugError, match="would show the old anatomy: use a VariationTransform"):
        RepaintTransform(OURS, tiny_generator_folder)(image=image, segmentation=label.repeat(2, 1, 1, 1))
    made = VariationTransform(OURS, tiny_generator_folder)(
        image=image.clone(), segmentation=label.repeat(2, 1, 1, 1)
    )
    assert not torch.equal(made["image"], image)


def test_missing_batchgenerators_names_the_extra() -> None:
    code = "import sys; sys.modules['batchgeneratorsv2'] = None; import diffaug.transforms.batchgenerators"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "batchgeneratorsv2 is not installed; install it with: pip install 'diffaug[nnunet]'" in process.stderr
    )
    assert np.isfinite(OURS).all()
