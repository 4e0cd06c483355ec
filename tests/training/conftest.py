"""A small dataset of blobs, and a plan that trains on it in seconds."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from diffaug.generators.intensity import IntensityConvention
from diffaug.generators.joint_flow.autoencoder import AutoencoderConfig
from diffaug.generators.joint_flow.denoiser import DenoiserConfig
from diffaug.training.joint_flow.plan import AutoencoderTraining, DenoiserTraining, JointFlowPlan
from diffaug.training.plan import GridPlan


def write_blobs(folder: Path, count: int = 6) -> Path:
    """A dataset in the decathlon's layout: noisy ellipsoids in two labels, about 14 x 20 x 15 voxels at 2
    mm."""
    rng = np.random.default_rng(0)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    training = []
    for n in range(count):
        shape = 13 + rng.integers(3), 19 + rng.integers(4), 14 + rng.integers(3)
        axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, s) for s in shape), indexing="ij"))
        radius = np.sqrt((axes**2 / np.array([0.5, 0.7, 0.5])[:, None, None, None] ** 2).sum(axis=0))
        label = np.where(radius < 1, np.where(axes[1] > 0, 1, 2), 0)
        image = 300 * (radius < 1) + 100 * axes[0] + rng.normal(scale=30, size=shape) + 500
        for part, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", label.astype(np.uint8))):
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), folder / part / f"blob_{n}.nii.gz")
        training.append({"image": f"./imagesTr/blob_{n}.nii.gz", "label": f"./labelsTr/blob_{n}.nii.gz"})
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "name": "Blobs",
                "modality": {"0": "MRI"},
                "labels": {"0": "background", "1": "front", "2": "back"},
                "licence": "CC0-1.0",
                "training": training,
            }
        )
    )
    return folder


def blob_plan(steps: int = 6) -> JointFlowPlan:
    """Networks of a few thousand weights."""
    return JointFlowPlan(
        name="blobs",
        grid=GridPlan(spacing=(2.0, 2.0, 2.0), shape=(16, 24, 16)),
        channels=["MRI"],
        labels={0: "background", 1: "front", 2: "back"},
        intensity=IntensityConvention(kind="percentile", typical=[(400.0, 900.0)]),
        image_autoencoder=AutoencoderConfig(
            channels=1, latent_channels=5, downsampling=(4, 4, 4), widths=(8, 16), blocks=1
        ),
        label_autoencoder=AutoencoderConfig(
            channels=3, latent_channels=3, downsampling=(4, 4, 4), widths=(8, 16), blocks=1
        ),
        denoiser=DenoiserConfig(
            image_channels=5,
            label_channels=3,
            latent_shape=(4, 6, 4),
            convolution_width=8,
            width=16,
            depth=2,
            heads=2,
        ),
        augmentation={},
        autoencoder_training=AutoencoderTraining(steps=steps, batch=2),
        denoiser_training=DenoiserTraining(steps=steps, batch=4, rounds=2),
        evaluate_every=2,
        checkpoint_every=1,
    )


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_blobs`."""
    return write_blobs(tmp_path_factory.mktemp("data") / "Blobs")
