"""Fits to cases of which only some have a label map: the few must not drown among the others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffaug.datasets.reading import read_dataset
from diffaug.generators.generator import Generator
from diffaug.generators.joint_flow.model import JointFlow
from diffaug.progress import Progress
from diffaug.training.batches import AugmentedBatches
from diffaug.training.cases import Canvases
from diffaug.training.fit import fit_generator
from diffaug.training.joint_flow.denoiser import draw_cases
from tests.training.conftest import blob_plan, write_blobs


def test_half_of_the_draws_are_labelled() -> None:
    labelled = torch.zeros(144, dtype=torch.bool)
    labelled[[3, 50, 51, 143]] = True
    drawn = draw_cases(labelled, 4000, torch.Generator().manual_seed(0))
    assert 0.46 < labelled[drawn].float().mean() < 0.54
    assert set(drawn.tolist()) == set(range(144))
    counts = torch.bincount(drawn, minlength=144)[labelled].float()
    assert counts.std() / counts.mean() < 0.1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_without_a_shortage_draws_are_even(share: float) -> None:
    labelled = torch.arange(10) < share * 10
    drawn, plain = (torch.Generator().manual_seed(1) for _ in range(2))
    assert torch.equal(draw_cases(labelled, 32, drawn), torch.randint(10, (32,), generator=plain))


def test_unlabelled_cases_come_with_the_label_map_of_another() -> None:
    plan = blob_plan()
    shape = tuple(n + 8 for n in plan.grid.shape)
    images = np.random.default_rng(0).normal(0, 0.3, (6, 1, *shape)).astype(np.float16)
    labels = np.zeros((6, *shape), np.uint8)
    labels[2, 8:-8, 8:-8, 8:-8] = 1
    labelled = np.arange(6) == 2
    batches = AugmentedBatches(plan, Canvases(images, labels, labelled, tuple("abcdef")), 8, 0, 1)
    all_labelled = Canvases(images, labels, np.ones(6, bool), tuple("abcdef"))
    same = AugmentedBatches(plan, all_labelled, 8, 0, 1)
    for step in range(3):
        drawn, other = batches(step), same(step)
        assert (drawn[1] == 1).any(axis=(1, 2, 3)).all()
        np.testing.assert_array_equal(drawn[0], other[0])


def test_label_latents_are_standardised_by_the_label_maps_that_there_are(tmp_path: Path) -> None:
    folder = write_blobs(tmp_path / "Blobs")
    description = json.loads((folder / "dataset.json").read_text())
    for case in description["training"][2:]:
        del case["label"]
    (folder / "dataset.json").write_text(json.dumps(description))
    names = [f"blob_{n}" for n in range(6)]
    (folder / "splits.json").write_text(json.dumps({"train": names[:5], "validation": names[5:]}))
    (tmp_path / "plan.json").write_text(blob_plan(steps=12).model_dump_json())
    output = tmp_path / "fit"
    generator = fit_generator(
        read_dataset(folder), output, plan=tmp_path / "plan.json", progress=Progress(quiet=True)
    )
    assert isinstance(generator, Generator)
    assert generator.card.training.labelled == 2
    assert "label_round_trip_dice" not in generator.card.figures
    history = json.loads((output / "history.json").read_text())
    assert "sample_label" not in history["denoiser"][-1]
    assert history["denoiser"][-1]["sample_image"] > 0

    labels = np.load(output / "private" / "training" / "labels.npy")[:2, 4:-4, 4:-4, 4:-4]
    model = generator.model
    assert isinstance(model, JointFlow)
    with torch.no_grad():
        latent = model.encode_label(torch.from_numpy(labels)[:, None])
    # Weights are kept in half precision; statistics are cumulative means over batches.
    torch.testing.assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(latent.std((0, 2, 3, 4)), torch.ones(3), atol=0.05, rtol=0)
